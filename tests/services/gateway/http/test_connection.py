"""Slow clients on real connections, and how an answer goes out on one."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.services.gateway.http.test_limits import Work
from vcot.services.gateway.http.connection import ClientConnection
from vcot.services.gateway.http.exchange import Exchange, exchange_of
from vcot.services.gateway.http.limits import Limits, Slots

HEAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n"


class Impatient(ClientConnection):
    max_request_s = 0.1
    max_stall_s = 0.1


@asynccontextmanager
async def listening(app: ASGIApp, connection: type[ClientConnection] = Impatient) -> AsyncIterator[int]:
    """The application on a real server and port."""
    config = uvicorn.Config(app, http=connection, ws="none", log_level="critical", access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await serving


class Watched:
    """The middleware before an application, with what became of its requests."""

    def __init__(self, app: ASGIApp, max_body_bytes: int = 100) -> None:
        self.slots = Slots(1, 1, 10**6)
        self.exchanges: list[Exchange] = []
        self.ended = asyncio.Event()
        self._limits = Limits(app, self.slots, max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.exchanges.append(exchange_of(scope))
        try:
            await self._limits(scope, receive, send)
        finally:
            self.ended.set()


def answering() -> Watched:
    work = Work()
    work.go.set()
    return Watched(work)


async def send(port: int, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """All that comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = asyncio.create_task(reader.read())
    for part in parts:
        if not reader.at_eof():
            writer.write(part)
        await asyncio.sleep(pause_s)
    async with asyncio.timeout(10):
        await answer
    writer.close()
    return answer.result()


@pytest.mark.parametrize(
    "parts", [(b"POST",), (HEAD[:-4],), (HEAD,), (HEAD + b"x" + HEAD[:-9],)], ids=["line", "headers", "body", "next"]
)
async def test_a_request_that_is_late_gets_408(parts: tuple[bytes, ...]) -> None:
    watched = answering()
    async with listening(watched) as port:
        answer = await send(port, *parts)
    head, _, body = answer.rpartition(b"\r\n\r\n")
    assert head.count(b"HTTP/1.1 408 Request Timeout") == 1
    assert b"connection: close" in head
    assert json.loads(body)["error"]["code"] == "request_timeout"
    assert watched.slots.places.taken == 0


async def test_one_byte_now_and_then_does_not_help() -> None:
    async with listening(answering()) as port:
        answer = await send(port, *[bytes([byte]) for byte in HEAD[:20]], pause_s=0.02)
    assert answer.startswith(b"HTTP/1.1 408")


LINE = b"POST / HTTP/1.1\r\nhost: x\r\n"
CHUNKED = LINE + b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        (LINE, *[b"x-a: " + b"a" * 9_000 + b"\r\n"] * 12),
        (LINE + b"x-a: ", *[b"a" * 60_000] * 6),
        (LINE + b"x-a: " + b"a" * 80_000,),
        (LINE + b"x-b: b\r\nx-a: " + b"a" * 80_000,),
        (b"POST /" + b"a" * 80_000,),
        (LINE + b"x-a: " + b"a" * 70_000 + b"\r\n\r\n",),
        (LINE + b"x-a: a\r\n" * 101 + b"\r\n",),
        (b"POST /", *[b"a" * 60_000] * 6),
        (CHUNKED + b"x-a: ", *[b"a" * 60_000] * 6),
    ],
    ids=[
        "many long fields",
        "one field",
        "one write",
        "one write, second field",
        "path in one write",
        "one field, whole",
        "many fields",
        "path",
        "trailer",
    ],
)
async def test_headers_without_end_get_431(parts: tuple[bytes, ...]) -> None:
    watched = answering()
    watched_app = watched if CHUNKED not in parts[0] else _never
    async with listening(watched_app, ClientConnection) as port:
        answer = await send(port, *parts, pause_s=0.01)
    assert answer.startswith(b"HTTP/1.1 431")
    assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"


