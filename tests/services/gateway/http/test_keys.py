"""Who may ask, and with which key."""

import json
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from tests.services.bench_fleet import ASK, Bench
from vcot.services.gateway.http.keys import is_bearer, is_local, warnings
from vcot.services.gateway.http.server import quiet_config

STRANGER = "192.0.2.7"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_this_machine_is_local(host: str) -> None:
    assert is_local((host, 1))
    assert is_local(None)


@pytest.mark.parametrize("host", [STRANGER, "10.0.0.1", "::ffff:192.0.2.7", "fe80::1", "localhost", "testclient", ""])
def test_any_other_is_not(host: str) -> None:
    assert not is_local((host, 1))


def test_a_gateway_for_others_says_which_key_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCOT_ADMIN_KEY", "secret")
    assert warnings("127.0.0.1") == []
    assert warnings("0.0.0.0") == ["no VCOT_API_KEYS is set, so only this machine may ask"]
    monkeypatch.setenv("VCOT_API_KEYS", "k")
    assert warnings("::") == []
    monkeypatch.delenv("VCOT_ADMIN_KEY")
    assert "VCOT_ADMIN_KEY" in warnings("192.0.2.7")[0]


def test_a_bearer_has_a_whole_key() -> None:
    keys = ["alpha", "schlüssel"]
    assert is_bearer("Bearer alpha", keys)
    assert is_bearer("bearer  schlüssel".encode().decode("latin-1"), keys)  # as ASGI gives a header
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "alpha",
        "Basic alpha",
        "Bearer alph",
        "Bearer alphaa",
        "Bearer Alpha",
    ):
        assert not is_bearer(wrong, keys), wrong


def ask(client: httpx.AsyncClient, key: str | None = None) -> httpx.Request:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return client.build_request("POST", "/v1/chat/completions", json=ASK, headers=headers)


async def test_inference_without_keys_is_for_this_machine(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with bench.running(), bench.client(STRANGER) as stranger:
        assert (await bench.http.send(ask(bench.http))).status_code == 200
        refused = await stranger.send(ask(stranger))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "local_only")
        assert "VCOT_API_KEYS" in refused.json()["error"]["message"]
        assert (await stranger.get("/v1/models")).status_code == 403
        assert (await stranger.get("/health")).status_code == 200


async def test_inference_with_keys_is_for_their_bearers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCOT_API_KEYS", "one, two,")
    monkeypatch.setenv("VCOT_ADMIN_KEY", "root")
    bench = Bench(tmp_path)
    async with bench.running(), bench.client(STRANGER) as stranger:
        for key in ("one", "two"):
            assert (await stranger.send(ask(stranger, key))).status_code == 200
        for key in (None, "three", "one, two,", "root", ","):
            refused = await bench.http.send(ask(bench.http, key))
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key"), key
            assert refused.headers["www-authenticate"] == "Bearer"
        assert (await stranger.get("/admin/state", headers={"authorization": "Bearer one"})).status_code == 401
        assert (await stranger.get("/admin/state", headers={"authorization": "Bearer root"})).status_code == 200


async def test_a_variable_that_holds_no_key_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCOT_API_KEYS", " , ")
    bench = Bench(tmp_path)
    async with bench.running(), bench.client(STRANGER) as stranger:
        assert (await stranger.send(ask(stranger))).status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8100"}, 200),
        ({"host": "[::1]:8100"}, 200),
        ({"origin": "http://localhost:3000"}, 200),
        ({"host": "evil.example:8100"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "[evil"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 200),
    ],
)
async def test_no_web_page_is_obeyed_without_a_key(tmp_path: Path, headers: dict[str, str], status: int) -> None:
    bench = Bench(tmp_path)
    async with bench.running():
        own = {"content-type": "application/json", **headers}
        asked = await bench.http.post("/v1/chat/completions", content=json.dumps(ASK), headers=own)
        swapped = await bench.http.post(
            "/admin/swap", content=json.dumps({"alias": "policy", "checkpoint": "base"}), headers=own
        )
        assert (asked.status_code, swapped.status_code) == (status, status)


async def test_a_bearer_may_come_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCOT_API_KEYS", "one")
    bench = Bench(tmp_path)
    async with bench.running():
        headers = {"host": "models.example", "origin": "https://app.example", "authorization": "Bearer one"}
        answer = await bench.http.post("/v1/chat/completions", json=ASK, headers=headers)
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("peer", "forwarded", "seen"),
    [
        ("127.0.0.1", STRANGER, STRANGER),
        ("::1", STRANGER, STRANGER),
        ("::1", f"127.0.0.1, {STRANGER}", STRANGER),
        (STRANGER, "127.0.0.1", STRANGER),
    ],
)
async def test_no_stranger_comes_from_this_machine_by_a_header(
    monkeypatch: pytest.MonkeyPatch, peer: str, forwarded: str, seen: str
) -> None:
    """Neither through a proxy of this machine, nor where the environment has uvicorn believe everybody."""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    clients = []

    async def app(scope: Scope, _: Receive, __: Send) -> None:
        clients.append(scope["client"][0])

    config = quiet_config(app)
    config.load()
    headers = [(b"x-forwarded-for", forwarded.encode())]
    scope = {"type": "http", "client": (peer, 1), "scheme": "http", "headers": headers, "path": "/", "method": "GET"}
    await config.loaded_app(scope, lambda: None, lambda _: None)
    assert clients == [seen]
