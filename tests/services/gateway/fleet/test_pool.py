"""The pool before servers that answer in every way they should not."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcot.services.engine.vllm import Endpoint
from vcot.services.gateway.fleet.pool import HIGH_WATER, Answer, LostError, Pool

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\ncontent-length: 2\r\n\r\n{}"


class Server:
    """A server whose every connection is `handle`d."""

    def __init__(self, handle: Handler) -> None:
        self.url = ""
        self.num_connections = 0
        self.received: list[bytes] = []
        self.closed = asyncio.Event()
        self._handle = handle

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            await self._handle(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.closed.set()
            writer.close()


@asynccontextmanager
async def served(handle: Handler, **patience_s: float) -> AsyncIterator[tuple[Server, Pool]]:
    server = Server(handle)
    listening = await asyncio.start_server(server, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    pool = Pool(Endpoint(server.url), **patience_s)
    try:
        yield server, pool
    finally:
        pool.abort()
        listening.close()  # and nothing waits for its connections, as `async with` does from Python 3.12 on
        await asyncio.sleep(0.01)


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head + await reader.readexactly(size)


def answering(*answers: bytes) -> Handler:
    """Each request gets the next answer, the last one for ever."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = list(answers)
        while True:
            await read_request(reader)
            writer.write(left.pop(0) if len(left) > 1 else left[0])

    return handle


async def ask(pool: Pool, body: bytes = b"{}") -> tuple[int, bytes]:
    async with asyncio.timeout(5), pool.post("/v1/x", body, {}) as answer:
        return answer.status, await answer.read()


async def test_a_request_is_on_the_wire_as_it_was_given(tmp_path: Path) -> None:
    received: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await read_request(reader))
        writer.write(OK)

    path = tmp_path / "s"
    async with await asyncio.start_unix_server(Server(handle), path):
        pool = Pool(Endpoint("http://vllm", path))
        async with pool.post("/v1/x", b"[1]", {"x-request-id": "a-1", "x-more": "b"}) as answer:
            assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
            assert await answer.read() == b"{}"
        pool.abort()
        await asyncio.sleep(0.01)
    headers = b"host: vllm\r\nx-request-id: a-1\r\nx-more: b\r\ncontent-length: 3"
    assert received == [b"POST /v1/x HTTP/1.1\r\n" + headers + b"\r\n\r\n[1]"]


async def test_a_connection_is_used_again() -> None:
    async with served(answering(OK)) as (server, pool):
        assert [await ask(pool) for _ in range(3)] == [(200, b"{}")] * 3
        assert server.num_connections == 1


async def test_requests_at_once_have_connections_of_their_own() -> None:
    async with served(answering(OK)) as (server, pool):
        assert await asyncio.gather(*[ask(pool) for _ in range(5)]) == [(200, b"{}")] * 5
        assert server.num_connections == 5


async def test_an_answer_may_come_in_any_pieces() -> None:
    chunked = b"HTTP/1.1 201 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nabcd\r\n2\r\nef\r\n0\r\n\r\n"

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for byte in chunked:
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        await read_request(reader)
        writer.write(OK)

    async with served(drip) as (server, pool):
        assert await ask(pool) == (201, b"abcdef")
        assert await ask(pool) == (200, b"{}")
        assert server.num_connections == 1


async def test_an_answer_of_1xx_only_announces_the_answer() -> None:
    async with served(answering(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK)) as (server, pool):
        async with pool.post("/v1/x", b"{}", {}) as answer:
            assert (answer.status, await answer.read(), "link" in answer.headers) == (200, b"{}", False)
        assert await ask(pool) == (200, b"{}")
        assert server.num_connections == 1


async def test_a_connection_that_was_idle_too_long_is_not_used() -> None:
    async with served(answering(OK), keep_alive_s=0.0) as (server, pool):
        await ask(pool)
        await asyncio.sleep(0.01)
        await ask(pool)
        assert server.num_connections == 2


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nconnection: close", b"HTTP/1.0 200 OK"])
async def test_a_connection_that_is_to_close_is_not_used(head: bytes) -> None:
    async with served(answering(head + b"\r\ncontent-length: 2\r\n\r\n{}")) as (server, pool):
        assert [await ask(pool) for _ in range(2)] == [(200, b"{}")] * 2
        assert server.num_connections == 2


async def test_a_connection_that_the_server_closed_meanwhile_is_not_used() -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK)

    async with served(once) as (server, pool):
        await ask(pool)
        await asyncio.sleep(0.01)
        assert await ask(pool) == (200, b"{}")
        assert server.num_connections == 2


