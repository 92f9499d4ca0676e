"""One client's connection: uvicorn's protocol, with bounds on what a client may hold of the gateway's time and memory.

A request that is not whole some time after its connection was opened, or after its first byte, is answered with 408,
whether its headers or its body are late. Headers of more than MAX_HEAD_BYTES or MAX_HEADERS are answered with 431 as soon
as they are. A client that takes nothing of its answer for some time is cut off. uvicorn alone has an end for idle
connections only (`timeout_keep_alive`), so that one byte now and then would hold one for ever, and reads headers without
end. What stands behind a body in chunks (a trailer) counts as a header, and is dropped.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any, cast

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vcot.services.gateway.http.answers import error_body
from vcot.services.gateway.http.exchange import exchange_of

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 100
KEEP_ALIVE_S = 75
"""How long an idle connection stays open. Clients give theirs up earlier (OpenAI's SDK after 5 s, aiohttp 15, nginx 60), or
one would now and then send a request on a connection that the gateway is closing, and fail."""
_BYTES_AROUND_A_BODY_BYTE = 8
"""A chunk of one byte has a line before it and a line break behind it."""
_CORK_BYTES = 16 * 1024


_buffer = memoryview(bytearray(256 * 1024))
"""What is read goes here, and is parsed before the next read: one event loop."""


class ClientConnection(HttpToolsProtocol, asyncio.BufferedProtocol):
    """Given to uvicorn as `http`; the times are of the class."""

    max_request_s = 60.0
    max_stall_s = 30.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._is_receiving = self._has_head = False
        """Whether a request has begun and is not whole; whether its headers are, so that `cycle` is its own."""
        self._is_oversized = False
        self._num_begun = 0
        self._reset_counts()
        self._late: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first request is awaited."""
        super().connection_made(cast("asyncio.Transport", _Corked(transport, self.loop)))
        self._late = self.loop.call_later(self.max_request_s, self._end_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited."""
        self._disarm()
        super().connection_lost(exc)
        self._unstall()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to read to."""
        return _buffer

    def buffer_updated(self, nbytes: int) -> None:
        """That much was read."""
        self.data_received(_buffer[:nbytes])

    def _reset_counts(self) -> None:
        """Of the request that begins: its body's bytes, and what else came for it."""
        self._num_body_bytes = self._num_other_bytes = 0

    def data_received(self, data: Any) -> None:
        """A part of a request; most come whole, and need no timer."""
        begun, body, was_receiving = self._num_begun, self._num_body_bytes, self._is_receiving
        super().data_received(data)
        if self._num_begun == begun + 1 and not was_receiving and not self._has_head:
            begun, body = self._num_begun, 0  # all that was read is the beginning of its head
        if self._num_begun == begun and self._is_receiving:  # else at most one read, counted field by field
            self._num_other_bytes += len(data) - (self._num_body_bytes - body)
            if self._num_other_bytes > MAX_HEAD_BYTES + _BYTES_AROUND_A_BODY_BYTE * self._num_body_bytes:
                self._end_oversized()
        if self._is_receiving and self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(self.max_request_s, self._end_late)

    def on_message_begin(self) -> None:
        """A request begins."""
        self._is_receiving, self._has_head = True, False
        self._num_begun += 1
        self._reset_counts()
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._num_body_bytes += len(body)
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """What could not be parsed is no HTTP, or too much of it."""
        if self._is_oversized:
            self._end_oversized()
        else:
            self._refuse(400, "invalid_http", f"{msg} Send HTTP/1.1.")

    def on_headers_complete(self) -> None:
        """Its body follows. Raises _Oversized, which uvicorn answers as it does what is no HTTP."""
        if len(self.headers) > MAX_HEADERS or sum(map(_size, self.headers)) > MAX_HEAD_BYTES:
            self._is_oversized = True
            raise _Oversized
        super().on_headers_complete()
        self.headers = []  # what comes behind the body is no header of this request
        self._has_head = True
        self.cycle.body = cast("bytearray", _Parts())

    def on_message_complete(self) -> None:
        """It is whole."""
        self._is_receiving = False
        self._disarm()
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The client does not keep up."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.max_stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It does again."""
        self._unstall()
        super().resume_writing()

    def _disarm(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _unstall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _end_late(self) -> None:
        """Answer 408 and close; while an earlier request is being answered, wait on."""
        self._late = None
        is_behind = bool(self.pipeline) or (not self._has_head and self._is_answering)
        if is_behind:
            self._late = self.loop.call_later(self.max_request_s, self._end_late)
            return
        if self._is_receiving:
            message = f"the request was not there after {self.max_request_s:g} s; send it faster"
            self._refuse(408, "request_timeout", message)
        else:
            self.transport.close()

    def _end_oversized(self) -> None:
        message = f"the request's headers are more than {MAX_HEAD_BYTES:,} bytes or {MAX_HEADERS} fields; send fewer"
        self._refuse(431, "headers_too_large", message)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer with an error, unless another answer is on its way, and close."""
        has_begun = self.cycle.response_started if self._has_head else self._is_answering
        if not has_begun:
            if self._is_receiving:
                exchange = exchange_of(cast("Scope", self.scope))
                exchange.status, exchange.refused = status, code
            body = error_body(message, code, status)
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()


def _size(header: tuple[bytes, bytes]) -> int:
    return len(header[0]) + len(header[1])


class _Oversized(Exception):
    """Ends the parsing of a head that has too many fields or bytes."""


class _Parts:
    """A body as it comes, joined once: uvicorn's bytearray copies each part in, and the whole out again."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def __iadd__(self, part: bytes) -> _Parts:
        self._parts.append(part)
        self._size += len(part)
        return self

    def __len__(self) -> int:
        return self._size

    def __bytes__(self) -> bytes:
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)


class _Corked:
    """A transport that sends what is written in one turn of the loop at once: an answer's head with its body.

    uvicorn writes them one after the other, and each write wakes the client up (30 microseconds on loopback). More than
    `_CORK_BYTES` goes out as it comes, so that a client that does not read is noticed.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: list[bytes] = []
        self._num_held = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send, before the loop's next turn."""
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)
        self._num_held += len(data)
        if self._num_held > _CORK_BYTES:
            self._flush()

    def close(self) -> None:
        """Close once all is sent."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        held, self._held, self._num_held = self._held, [], 0
        if held and not self._transport.is_closing():
            self._transport.write(b"".join(held))
