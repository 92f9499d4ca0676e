"""What is known of each request once it is over: one JSON line in the log, and the counters. ASGI middleware.

The line holds sizes, times and names; never a prompt, an answer or a key. Routes that machines poll are counted, and
logged only when they begin to fail, or fail in another way: that a server loads is not said at each probe. 499 is the status
of a request whose client hung up before it was answered.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Collection

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vcot.services.gateway.http.answers import CHECKPOINT_HEADER, REQUEST_ID, header_value
from vcot.services.gateway.http.exchange import Ended, Exchange, choose_request_id, exchange_of

_CHECKPOINT = CHECKPOINT_HEADER.encode()
_POLLED = ("/health", "/metrics", "/admin/state")
_MAX_MODEL = 100
Write = Callable[[bytes], object]
"""Takes one line of the log, with its end."""
Count = Callable[[Ended], object]
"""Takes what is counted of a request."""


def write_to_stderr(line: bytes) -> None:
    """To this process's standard error, at once; a full disk, or a pipe without a reader, costs the line and no request."""
    with contextlib.suppress(OSError):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()


class Observed:
    """The outermost middleware. `routes` are the paths that are counted under their own name."""

    def __init__(self, app: ASGIApp, count: Count, routes: Collection[str], write: Write) -> None:
        self._app = app
        self._count = count
        self._routes = routes
        self._write = write
        self._polled: dict[str, int] = {}
        """The last status of each route that is polled."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request through, and say what became of it."""
        exchange = exchange_of(scope)
        exchange.request_id = choose_request_id(header_value(scope, REQUEST_ID))
        request_id = (REQUEST_ID.encode(), exchange.request_id.encode())

        async def counted_receive() -> Message:
            message = await receive()
            exchange.bytes_in += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                headers = list(message.get("headers", ()))
                exchange.checkpoint = next((value.decode() for name, value in headers if name == _CHECKPOINT), "")
                message = {**message, "headers": [*headers, request_id]}
            else:
                exchange.first_byte = exchange.first_byte or time.monotonic()
                exchange.bytes_out += len(message.get("body", b""))
            await send(message)
            exchange.is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._app(scope, counted_receive, counted_send)
        except Exception:
            exchange.status = exchange.status or 500
            raise
        finally:
            self._over(scope, exchange)

    def _over(self, scope: Scope, exchange: Exchange) -> None:
        total_s = time.monotonic() - exchange.began
        route = scope["path"] if scope["path"] in self._routes else "other"
        status = exchange.status or 499
        first_byte_s = None if exchange.first_byte is None else exchange.first_byte - exchange.began
        self._count(Ended(route, status, exchange.checkpoint, exchange.refused, first_byte_s, total_s))
        is_news = route not in _POLLED or (status >= 400 and status != self._polled.get(route))
        if route in _POLLED:
            self._polled[route] = status
        if is_news:
            self._write(render_line(route, status, exchange, total_s))


def render_line(route: str, status: int, exchange: Exchange, total_s: float) -> bytes:
    """The log's line."""
    line = {
        "time": time.time(),
        "id": exchange.request_id,
        "route": route,
        "model": exchange.model and exchange.model[:_MAX_MODEL],
        "checkpoint": exchange.checkpoint or None,
        "replica": exchange.replica,
        "status": status,
        "refused": exchange.refused,
        "is_whole": exchange.is_whole,
        "bytes_in": exchange.bytes_in,
        "bytes_out": exchange.bytes_out,
        "wait_ms": _ms_since(exchange.began, exchange.admitted),
        "first_byte_ms": _ms_since(exchange.began, exchange.first_byte),
        "total_ms": round(total_s * 1e3, 2),
    }
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _ms_since(began: float, then: float | None) -> float | None:
    return None if then is None else round((then - began) * 1e3, 2)
