"""Each fault has a scope and a reason, and its sentence holds the provider's own words."""

import pytest

from vcot.pipeline.faults import Place, explain_status, explain_text, find_remedy, read_reset, read_retry_after

PLACE = Place(key_env="MY_KEY", model_field="judge.model", url_field="judge.base_url")


def explain(status, body=None, **headers):
    return explain_status(
        status, body, {name.replace("_", "-"): value for name, value in headers.items()}, "http://api"
    )


@pytest.mark.parametrize(
    ("status", "body", "scope", "reason"),
    [
        (401, {"code": "invalid_api_key"}, "account", "key"),
        (400, {"code": "invalid_api_key"}, "account", "key"),
        (402, {}, "account", "quota"),
        (401, {}, "account", "key"),
        (403, {}, "account", "forbidden"),
        (403, {"code": "unsupported_country_region_territory"}, "account", "forbidden"),
        (429, {"code": "insufficient_quota"}, "account", "quota"),
        (429, {"type": "insufficient_quota"}, "account", "quota"),
        (404, {"code": "model_not_found"}, "account", "model"),
        (404, {"message": "The model `m` does not exist.", "code": 404}, "account", "model"),
        (404, "<html>404 page not found</html>", "account", "address"),
        (400, {"code": "unsupported_parameter", "param": "max_tokens"}, "account", "parameter"),
        (400, {"param": "response_format"}, "account", "parameter"),
        (400, {"code": "content_filter", "param": "prompt"}, "item", "content_filter"),
        (400, {"code": "context_length_exceeded"}, "item", "too_long"),
        (
            400,
            {"message": "This model's maximum context length is 9 tokens.", "param": "max_tokens"},
            "item",
            "too_long",
        ),
        (400, {"message": "no"}, "item", "bad_request"),
        (413, {}, "item", "too_long"),
        (429, {"code": "rate_limit_exceeded"}, "attempt", "rate_limit"),
        (500, {}, "attempt", "overloaded"),
        (502, "<html>bad gateway</html>", "attempt", "overloaded"),
    ],
)
def test_a_status_and_a_code_decide_whose_fault_it_is(status, body, scope, reason):
    fault = explain(status, body)
    assert (fault.scope, fault.reason, fault.status) == (scope, reason, status)
    if scope == "account":
        assert find_remedy(reason, PLACE)


def test_only_a_field_that_the_server_does_not_take_may_be_said_in_another_way():
    assert explain(400, {"code": "unsupported_value", "param": "temperature"}).param == "temperature"
    assert explain(400, {"code": "unsupported_parameter", "param": "messages"}).param is None
    assert explain(400, {"code": "invalid_value", "param": "temperature"}).param is None


def test_the_sentence_holds_the_providers_words_whatever_the_body_is():
    assert str(explain(403, {"message": "Country not supported"})) == "HTTP 403 from http://api: Country not supported"
    assert str(explain(502, "<html><style>p{}</style><h1>Bad\n gateway</h1></html>")) == (
        "HTTP 502 from http://api: 'Bad gateway'"
    )
    assert "Not Found" in str(explain(404, {"detail": "Not Found"}))
    assert len(str(explain(500, "x" * 9000))) < 300


def test_a_page_is_the_servers_fault_and_half_a_json_the_attempts():
    page = explain_text("<html>Please log in</html>", "text/html", "http://api")
    assert (page.scope, page.reason) == ("account", "address")
    assert "'Please log in'" in str(page)
    half = explain_text('{"id": "x", "choi', "application/json", "http://api")
    assert (half.scope, half.reason) == ("attempt", "cut_off")


def test_a_wish_of_an_hour_is_a_limit_of_the_day():
    assert explain(429, {}, retry_after="20").retry_after_s == 20
    assert explain(429, {}, retry_after="20", retry_after_ms="1500").retry_after_s == 1.5
    long = explain(429, {"message": "per day"}, retry_after="3600")
    assert (long.scope, long.reason) == ("account", "rate_limit")
    assert "per day (to be asked again after 3600 s)" in str(long)
    assert read_retry_after({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1),
        ("6m0s", 360),
        ("120ms", 0.12),
        ("1h2m3.5s", 3723.5),
        ("7", 7),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("inf", None),
        ("nan", None),
    ],
)
def test_resets_are_read_as_openai_writes_them(text, seconds):
    assert read_reset(text) == seconds
