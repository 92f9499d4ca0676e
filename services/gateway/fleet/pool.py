"""Connections to one server, for what every image passes: HTTP/1.1 on asyncio protocols, parsed by httptools.

Own code, because the client is the largest cost of a pass-through: aiohttp's takes more CPU for a 100 KB body than all
else that the gateway does with it, httpx's several times that (docs/lab-notes.md, "What a request costs the gateway").
It does what the gateway needs and no more: POST with a body that is there, an answer with a length or in chunks, one
request at a time on a connection, connections used again while they are fresh.

An answer belongs to the request that was sent last, or to none: bytes that come when nothing was asked, or behind the end
of an answer, close the connection, so that they can never answer the next request. Whoever stops reading early closes it,
too, which tells the server to stop its work. A connection on which 5xx came is not used again, since vLLM closes it
unannounced; a request that is lost on a used connection before its answer began is sent once more, on a new one.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import cast
from urllib.parse import urlsplit

import httptools

from vcot.services.engine.vllm import Endpoint

KEEP_ALIVE_S = 2.0
"""Below vLLM's 5 s, so that no request meets a connection that vLLM is closing."""
CONNECT_TIMEOUT_S = 10.0
HIGH_WATER = 256 * 1024
"""Bytes of an answer that wait to be taken before the server is made to wait."""


class LostError(ConnectionError):
    """The server is not there, went away before the end of its answer, or answered with something else than HTTP."""

    was_sent = True
    """Whether the server had the request, or a part of it."""


class Pool:
    """Used on one event loop; no limit on connections, since vLLM queues on its own."""

    def __init__(
        self, endpoint: Endpoint, *, keep_alive_s: float = KEEP_ALIVE_S, connect_timeout_s: float = CONNECT_TIMEOUT_S
    ) -> None:
        self._keep_alive_s = keep_alive_s
        self._connect_timeout_s = connect_timeout_s
        address = urlsplit(endpoint.base_url)
        self._socket = None if endpoint.socket is None else str(endpoint.socket)
        self._host = address.hostname or ""
        self._is_tls = address.scheme == "https"
        self._port = address.port or (443 if self._is_tls else 80)
        self._host_line = f"host: {address.netloc}\r\n"
        self._idle: deque[tuple[Connection, float]] = deque()
        """With the time since when; the freshest last."""
        self._used: set[Connection] = set()
        self._is_closed = False

    def abort(self) -> None:
        """Close all now, since the server is gone: whoever waits for an answer gets LostError.

        A connection to a machine that lost its power does not break by itself.
        """
        self._is_closed = True
        for connection in (*self._used, *(idle for idle, _ in self._idle)):
            connection.close()
        self._idle.clear()

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> Post:
        """A request, to be sent by `async with`. `path` and `headers` go out as they are: none may hold a line break."""
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        head = f"POST {path} HTTP/1.1\r\n{self._host_line}{lines}content-length: {len(body)}\r\n\r\n"
        return Post(self, head.encode("latin-1"), body)

    def give(self, connection: Connection) -> None:
        """Keep it for the next request, unless its answer was not read to its end."""
        self._used.discard(connection)
        if connection.is_reusable and not self._is_closed:
            connection.resume()  # an idle connection that does not read would miss its end, and the next answer
            self._idle.append((connection, time.monotonic()))
        else:
            connection.close()

    def freshest(self) -> Connection | None:
        """The freshest idle connection; those that are too old are closed."""
        oldest = time.monotonic() - self._keep_alive_s
        while self._idle and (self._idle[0][1] < oldest or not self._idle[0][0].is_reusable):
            self._idle.popleft()[0].close()
        while self._idle:
            connection, _ = self._idle.pop()
            if connection.is_reusable:
                return connection
        return None

    def use(self, connection: Connection) -> None:
        """Something is asked on it; `give` it back. Raises LostError where the server is gone."""
        if self._is_closed:
            connection.close()
            raise LostError("the server is gone")
        self._used.add(connection)

    async def connect(self) -> Connection:
        """A new connection to ask one thing on. Raises LostError."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                if self._socket is not None:
                    return (await loop.create_unix_connection(Connection, self._socket))[1]
                return (await loop.create_connection(Connection, self._host, self._port, ssl=self._is_tls or None))[1]
        except TimeoutError:
            raise LostError(f"no connection within {self._connect_timeout_s:.0f} s") from None
        except OSError as error:
            raise LostError(f"no connection ({error})") from None


class Post:
    """One request: `async with` sends it, gives its answer once the head is there, and lets go of the connection."""

    def __init__(self, pool: Pool, head: bytes, body: bytes) -> None:
        self._pool = pool
        self._head = head
        self._body = body

    async def __aenter__(self) -> Answer:
        if (used := self._pool.freshest()) is not None:
            with suppress(LostError):  # it was closed as the request went out
                return await self._ask_on(used)
        return await self._ask_on(await self._connect(was_sent=used is not None))

    async def _connect(self, *, was_sent: bool) -> Connection:
        try:
            return await self._pool.connect()
        except LostError as error:
            error.was_sent = was_sent
            raise

    async def _ask_on(self, connection: Connection) -> Answer:
        self._connection = connection
        self._pool.use(connection)
        try:
            return await connection.ask(self._head, self._body)
        except BaseException:
            connection.close()
            self._pool.give(connection)
            raise

    async def __aexit__(self, *_: object) -> None:
        self._pool.give(self._connection)


class Answer:
    """One answer: its head, and its body as it comes. Mutated by its connection."""

    def __init__(self, connection: Connection) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        """By lower-case name."""
        self._connection = connection
        self._parts: list[bytes] = []
        self._num_waiting = 0

    async def read(self) -> bytes:
        """All of the body. Raises LostError."""
        await self._connection.until_whole()
        return self._take()

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises LostError where it breaks off."""
        while await self._connection.has_part():
            part = self._take()
            self._connection.resume()
            yield part

    def _take(self) -> bytes:
        parts, self._parts, self._num_waiting = self._parts, [], 0
        return b"".join(parts)  # a single one as it is, uncopied

    @property
    def is_waiting(self) -> bool:
        """Whether a part is there to be taken."""
        return bool(self._parts)

    def add(self, part: bytes) -> bool:
        """Keep a part; whether that is enough for now."""
        self._parts.append(part)
        self._num_waiting += len(part)
        return self._num_waiting > HIGH_WATER


