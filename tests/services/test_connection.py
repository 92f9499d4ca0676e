"""Slow clients on real connections, and how an answer goes out on one."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.connection import ClientConnection
from services.gateway.exchange import Exchange, exchange_of
from services.gateway.limits import Limits, Slots
from tests.services.test_limits import Work

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

    def __init__(self, app: ASGIApp) -> None:
        self.slots = Slots(1, 1)
        self.exchanges: list[Exchange] = []
        self.ended = asyncio.Event()
        self._limits = Limits(app, self.slots, 100)

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
