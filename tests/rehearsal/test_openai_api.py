"""The simulated API refuses what the real one refuses, and answers alike to like requests."""

import base64
import io

import httpx2
import pytest
from PIL import Image

from tests.rehearsal.openai_api import Settings, create_app

SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "integer", "enum": [1, 2, 3]}},
    "required": ["score"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA}}


def image_part(size=(64, 64), detail="low"):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url, "detail": detail}}


def make_body(text="Response: x", *parts, **changes):
    content = [*parts, {"type": "text", "text": text}]
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": content}], "max_tokens": 100, "seed": 0}
    return body | changes


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


async def post(app, *bodies, key="sk-rehearsal"):
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://openai/v1") as client:
        headers = {"authorization": f"Bearer {key}"}
        return [await client.post("/chat/completions", json=body, headers=headers) for body in bodies]


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"top_k": 5}, 400, "unknown_parameter", "top_k"),
        ({"temperature": 3}, 400, "invalid_value", "temperature"),
        ({"model": "gpt-4o-minni"}, 404, "model_not_found", None),
        ({"model": "gpt-5-mini"}, 400, "unsupported_parameter", "max_tokens"),
        ({"model": "o4-mini", "max_tokens": None, "temperature": 0}, 400, "unsupported_value", "temperature"),
        ({"response_format": FORMAT | {"type": "xml"}}, 400, "invalid_value", "response_format.type"),
    ],
)
async def test_what_the_api_does_not_take_is_refused_with_its_code(changes, status, code, param):
    (answer,) = await post(create_app(), make_body(**changes))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)


async def test_a_wrong_key_is_401():
    (answer,) = await post(create_app(), make_body(), key="sk-wrong")
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


async def test_the_score_is_a_function_of_the_response_and_repeats_are_counted():
    app = create_app()
    one, other, again = await post(
        app,
        make_body("What? Response: a", response_format=FORMAT),
        make_body("Who? Response: a", response_format=FORMAT),
        make_body("What? Response: a", response_format=FORMAT),
    )
    texts = [answer.json()["choices"][0]["message"]["content"] for answer in (one, other, again)]
    assert len(set(texts)) == 1
    counts = app.state.api.counts
    assert (counts["calls"], counts["answers"], counts["repeats"]) == (3, 3, 1)


@pytest.mark.parametrize(("size", "detail", "tokens"), [((64, 64), "low", 2833), ((64, 64), "high", 8500)])
async def test_an_image_is_billed_as_gpt_4o_mini_does(size, detail, tokens):
    (answer,) = await post(create_app(), make_body("", image_part(size, detail)))
    assert tokens < answer.json()["usage"]["prompt_tokens"] < tokens + 20


async def test_tokens_a_minute_are_a_bucket_that_refills():
    clock = Clock()
    app = create_app(Settings(tokens_per_min=6000), clock)
    body = make_body("", image_part())
    first, second, third = await post(app, body, body, body)
    assert [first.status_code, second.status_code, third.status_code] == [200, 200, 429]
    assert (first.headers["x-ratelimit-limit-tokens"], third.json()["error"]["code"]) == ("6000", "rate_limit_exceeded")
    assert first.headers["x-ratelimit-reset-tokens"] == "29s"
    clock.now += int(third.headers["retry-after"])
    (fourth,) = await post(app, body)
    assert fourth.status_code == 200


async def test_an_empty_purse_or_a_withdrawn_key_ends_all_answers():
    for fault, status, code in (("quota_after", 429, "insufficient_quota"), ("key_after", 401, "invalid_api_key")):
        answers = await post(create_app(Settings(faults={fault: 2})), *(make_body(seed=seed) for seed in range(4)))
        assert [answer.status_code for answer in answers] == [200, 200, status, status]
        assert answers[-1].json()["error"]["code"] == code


async def test_the_same_request_meets_the_same_fault():
    bodies = [make_body(seed=seed) for seed in range(60)]
    faults = {"refusal": 0.2, "flaky": 0.2, "filter_400": 0.2, "length": 0.2}
    app = create_app(Settings(faults=faults))
    first, second = await post(app, *bodies), await post(app, *bodies)
    kinds = [answer.status_code for answer in first]
    assert {200, 400, 503} == set(kinds)
    assert [answer.status_code for answer in second] == [200 if kind == 503 else kind for kind in kinds]
    refused = [a.json()["choices"][0]["message"]["refusal"] for a in second if a.status_code == 200]
    assert 3 <= sum(text is not None for text in refused) <= 24
