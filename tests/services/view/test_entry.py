"""Who may enter the viewer: the link's holder, from this machine, and nobody by way of another page."""

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from vcot.services.view.entry import POLICY, Doorkeeper

TOKEN = "a-long-token"


def make_client(host="127.0.0.1:8400"):
    async def page(request):
        return PlainTextResponse(f"inside {request.query_params}")

    routes = [Route("/{rest:path}", page, methods=["GET", "POST"])]
    app = Starlette(routes=routes, middleware=[Middleware(Doorkeeper, token=TOKEN)])
    return TestClient(app, base_url=f"http://{host}", follow_redirects=False)


def test_the_link_lets_in_and_no_later_address_shows_the_token():
    client = make_client()
    assert client.get("/runs/0/").status_code == 403
    first = client.get("/runs/0/", params={"page": "2", "token": TOKEN})
    assert (first.status_code, first.headers["location"]) == (303, "/runs/0/?page=2")
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert client.get("/runs/0/?page=2").text == "inside page=2"


@pytest.mark.parametrize("token", ["", "a-long-toke", "a-long-token2", "é", "A-LONG-TOKEN"])
def test_no_other_token_does(token):
    client = make_client()
    assert client.get("/", params={"token": token}).status_code == 403
    client.cookies.set("vcot-view-8400", token.encode().decode("latin-1") if token.isascii() else "x")
    assert client.get("/").status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:9", "localhost:8888", "[::1]:8400", "localhost"])
def test_it_answers_by_every_name_of_this_machine(host):
    client = make_client()
    answer = client.get("/", params={"token": TOKEN}, headers={"host": host})
    assert answer.status_code == 303


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8400",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "",
        "127.0.0.1:x",
        "127.0.0.2",
    ],
)
def test_a_name_of_the_web_that_means_this_machine_is_turned_away(host):
    """DNS rebinding: the browser would send the cookie's rightful token to whom the name belongs."""
    client = make_client()
    client.get("/", params={"token": TOKEN})
    answer = client.get("/", headers={"host": host})
    assert (answer.status_code, "this machine only" in answer.text) == (403, True)
    assert client.get("/", params={"token": TOKEN}, headers={"host": host}).status_code == 403


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8400", 200),
        ("http://evil.example", 403),
        ("null", 403),
        ("http://127.0.0.1:9", 403),
        (None, 403),
    ],
)
def test_what_changes_something_comes_from_a_page_of_the_viewer(origin, status):
    client = make_client()
    client.get("/", params={"token": TOKEN})
    assert client.post("/", headers={"origin": origin} if origin else {}).status_code == status
    assert make_client().post("/", params={"token": TOKEN}).status_code == 403


def test_a_path_that_begins_with_two_slashes_leads_nowhere_else():
    answer = make_client().get("http://127.0.0.1:8400//evil.example/x", params={"token": TOKEN})
    assert answer.headers.get("location", "/").startswith("/")
    assert not answer.headers.get("location", "/").startswith("//")


@pytest.mark.parametrize("path", ["/", "/?token=wrong"])
def test_every_answer_forbids_what_is_not_the_viewers(path):
    headers = make_client().get(path).headers
    assert headers["content-security-policy"] == POLICY
    assert "unsafe" not in POLICY
    assert "script-src 'self'" in POLICY
    assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
