"""Passing requests through to the engine, each answer stamped with the weights that gave it.

Model: one request is read whole (it names its model in the body), admitted, sent on with the engine's own model name, and
its answer is sent back as it comes: JSON, server-sent events, or an error of the engine's with its status. The stamp is
two headers, and the `model` field `<name>@<12 hex of the digest>` of the answer and of every event.

Limits: what is neither JSON nor server-sent events passes unchanged, with the headers only.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

from pipeline.client import DIGEST_HEADER, EXPECT_HEADER
from pipeline.errors import ServerError
from pipeline.recipe import ServeSection
from pipeline.records import CheckpointRef
from services.checkpoints import Checkpoint
from services.gateway.answers import CHECKPOINT_HEADER, REQUEST_ID, Refusal, header_value, send_json, send_refusal
from services.gateway.content import check_content
from services.gateway.engine import Engine
from services.gateway.exchange import exchange_of
from services.gateway.upstream import UNREACHABLE
from services.vllm import SERVED_NAME

_RETRY_AFTER_S = 5


def stamp(ref: CheckpointRef) -> str:
    """What the `model` field of an answer says."""
    return f"{ref.name}@{ref.digest.removeprefix('sha256:')[:12]}"


class Proxy:
    """An ASGI application for the inference routes."""

    def __init__(self, engine: Engine, settings: ServeSection, max_wait_s: float) -> None:
        self._engine = engine
        self._allowed_hosts = frozenset(host.lower() for host in settings.allowed_image_hosts)
        self._max_wait_s = max_wait_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whose body comes in one message (services/gateway/limits.py)."""
        exchange = exchange_of(scope)
        try:
            request = _parse((await receive())["body"])
            exchange.model = request["model"]
            check_content(request, self._allowed_hosts)
            self._resolve(request["model"])  # an unknown name need not wait
            async with self._engine.gate.admitted(self._max_wait_s) as live:
                exchange.admitted = time.monotonic()
                # Once more: a swap that the request waited for may have changed what an alias means.
                wanted = self._resolve(request["model"])
                _check_live(request["model"], wanted, live, header_value(scope, EXPECT_HEADER))
                request["model"] = SERVED_NAME
                await self._relay(scope, request, live, send)
        except Refusal as refusal:
            await send_refusal(scope, send, refusal)
        except ServerError as error:
            await send_refusal(scope, send, Refusal(503, "unavailable", str(error), retry_after_s=_RETRY_AFTER_S))

    def _resolve(self, model: str) -> str:
        """The checkpoint that an alias or a name means. Raises Refusal."""
        registry = self._engine.registry
        checkpoint = registry.find(model)
        if checkpoint is None:
            raise Refusal(
                404, "model_not_found", f"no checkpoint or alias {model[:100]!r}; {registry.suggest(model[:100])}"
            )
        return checkpoint.ref.name

    async def _relay(self, scope: Scope, request: dict[str, Any], live: Checkpoint, send: Send) -> None:
        headers = {REQUEST_ID: exchange_of(scope).request_id}
        try:
            async with self._engine.upstream.post(scope["path"], orjson.dumps(request), headers) as response:
                kind = response.headers.get("content-type", "")
                if kind.startswith("text/event-stream"):
                    await _send_events(send, response.status, response.content, live.ref)
                else:
                    data = await response.read()
                    stamped = _stamp_json(data, live.ref) if kind.startswith("application/json") else data
                    await send_json(send, response.status, stamped, _stamp_headers(live.ref, kind))
        except UNREACHABLE as error:
            message = f"the engine went away before it answered ({error!r}); the same request may be sent again"
            raise Refusal(502, "engine_lost", message, retry_after_s=_RETRY_AFTER_S) from None


def _parse(body: bytes) -> dict[str, Any]:
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, "invalid_json", f"the request's body is not JSON: {error}") from None
    if not isinstance(request, dict) or not isinstance(request.get("model"), str):
        raise Refusal(
            400, "invalid_request_error", "the request names no model; set `model` to an alias or a checkpoint"
        )
    return request


def _check_live(model: str, wanted: str, live: Checkpoint, expect: str | None) -> None:
    """Raises Refusal unless the live checkpoint is the one asked for."""
    name, digest = live.ref.name, live.ref.digest
    if wanted != name:
        means = f"{model} means {wanted}" if model != wanted else f"{model} was asked for"
        message = f"{means}, but {name} is live; make it so with `vcot swap policy {wanted}`"
        raise Refusal(409, "checkpoint_not_live", message, headers=_stamp_headers(live.ref))
    if expect is not None and expect != digest:
        message = f"weights {expect[:19]} were expected, but {name} with {digest[:19]} is live; swap, or ask anew"
        raise Refusal(409, "weights_not_live", message, headers=_stamp_headers(live.ref))


def _stamp_headers(ref: CheckpointRef, content_type: str = "application/json") -> dict[str, str]:
    return {"content-type": content_type, CHECKPOINT_HEADER: ref.name, DIGEST_HEADER: ref.digest}


def _stamp_json(data: bytes, ref: CheckpointRef) -> bytes:
    try:
        answer = orjson.loads(data)
    except orjson.JSONDecodeError:
        return data
    if not isinstance(answer, dict) or "model" not in answer:
        return data
    return orjson.dumps(answer | {"model": stamp(ref)})


async def _send_events(send: Send, status: int, content: Any, ref: CheckpointRef) -> None:
    """Pass server-sent events on, each stamped; an engine that is lost on the way ends them with an error event."""
    headers = _stamp_headers(ref, "text/event-stream; charset=utf-8")
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    try:
        async for line in _lines(content):
            data = b"data: " + _stamp_json(line[6:], ref) if line.startswith(b"data: {") else line
            await send({"type": "http.response.body", "body": data + b"\n", "more_body": True})
    except UNREACHABLE as error:
        lost = {"message": f"the engine went away while it answered ({error!r})", "type": "engine_lost", "code": 502}
        await send(
            {
                "type": "http.response.body",
                "body": b"data: " + orjson.dumps({"error": lost}) + b"\n\n",
                "more_body": True,
            }
        )
    await send({"type": "http.response.body", "body": b""})


async def _lines(content: Any) -> AsyncIterator[bytes]:
    """Whole lines of a stream, however long; aiohttp's own reader refuses those above 64 KB."""
    rest = b""
    async for chunk in content.iter_any():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line
    if rest:
        yield rest