class Connection(asyncio.Protocol):
    """One connection; its parser's callbacks are the `on_` methods."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        """Of the request that is on; None while nothing is asked."""
        self._has_head = False
        self._is_whole = True
        self._is_usable = True
        self._is_paused = False
        self._fault: str | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_reusable(self) -> bool:
        """Whether another request may be sent."""
        return self._is_usable and self._is_whole and self._fault is None

    async def ask(self, head: bytes, body: bytes) -> Answer:
        """Send a request and wait for the head of its answer. Raises LostError."""
        transport = self._opened()
        answer = self._answer = Answer(self)
        self._has_head = self._is_whole = False
        if not transport.is_closing():  # else the wait says so; asyncio's own loop fails otherwise (Python 3.13.0)
            transport.writelines((head, body))
        while not self._has_head:
            await self._wait()
        return answer

    async def has_part(self) -> bool:
        """Wait for a part of the body; False at its end. Raises LostError."""
        assert self._answer is not None
        while not self._answer.is_waiting:
            if self._is_whole:
                return False
            await self._wait()
        return True

    async def until_whole(self) -> None:
        """Wait for the end, however long the answer is. Raises LostError."""
        while not self._is_whole:
            self.resume()
            await self._wait()

    def resume(self) -> None:
        """Let the server go on."""
        if self._is_paused:
            self._is_paused = False
            self._opened().resume_reading()

    def close(self) -> None:
        """Close it now, whatever is on the way."""
        self._opened().abort()

    async def _wait(self) -> None:
        """Until something new is there. Raises LostError."""
        if self._fault is not None:
            raise LostError(self._fault)
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, fault: str) -> None:
        """What was not answered by now will not be."""
        self._fault = self._fault or fault
        self._wake()

    def _opened(self) -> asyncio.Transport:
        assert self._transport is not None
        return self._transport

    # asyncio's protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer, or of nobody's."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"the answer is not HTTP ({error})")
            self._opened().abort()
        else:
            self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """It is closed, by whichever side."""
        self._fail(f"the connection was closed before the answer's end ({error or 'no reason given'})")

    # httptools' callbacks

    def on_message_begin(self) -> None:
        """An answer begins; a second one to one request is nobody's."""
        if self._is_whole:
            self._is_usable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; what stands behind a body in chunks (a trailer) is none."""
        if self._answer is not None and not self._has_head:
            self._answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The head is whole; one of 1xx only announces the answer."""
        if self._answer is None or self._is_whole:
            return
        self._answer.status = self._parser.get_status_code()
        if self._answer.status >= 200:
            self._has_head = True
            self._is_usable = self._is_usable and self._answer.status < 500
        else:
            self._answer.headers.clear()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        if self._answer is None or self._is_whole:
            return
        if self._answer.add(body) and not self._is_paused:
            self._is_paused = True
            self._opened().pause_reading()

    def on_message_complete(self) -> None:
        """The answer is whole."""
        if self._has_head:
            self._is_whole = True
            self._is_usable = self._is_usable and self._parser.should_keep_alive()