async def _never(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.sleep(1)


async def test_many_small_chunks_are_no_headers() -> None:
    async with listening(Watched(Work(), max_body_bytes=100_000), ClientConnection) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(LINE + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(20):
            writer.write(b"1\r\nx\r\n" * 4_000)
            await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")
        with pytest.raises(TimeoutError):  # it waits for its turn, refused by nobody
            await asyncio.wait_for(reader.readline(), 0.3)
        writer.close()


async def test_a_trailer_is_no_header() -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        seen.extend(scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async with listening(app, ClientConnection) as port:
        answer = await send(port, CHUNKED + b"authorization: Bearer stolen\r\nconnection: close\r\n\r\n" + b"GET\0")
    assert answer.startswith(b"HTTP/1.1 200")
    assert [name for name, _ in seen] == [b"host", b"transfer-encoding"]


async def test_what_is_no_http_gets_400_in_openai_s_shape() -> None:
    async with listening(answering(), ClientConnection) as port:
        answer = await send(port, b"\x16\x03\x01 hello\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


async def test_a_late_body_is_logged_as_such() -> None:
    watched = answering()
    async with listening(watched) as port:
        await send(port, HEAD)
        await asyncio.wait_for(watched.ended.wait(), 10)
    (exchange,) = watched.exchanges
    assert (exchange.status, exchange.refused) == (408, "request_timeout")


async def test_a_connection_without_a_request_is_closed_without_an_answer() -> None:
    async with listening(answering()) as port:
        assert await send(port) == b""


async def test_a_long_answer_is_not_late() -> None:
    """The next request, half of which is there, waits as long as the answer takes."""
    work = Work()
    async with listening(Watched(work)) as port:
        sent = asyncio.create_task(send(port, HEAD + b"x" + HEAD[:-9]))
        await asyncio.sleep(0.3)
        work.go.set()
        answer = await sent
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"HTTP/1.1 408") == 1


async def test_an_answer_may_take_longer_than_a_request() -> None:
    work = Work()
    async with listening(Watched(work)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD + b"x")
        await asyncio.sleep(0.3)
        work.go.set()
        async with asyncio.timeout(10):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_requests_that_are_whole_in_time_are_answered() -> None:
    async with listening(answering(), ClientConnection) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for parts in ((HEAD + b"x",), (HEAD, b"x"), (HEAD[:9], HEAD[9:], b"x"), (HEAD + b"x" + HEAD + b"x",)):
            for part in parts:
                writer.write(part)
                await asyncio.sleep(0.01)
            for _ in range(b"".join(parts).count(b"POST")):
                async with asyncio.timeout(10):
                    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                    assert await reader.readuntil(b"0\r\n\r\n") == b"2\r\nok\r\n0\r\n\r\n"
        writer.close()


async def test_a_reader_that_stalls_is_cut_off() -> None:
    num_sent = 0

    async def pour(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal num_sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while num_sent < 100_000:
            await send({"type": "http.response.body", "body": b"x" * 1_000, "more_body": True})
            num_sent += 1

    watched = Watched(pour)
    async with listening(watched) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(HEAD + b"x")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        assert watched.slots.places.in_flight == 1
        assert num_sent < 50_000, "it waits for the client"
        await asyncio.wait_for(watched.ended.wait(), 10)
        assert watched.slots.places.taken == 0
        writer.transport.abort()


async def test_a_refused_body_is_answered() -> None:
    async with listening(answering()) as port:
        answer = await send(
            port, b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nff\r\n" + b"x" * 255
        )
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"408" not in answer


async def test_an_answers_head_and_body_go_out_together() -> None:
    async with listening(answering()) as port:
        loop = asyncio.get_running_loop()
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setblocking(False)
            await loop.sock_sendall(client, HEAD + b"x")
            first = await asyncio.wait_for(loop.sock_recv(client, 65536), 10)
    assert first.startswith(b"HTTP/1.1 200")
    assert first.endswith(b"ok\r\n0\r\n\r\n")
