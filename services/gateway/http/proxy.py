"""Passing requests through to the engines, each answer stamped with the weights that gave it.

Model: one request is read whole (it names its model in the body), given to a replica that holds that checkpoint, sent
on with the engine's own name for it, and its answer is sent back as it comes: JSON, server-sent events, or an error of
the request's own with its status. The stamp is two headers, and the `model` field `<name>@<12 hex of the digest>` of
the answer and of every event.

Which engine it goes to, and what becomes of it where that one fails, is decided elsewhere (dispatch.py). A stream that
breaks off once a part of it is with the client ends with an error event.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from functools import cache, partial
from typing import Any

import jiter
import orjson
from starlette.types import Receive, Scope, Send

from vcot.pipeline.client import EXPECT_HEADER
from vcot.pipeline.records import CheckpointRef
from vcot.services.engine.serve_section import ServeSection
from vcot.services.gateway.fleet.ends import EngineFault
from vcot.services.gateway.fleet.pool import Answer, LostError, Pool
from vcot.services.gateway.fleet.routing import image_key
from vcot.services.gateway.http.answers import (
    REQUEST_ID,
    Refusal,
    error_event,
    header_value,
    raw_headers,
    send_json,
    send_refusal,
    stamp_headers,
)
from vcot.services.gateway.http.content import check_content, check_size
from vcot.services.gateway.http.exchange import exchange_of
from vcot.services.gateway.http.suspects import hash_of
from vcot.services.gateway.http.ticket import Ask, Assignment, Dispatch, Ticket
from vcot.services.gateway.stamps import served_name, stamp

_RETRY_AFTER_S = 5
_BROKEN = frozenset((500, 502, 503))


class Proxy:
    """An ASGI application for the inference routes."""

    def __init__(self, dispatch: Dispatch, settings: ServeSection) -> None:
        self._dispatch = dispatch
        self._pools = Pools()
        dispatch.on_end(self._pools.end)
        self._allowed_hosts = frozenset(host.lower() for host in settings.allowed_image_hosts)
        self._max_image_pixels = settings.max_image_pixels

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whose body comes in one message (services/gateway/http/limits.py)."""
        exchange = exchange_of(scope)
        try:
            body = (await receive())["body"]
            request = _parse(body)
            exchange.model = request["model"]
            check_content(request, self._allowed_hosts, self._max_image_pixels)
            expect = header_value(scope, EXPECT_HEADER)
            ask = Ask(request["model"], expect, image_key(request), cache(partial(hash_of, body)))
            async with self._dispatch.ticket(ask) as ticket:
                await self._answer(scope, request, ticket, send)
        except Refusal as refusal:
            await send_refusal(scope, send, refusal)

    async def _answer(self, scope: Scope, request: dict[str, Any], ticket: Ticket, send: Send) -> None:
        exchange = exchange_of(scope)
        to = await ticket.assign()
        while True:
            exchange.admitted, exchange.replica = time.monotonic(), to.replica
            call = _Call(scope, request, to.ref, send)
            try:
                await call.relay(self._pools.of(to))
            except EngineFault as fault:
                other = await ticket.fail(fault)
                if other is None:
                    await call.end_with(fault)
                    return
                to = other
            else:
                ticket.answered()
                return


class Pools:
    """Connections to the engines that live."""

    def __init__(self) -> None:
        self._by_life: dict[str, Pool] = {}
        self._ended: set[str] = set()

    def of(self, to: Assignment) -> Pool:
        """Those to the engine that a request is assigned to."""
        if to.life in self._ended:  # between its assignment and now
            pool = Pool(to.endpoint)
            pool.abort()
            return pool
        if to.life not in self._by_life:
            self._by_life[to.life] = Pool(to.endpoint)
        return self._by_life[to.life]

    def end(self, life: str) -> None:
        """That engine is gone, and with it what it was asked."""
        self._ended.add(life)
        if (pool := self._by_life.pop(life, None)) is not None:
            pool.abort()


