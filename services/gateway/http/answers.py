"""Answers that the gateway gives itself, in OpenAI's error shape, so that any client shows them as it shows the API's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import orjson
from starlette.types import Scope, Send

from vcot.pipeline.client import DIGEST_HEADER
from vcot.pipeline.records import CheckpointRef
from vcot.services.gateway.http.exchange import exchange_of

CHECKPOINT_HEADER = "x-vcot-checkpoint"
REQUEST_ID = "x-request-id"


class Refusal(Exception):
    """A request that the gateway answers with an error; never leaves it."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["retry-after"] = str(retry_after_s)


def error_body(message: str, code: str, status: int) -> bytes:
    """OpenAI's error shape."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return orjson.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})


def error_event(message: str, kind: str, status: int) -> bytes:
    """What ends a stream that cannot go on: its status is sent already."""
    return b"data: " + orjson.dumps({"error": {"message": message, "type": kind, "code": status}}) + b"\n\n"


async def send_refusal(scope: Scope, send: Send, refusal: Refusal) -> None:
    """Answer with an error."""
    exchange_of(scope).refused = refusal.code
    await send_json(send, refusal.status, error_body(str(refusal), refusal.code, refusal.status), refusal.headers)


async def send_json(send: Send, status: int, data: bytes, headers: Mapping[str, str]) -> None:
    """Answer with bytes that are JSON already."""
    full = {"content-type": "application/json", **headers, "content-length": str(len(data))}
    await send({"type": "http.response.start", "status": status, "headers": raw_headers(full.items())})
    await send({"type": "http.response.body", "body": data})


def stamp_headers(ref: CheckpointRef, content_type: str = "application/json") -> dict[str, str]:
    """Those that say which weights answered."""
    return {"content-type": content_type, CHECKPOINT_HEADER: ref.name, DIGEST_HEADER: ref.digest}


def raw_headers(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    """Headers as ASGI has them."""
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]


def header_value(scope: Scope, name: str) -> str | None:
    """A request header, by its lower-case name; one that came several times is the list of its values (RFC 9110, 5.2).

    So two expectations, keys or limits that contradict each other are none that could be met.
    """
    wanted = name.encode("latin-1")
    values = dict.fromkeys([value.decode("latin-1") for key, value in scope["headers"] if key == wanted])
    return ", ".join(values) if values else None