@pytest.mark.parametrize("num_before", [0, 1])
async def test_a_request_that_a_used_connection_loses_is_sent_once_more(num_before: int) -> None:
    async def answer_so_many(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(num_before if server.num_connections == 1 else 2):
            await read_request(reader)
            writer.write(OK)
        await read_request(reader)

    async with served(answer_so_many) as (server, pool):
        for _ in range(num_before):
            await ask(pool)
        if num_before:
            assert await ask(pool) == (200, b"{}")
            assert server.num_connections == 2
        else:
            with pytest.raises(LostError, match="closed before the answer's end"):
                await ask(pool)
            assert server.num_connections == 1, "what a new connection loses, the server may have done"


async def test_a_connection_that_is_lost_before_anything_is_asked_is_no_wait() -> None:
    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pass

    async with served(refuse) as (server, pool), asyncio.timeout(5):
        connection = await pool.connect()
        await server.closed.wait()
        await asyncio.sleep(0.01)
        with pytest.raises(LostError, match="closed before the answer's end"):
            await connection.ask(b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n", b"")


async def test_a_server_that_speaks_first_is_asked_nothing_more_on_that_connection() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(WRONG)
        while True:
            await read_request(reader)
            writer.write(OK)

    async with served(greet) as (_, pool), asyncio.timeout(5):
        connection = await pool.connect()
        await asyncio.sleep(0.01)
        answer = await connection.ask(b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n", b"")
        assert (answer.status, await answer.read()) == (200, b"{}")
        assert not connection.is_reusable


@pytest.mark.parametrize("status", [500, 503])
async def test_a_connection_on_which_the_server_failed_is_not_used_again(status: int) -> None:
    """vLLM closes it unannounced, under whoever is next."""
    async with served(answering(OK.replace(b"200 OK", b"%d No" % status))) as (server, pool):
        assert [await ask(pool) for _ in range(2)] == [(status, b"{}")] * 2
        assert server.num_connections == 2


async def test_a_header_may_hold_any_byte() -> None:
    ok = OK.replace(b"application/json", b"caf\xe9")
    async with served(answering(ok)) as (_, pool), pool.post("/v1/x", b"{}", {}) as answer:
        assert answer.headers["content-type"] == "caf\xe9"


WRONG = OK.replace(b"{}", b"[]").replace(b"200 OK", b"500 No")


@pytest.mark.parametrize("answers", [(OK + WRONG, OK), (OK + b"x", OK)], ids=["an answer more", "a byte more"])
async def test_what_comes_behind_an_answer_never_answers_the_next_request(answers: tuple[bytes, ...]) -> None:
    async with served(answering(*answers)) as (server, pool):
        assert [await ask(pool) for _ in range(2)] == [(200, b"{}")] * 2
        assert server.num_connections == 2


async def test_what_comes_while_nothing_is_asked_never_answers_the_next_request() -> None:
    async def eager(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK)
        await asyncio.sleep(0.01)
        writer.write(WRONG)
        await read_request(reader)
        writer.write(WRONG)

    async with served(eager) as (server, pool):
        assert await ask(pool) == (200, b"{}")
        await asyncio.sleep(0.03)
        assert await ask(pool) == (200, b"{}")
        assert server.num_connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nuntil the end",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_an_answer_that_breaks_off_is_lost(answer: bytes) -> None:
    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer)

    async with served(broken) as (_, pool):
        with pytest.raises(LostError, match=r"is not HTTP \(|closed before the answer's end"):
            await ask(pool)


async def test_what_is_no_http_is_called_so() -> None:
    async with served(answering(b"SSH-2.0-OpenSSH\r\n")) as (_, pool):
        with pytest.raises(LostError, match=r"^the answer is not HTTP \("):
            await ask(pool)


async def test_what_came_whole_is_read_though_the_server_is_gone() -> None:
    """An answer that waits to be taken is here, not in the socket, which a reset empties."""

    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for piece in (b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nab", b"cd"):
            writer.write(piece)
            await asyncio.sleep(0.01)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async with served(reset) as (server, pool), pool.post("/v1/x", b"{}", {}) as answer:
        await server.closed.wait()
        await asyncio.sleep(0.01)
        assert await answer.read() == b"abcd"


async def test_what_came_before_a_break_is_given_first() -> None:
    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")

    async with served(broken) as (_, pool), pool.post("/v1/x", b"{}", {}) as answer:
        parts = answer.parts()
        assert await anext(parts) == b"half"
        with pytest.raises(LostError):
            await anext(parts)


async def test_where_nothing_listens_a_request_is_lost(tmp_path: Path) -> None:
    async with await asyncio.start_server(Server(answering(OK)), "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
    for endpoint in (Endpoint(f"http://127.0.0.1:{port}"), Endpoint("http://vllm", tmp_path / "none")):
        with pytest.raises(LostError, match="no connection") as caught:
            await ask(Pool(endpoint))
        assert not caught.value.was_sent


async def test_what_a_used_connection_lost_was_sent_though_nothing_listens_any_more() -> None:
    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK)
        await read_request(reader)
        listening.close()

    async with await asyncio.start_server(Server(answer_once), "127.0.0.1", 0) as listening:
        pool = Pool(Endpoint(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"))
        await ask(pool)
        with pytest.raises(LostError, match="no connection") as caught:
            await ask(pool)
        assert caught.value.was_sent
        pool.abort()


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("http://vllm", ("vllm", 80, None)),
        ("https://vllm", ("vllm", 443, True)),
        ("https://vllm:8443", ("vllm", 8443, True)),
        ("http://[::1]:8000", ("::1", 8000, None)),
    ],
)
async def test_it_connects_where_the_address_says(
    monkeypatch: pytest.MonkeyPatch, url: str, place: tuple[str, int, bool | None]
) -> None:
    asked = []

    async def refuse(protocol: object, host: str, port: int, ssl: bool | None) -> None:
        asked.append((host, port, ssl))
        raise OSError("refused")

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", refuse)
    with pytest.raises(LostError, match=r"no connection \(refused\)"):
        await ask(Pool(Endpoint(url)))
    assert asked == [place]


async def test_a_server_that_takes_no_connection_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", hang)
    with pytest.raises(LostError, match="no connection within"):
        await ask(Pool(Endpoint("http://vllm"), connect_timeout_s=0.01))


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"])
async def test_who_stops_waiting_closes_the_connection(head: bytes) -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(head)
        await reader.read()

    async with served(hang) as (server, pool):
        asked = asyncio.create_task(ask(pool))
        await asyncio.sleep(0.02)
        asked.cancel()
        await asyncio.wait_for(server.closed.wait(), 5)
        with pytest.raises(asyncio.CancelledError):
            await asked


async def test_an_answer_that_is_not_taken_makes_the_server_wait() -> None:
    size, num_written = 32 * 2**20, 0

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_written
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        while num_written < size:
            writer.write(b"x" * 2**16)
            num_written += 2**16
            await writer.drain()

    async with served(pour) as (_, pool), pool.post("/v1/x", b"{}", {}) as answer:
        await asyncio.sleep(0.2)
        assert num_written < size // 2
        async with asyncio.timeout(20):
            taken = len(await anext(answer.parts()))
            await asyncio.sleep(0.2)
            assert num_written < size // 2, "also after it was let go on once"
            assert taken + len(await answer.read()) == size


@pytest.mark.parametrize("size", [HIGH_WATER - 1, HIGH_WATER + 1, 4 * HIGH_WATER])
async def test_a_large_answer_leaves_the_connection_reading(size: int) -> None:
    large = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size
    async with served(answering(large, OK)) as (server, pool):
        assert await ask(pool) == (200, b"x" * size)
        assert await ask(pool) == (200, b"{}")
        assert server.num_connections == 1


async def test_a_reader_that_falls_behind_gets_the_rest() -> None:
    size = 8 * HIGH_WATER
    large = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size
    async with served(answering(large)) as (_, pool), pool.post("/v1/x", b"{}", {}) as answer:
        received = 0
        async with asyncio.timeout(10):
            async for part in answer.parts():
                received += len(part)
                await asyncio.sleep(0.05)
        assert received == size


async def test_a_trailer_is_no_header() -> None:
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-vcot-digest: b\r\n\r\n"
    async with served(answering(chunked)) as (_, pool), pool.post("/v1/x", b"{}", {}) as answer:
        assert await answer.read() == b"a"
        assert "x-vcot-digest" not in answer.headers


@dataclass(frozen=True)
class Planned:
    """An answer as the server is to give it, and how its reader takes it."""

    size: int
    chunk: int
    """Bytes of each write; and of each chunk, where it is in chunks."""
    in_chunks: bool
    closes: bool
    taken: Literal["whole", "in parts", "left early"]
    status: int = 200
    num_hints: int = 0
    """Answers of 1xx before it."""
    extension: bytes = b""
    """Of each chunk."""
    trailer: bytes = b""
    behind: bytes = b""
    """Bytes that nobody asked for, behind the end."""

    @property
    def has_body(self) -> bool:
        return self.status not in (204, 304)

    @property
    def ends_its_connection(self) -> bool:
        is_told = self.closes or self.status >= 500 or (self.in_chunks and self.has_body and bool(self.trailer))
        return is_told or self.taken == "left early" or bool(self.behind)

    def pieces(self) -> Iterator[bytes]:
        closing = b"Connection: Close\r\n" if self.closes else b""
        yield b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * self.num_hints
        yield b"HTTP/1.1 %d OK\r\n" % self.status + closing
        if not self.has_body:
            yield b"\r\n" + self.behind
            return
        yield (b"TRANSFER-ENCODING: Chunked" if self.in_chunks else b"Content-Length: %d" % self.size) + b"\r\n\r\n"
        body = self.body
        for start in range(0, self.size, self.chunk):
            part = body[start : start + self.chunk]
            yield b"%x%b\r\n%b\r\n" % (len(part), self.extension, part) if self.in_chunks else part
        if self.in_chunks:
            yield b"0\r\n" + self.trailer + b"\r\n"
        yield self.behind

    @property
    def body(self) -> bytes:
        return bytes(range(256)) * (self.size // 256) + b"z" * (self.size % 256)


planned = st.builds(
    Planned,
    size=st.sampled_from([0, 1, 300, 65_536, HIGH_WATER - 1, HIGH_WATER, HIGH_WATER + 1, 3 * HIGH_WATER]),
    chunk=st.sampled_from([700, 65_536, HIGH_WATER + 1, 10**6]),
    in_chunks=st.booleans(),
    closes=st.booleans(),
    taken=st.sampled_from(["whole", "in parts", "left early"]),
    status=st.sampled_from([200, 200, 204, 304, 422, 500]),
    num_hints=st.integers(0, 2),
    extension=st.sampled_from([b"", b';name="a;b"']),
    trailer=st.sampled_from([b"", b"x-vcot-digest: b\r\n", b"connection: close\r\n"]),
    behind=st.sampled_from([b"", b"", b"x", b"\r\n", OK]),
)


@settings(max_examples=60)
@given(st.lists(planned, min_size=1, max_size=6))
def test_any_sequence_of_answers_is_read_as_another_client_reads_it(plan: list[Planned]) -> None:
    asyncio.run(_compare(plan))


async def _compare(plan: list[Planned]) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            asked = plan[int((await read_request(reader)).partition(b"\r\n\r\n")[2])]
            for piece in asked.pieces():
                writer.write(piece)
                await writer.drain()
            if asked.closes:
                return

    unshared = httpx.Limits(max_keepalive_connections=0)  # so that what stands behind an answer is dropped
    async with served(handle) as (server, pool), httpx.AsyncClient(trust_env=False, limits=unshared) as client:
        for number, asked in enumerate(plan):
            async with asyncio.timeout(10), pool.post("/v1/x", b"%d" % number, {}) as answer:
                body = await _take(answer, asked)
            reference = await client.post(f"{server.url}/v1/x", content=b"%d" % number)
            assert (answer.status, body) == (reference.status_code, reference.content[: len(body)])
            assert "x-vcot-digest" not in answer.headers
            assert asked.taken == "left early" or len(body) == len(reference.content)
        num_ended = sum(asked.ends_its_connection for asked in plan[:-1])
        assert server.num_connections - len(plan) <= 1 + num_ended


async def _take(answer: Answer, asked: Planned) -> bytes:
    if asked.taken == "whole":
        return await answer.read()
    body = b""
    async for part in answer.parts():
        body += part
        if asked.taken == "left early":
            break
    return body


async def test_who_waits_for_a_server_that_is_gone_is_told(tmp_path: Path) -> None:
    """Whether the head, the body or a part of a stream is awaited; and nothing more is asked there."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"head" not in await read_request(reader):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nx")
        await reader.read()  # until the client is gone

    async with served(silent) as (_, pool):

        async def ask_for(what: bytes) -> None:
            async with pool.post("/v1/x", what, {}) as answer:
                if what == b"body":
                    await answer.read()
                async for _ in answer.parts():
                    pass

        asked = [asyncio.create_task(ask_for(what)) for what in (b"head", b"body", b"parts")]
        await asyncio.sleep(0.1)
        pool.abort()
        async with asyncio.timeout(5):
            found = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(each) for each in found] == [LostError] * 3
        with pytest.raises(LostError, match="the server is gone"):
            await ask_for(b"head")
