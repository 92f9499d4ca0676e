"""The client on a real network: which way its requests go."""

import asyncio
import json
import socket
from contextlib import asynccontextmanager

import pytest

from vcot.pipeline.client import EXPECT_HEADER, ChatClient, find_proxy
from vcot.pipeline.errors import RequestError, WrongCheckpoint
from vcot.pipeline.records import SamplingParams

PARAMS = SamplingParams(temperature=0.0, max_tokens=8, seed=0)
CHOICE = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}
COMPLETION = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [CHOICE], "usage": None}


@asynccontextmanager
async def listening(answer=None):
    """A server that answers every request with a completion, or with those bytes, and the heads of what it was asked."""
    asked = []

    async def handle(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        asked.append(head.decode())
        body = json.dumps(COMPLETION).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n"
        writer.write(head + b"content-length: %d\r\n\r\n" % len(body) + body if answer is None else answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], asked


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name.upper()}_PROXY", raising=False)


async def ask(url, expect=None, **options):
    async with ChatClient(url, "key", max_connections=1, **options) as client:
        return await client.complete("m", [{"role": "user", "content": "?"}], PARAMS, expect=expect)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
async def test_this_machine_and_the_run_s_own_gateway_are_asked_directly(monkeypatch, variable):
    async with listening() as (proxy, through_proxy), listening() as (server, asked):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy}")
        await ask(f"http://127.0.0.1:{server}/v1")
        await ask(f"http://localhost:{server}/v1")
        assert len(asked) == 2
        assert not through_proxy
        with pytest.raises(RequestError, match="no answer"):
            await ask("http://gateway.invalid/v1", is_own=True)
        assert not through_proxy


async def test_a_judge_elsewhere_is_asked_through_the_proxy(monkeypatch):
    async with listening() as (proxy, through_proxy):
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy}")
        await ask("http://judge.invalid/v1")
        assert [head.partition("\r\n")[0] for head in through_proxy] == [
            "POST http://judge.invalid/v1/chat/completions HTTP/1.1"
        ]
    with pytest.raises(
        RequestError, match=r"no answer from http://judge.invalid/v1/, asked through the proxy of HTTP_PROXY"
    ):
        await ask("http://judge.invalid/v1")


def test_no_proxy_is_heeded(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid")
    assert find_proxy("https://api.openai.com/v1") == "HTTPS_PROXY"
    assert find_proxy("http://api.openai.com/v1") is None
    monkeypatch.setenv("NO_PROXY", "openai.com")
    assert find_proxy("https://api.openai.com/v1") is None


def test_what_does_not_leave_this_machine_goes_around_a_proxy(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "http://proxy.invalid")
    own = ("127.0.0.1", "127.8.8.8", "127.1", "[::1]", "[::ffff:127.0.0.1]", "localhost", "LOCALHOST.", "a.localhost")
    for host in (*own, "0.0.0.0", "[::]", socket.gethostname()):
        assert find_proxy(f"http://{host}:8000/v1") is None, host
    for host in ("10.0.0.1", "localhost.example", "127.example", "128.1"):
        assert find_proxy(f"http://{host}:8000/v1") == "ALL_PROXY", host


async def test_a_request_bears_the_key_the_account_and_the_weights_that_are_expected(monkeypatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    async with listening() as (port, asked):
        with pytest.raises(WrongCheckpoint, match="not at all"):
            await ask(f"http://127.0.0.1:{port}/v1", expect="sha256:1")
    sent = dict(line.lower().split(": ", 1) for line in asked[0].split("\r\n")[1:] if line)
    assert (sent["authorization"], sent["openai-organization"], sent[EXPECT_HEADER]) == (
        "bearer key",
        "org-1",
        "sha256:1",
    )
    assert sent["content-type"] == "application/json"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"no HTTP at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nbad header\x00: 1\r\n\r\n",
    ],
)
async def test_what_breaks_off_or_is_no_http_is_a_fault_of_the_attempt(answer):
    async with listening(answer) as (port, _):
        with pytest.raises(RequestError, match=f"no answer from http://127.0.0.1:{port}/v1/: ") as raised:
            await ask(f"http://127.0.0.1:{port}/v1")
    assert (raised.value.scope, raised.value.reason) == ("attempt", "connection")
