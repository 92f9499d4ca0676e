"""The load generator and the instant upstreams of bench/gateway.py: HTTP/1.1 on asyncio protocols, parsed by httptools.

Model: a connection sends the same bytes again as soon as its answer is whole, for a set time; what is counted is whole
answers with status 200, and each one's latency. The upstream answers every request with the same chat completion as soon
as the body is whole, without looking into it; one that came without its image is 400. It comes twice: `aiohttp`, a web
server as people write them, and `bare`, which costs next to nothing, so that a proxy's own cost stands out.

Both run on uvloop, which sets TCP_NODELAY on every connection (asyncio does so only where the socket's protocol number says
TCP, which it does not for a listener made by hand).

Limits: Python, so that the generator takes more of a core than wrk would, for every target alike; it shares the machine
with what it measures.
"""

from __future__ import annotations

import asyncio
import secrets
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import cast

import httptools
import orjson
import uvloop
from aiohttp import web

COMPLETION = orjson.dumps(
    {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "vcot",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "The answer is (A)."}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 600, "completion_tokens": 6, "total_tokens": 606},
    }
)
MIN_BODY_BYTES = 100_000
KEY = "sk-" + secrets.token_hex(32)
"""Sent to every target; LiteLLM does not start without one."""
MODELS = orjson.dumps({"object": "list", "data": [{"id": "vcot", "object": "model", "owned_by": "bench"}]})


@dataclass
class Measured:
    """What one target did in one window."""

    latencies_s: list[float] = field(default_factory=list)
    elapsed_s: float = 0.0
    num_failed: int = 0

    @property
    def requests_per_s(self) -> float:
        """Whole good answers, per second."""
        return len(self.latencies_s) / self.elapsed_s

    @property
    def median_ms(self) -> float:
        """Median latency."""
        return 1e3 * statistics.median(self.latencies_s)


class _Asker(asyncio.Protocol):
    """One connection that asks again and again until it is told to stop."""

    def __init__(self, request: bytes, into: Measured) -> None:
        self.into = into
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_stopped = False
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        self._ask()

    def _ask(self) -> None:
        assert self._transport is not None
        self._sent = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() == 200:
            self.into.latencies_s.append(time.perf_counter() - self._sent)
        else:
            self.into.num_failed += 1
        if self.is_stopped:
            self._finish()
        else:
            self._parser = httptools.HttpResponseParser(self)
            asyncio.get_running_loop().call_soon(self._ask)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.into.num_failed += 1
            self.done.set_result(None)

    def _finish(self) -> None:
        assert self._transport is not None
        if not self.done.done():
            self.done.set_result(None)
        self._transport.close()


_TELL, _ASK = b"/update_weight_version", b"/weight_info"
_VERSION = {"weight_version": "default"}
"""What the instant upstream was told that it holds."""


class Upstream(asyncio.Protocol):
    """One connection of the instant upstream; `held` is what that upstream was told that it holds."""

    def __init__(self, held: dict[str, str] = _VERSION) -> None:
        self._held = held
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._path = b""
        self._num_bytes = 0
        self._told = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._path, self._num_bytes, self._told = b"", 0, b""

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_body(self, body: bytes) -> None:
        self._num_bytes += len(body)
        if self._path == _TELL:
            self._told += body

    def on_message_complete(self) -> None:
        assert self._transport is not None
        self._transport.write(self._answer())

    def _answer(self) -> bytes:
        if self._path == _TELL:
            self._held["weight_version"] = orjson.loads(self._told)["new_version"]
        if self._path == _ASK:
            return make_response(orjson.dumps(self._held))
        if self._parser.get_method() == b"GET":
            return _LIST
        if not self._path.startswith(b"/v1/chat/completions"):
            return _SUCCESS  # the development calls that vcot's gateway makes at its start
        return _CHAT if self._num_bytes >= MIN_BODY_BYTES else _TOO_SMALL


def make_response(body: bytes, status: bytes = b"200 OK") -> bytes:
    """An answer's bytes on the wire."""
    head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(body)) + body


_CHAT, _LIST, _SUCCESS = make_response(COMPLETION), make_response(MODELS), make_response(b'{"success": true}')
_TOO_SMALL = make_response(b'{"error": {"message": "the image was lost on the way"}}', b"400 Bad Request")


def http_request(port: int, body: bytes) -> bytes:
    """A chat completion's bytes on the wire."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nauthorization: Bearer {KEY}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def measure(port: int, body: bytes, connections: int, seconds: float, warm_s: float) -> Measured:
    """Ask through that many connections for `seconds`, after `warm_s` that are not counted."""
    loop, warming, measured = asyncio.get_running_loop(), Measured(), Measured()
    request = http_request(port, body)
    askers = [
        (await loop.create_connection(lambda: _Asker(request, warming), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    await asyncio.sleep(warm_s)
    for asker in askers:
        asker.into = measured
    began = time.perf_counter()
    await asyncio.sleep(seconds)
    measured.elapsed_s = time.perf_counter() - began
    for asker in askers:
        asker.into = Measured()  # what ends later is not counted, as what began earlier was
        asker.is_stopped = True
    await asyncio.wait([asker.done for asker in askers], timeout=30)
    return measured


async def serve_aiohttp(port: int) -> None:
    """Answer until killed, as an aiohttp application."""

    async def chat(request: web.Request) -> web.Response:
        is_whole = len(await request.read()) >= MIN_BODY_BYTES
        return web.Response(body=COMPLETION, content_type="application/json", status=200 if is_whole else 400)

    async def other(_: web.Request) -> web.Response:
        return web.Response(body=b'{"success": true}', content_type="application/json")

    async def models(_: web.Request) -> web.Response:
        return web.Response(body=MODELS, content_type="application/json")

    async def tell(request: web.Request) -> web.Response:
        _VERSION["weight_version"] = (await request.json())["new_version"]
        return await other(request)

    async def ask(_: web.Request) -> web.Response:
        return web.json_response(_VERSION)

    app = web.Application(client_max_size=2**24)
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_post(_TELL.decode(), tell)
    app.router.add_get(_ASK.decode(), ask)
    app.router.add_post("/{tail:.*}", other)
    app.router.add_get("/{tail:.*}", models)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    await asyncio.Event().wait()


async def serve_bare(port: int) -> None:
    """Answer until killed, with a protocol of our own."""
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run({"aiohttp": serve_aiohttp, "bare": serve_bare}[sys.argv[1]](int(sys.argv[2])))
