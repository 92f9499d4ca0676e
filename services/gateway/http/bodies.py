"""The body of an operator's request, read strictly: what is not meant changes nothing."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from starlette.requests import Request

from vcot.pipeline.records import Record
from vcot.services.gateway.http.answers import Refusal

MAX_BYTES = 64 * 1024
"""A path and two names are less."""
R = TypeVar("R", bound=Record)


async def read_body(request: Request, kind: type[R]) -> R:
    """The body as a record; one without fields may be left out.

    Raises Refusal for what is no JSON object with each key once, and ValidationError for other fields or types.
    """
    body = await _read(request)
    if not body and not kind.model_fields:
        return kind()
    _check_type(request)
    _check_json(request, body)
    return kind.model_validate_json(body, strict=True)


async def _read(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BYTES:
            message = (
                f"the body of {_named(request)} is larger than {MAX_BYTES:,} bytes; send what docs/serving.md shows"
            )
            raise Refusal(413, "body_too_large", message)
    return body


def _check_type(request: Request) -> None:
    declared = request.headers.get("content-type", "")
    if declared.partition(";")[0].strip().lower() != "application/json":
        message = f"{_named(request)} takes application/json, and content-type is {declared[:100]!r}; send JSON"
        raise Refusal(415, "unsupported_media_type", message)


def _check_json(request: Request, body: bytes) -> None:
    if not body:
        raise Refusal(400, "invalid_json", f"{_named(request)} came without a body; send a JSON object")
    try:
        json.loads(body.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        message = f"the body of {_named(request)} is not JSON that can be used ({str(error)[:200]}); send one object"
        raise Refusal(400, "invalid_json", message) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"{twice[:60]!r} is there twice")
    return found


def _named(request: Request) -> str:
    return f"{request.method} {request.url.path[:100]}"