class _Call:
    """One request to an engine, and its answer on the way to the client."""

    def __init__(self, scope: Scope, request: dict[str, Any], ref: CheckpointRef, send: Send) -> None:
        self._scope = scope
        self._model = served_name(ref)
        request["model"] = self._model
        self._body = _written(request)
        self._ref = ref
        self._send = send
        self._has_begun = False

    async def relay(self, pool: Pool) -> None:
        """Pass one engine's answer on. Raises EngineFault where it gives none, or breaks off; Refusal for a bad request."""
        headers = {"content-type": "application/json", REQUEST_ID: exchange_of(self._scope).request_id}
        try:
            async with pool.post(self._scope["path"], self._body, headers) as response:
                kind = response.headers.get("content-type", "")
                if kind.startswith("text/event-stream") and response.status == 200:
                    await self._pass_events(response.parts())
                    return
                data = await response.read()
        except LostError as error:
            message = f"the engine went away before it answered ({error}); the same request may be sent again"
            raise EngineFault("lost", message, has_begun=self._has_begun, was_sent=error.was_sent) from None
        await self._pass_answer(response, data, kind)  # with the connection free for the next request

    async def _pass_answer(self, response: Answer, data: bytes, kind: str) -> None:
        if response.status == 200:
            data = self._stamped(data)
        elif response.status in _BROKEN:
            raise _failure(response.status, data)
        elif response.status == 429:
            wait = response.headers.get("retry-after", str(_RETRY_AFTER_S))
            raise EngineFault("429", f"the engine is full: {_excerpt(data)}", is_broken=False, retry_after=wait)
        elif response.status == 404:  # the gateway knows the routes and the names
            raise EngineFault("404", f"the engine does not have {self._model}: {_excerpt(data)}", is_broken=True)
        await send_json(self._send, response.status, data, stamp_headers(self._ref, kind))

    async def _pass_events(self, parts: AsyncIterator[bytes]) -> None:
        """Pass server-sent events on, each stamped; nothing is sent before the first that says something is there."""
        held = b""
        async for line in _lines(parts):
            data = b"data: " + self._stamped(line[6:]) if line.startswith(b"data: {") else line
            if not self._has_begun and _says_nothing(line):
                held += data + b"\n"
                continue
            await self._begin()
            await self._send({"type": "http.response.body", "body": held + data + b"\n", "more_body": True})
            held = b""
        if not self._has_begun:
            raise EngineFault("empty", "the engine ended the stream before its first event")
        await self._send({"type": "http.response.body", "body": b""})

    async def _begin(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            headers = stamp_headers(self._ref, "text/event-stream; charset=utf-8")
            await self._send({"type": "http.response.start", "status": 200, "headers": raw_headers(headers.items())})

    async def end_with(self, fault: EngineFault) -> None:
        """End a stream that has begun."""
        event = error_event(f"the engine went away while it answered ({fault})", "engine_lost", 502)
        await self._send({"type": "http.response.body", "body": event, "more_body": True})
        await self._send({"type": "http.response.body", "body": b""})

    def _stamped(self, data: bytes) -> bytes:
        """An answer or an event under our name. Raises EngineFault for what is none, or is another model's."""
        try:
            answer = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            message = f"the engine answered with no JSON ({error})"
            raise EngineFault("not_json", message, is_broken=True, has_begun=self._has_begun) from None
        if not isinstance(answer, dict):
            message = "the engine answered with no object"
            raise EngineFault("not_json", message, is_broken=True, has_begun=self._has_begun)
        if "error" in answer and "model" not in answer:  # vLLM's way to end a stream
            if not self._has_begun:
                raise _stream_failure(answer["error"], data)
            return data
        if answer.get("model") != self._model:
            message = f"the engine was asked for {self._model} and answered as {str(answer.get('model'))[:100]}"
            raise EngineFault("wrong_model", message, is_broken=True, has_begun=self._has_begun)
        return orjson.dumps(answer | {"model": stamp(self._ref)})


def _failure(status: int, data: bytes) -> EngineFault:
    return EngineFault(str(status), f"the engine answered {status}: {_excerpt(data)}")


def _stream_failure(error: Any, data: bytes) -> Exception:
    """What an error in place of a stream's first event is without `stream`."""
    status = error.get("code") if isinstance(error, dict) else None
    if not isinstance(status, int) or not 400 <= status < 500:
        return _failure(status if status in _BROKEN else 500, data)
    return Refusal(status, str(error.get("type") or "bad_request"), str(error.get("message") or _excerpt(data)))


def _excerpt(data: bytes) -> str:
    return data[:200].decode("utf-8", "replace")


def _parse(body: bytes) -> dict[str, Any]:
    check_size(body)
    try:
        request = jiter.from_json(body, allow_inf_nan=False, cache_mode="keys")  # 4 times as fast as orjson here
    except ValueError as error:
        raise Refusal(400, "invalid_json", f"the request's body is not JSON: {error}") from None
    if not isinstance(request, dict) or not isinstance(request.get("model"), str):
        raise Refusal(
            400, "invalid_request_error", "the request names no model; set `model` to an alias or a checkpoint"
        )
    return request


def _written(request: dict[str, Any]) -> bytes:
    """The request anew, so that the engine reads what was checked. Raises Refusal."""
    try:
        return orjson.dumps(request)
    except TypeError as error:  # an integer of more than 64 bits, or half a surrogate pair
        raise Refusal(400, "invalid_json", f"the request holds what cannot be passed on: {error}") from None


def _says_nothing(line: bytes) -> bool:
    """Whether an event names the role of its choices and no more: vLLM sends these before it knows whether it can answer."""
    if not line.startswith(b"data: {"):
        return not line
    choices = orjson.loads(line[6:]).get("choices") or []
    return bool(choices) and all(map(_is_role, choices))


def _is_role(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    return (
        isinstance(delta, dict) and not choice.get("finish_reason") and {n for n, v in delta.items() if v} <= {"role"}
    )


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Whole lines of a stream, however long."""
    rest = b""
    async for chunk in parts:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line
    if rest:
        yield rest
