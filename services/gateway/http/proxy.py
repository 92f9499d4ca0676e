"""Passing requests through to the engines, each answer stamped with the weights that gave it.

Model: one request is read whole (it names its model in the body), given to a replica that holds that checkpoint, sent
on with the engine's own name for it, and its answer is sent back as it comes: JSON, server-sent events, or an error of
the request's own with its status. The stamp is two headers, and the `model` field `<name>@<12 hex of the digest>` of
the answer and of every event.

An engine that breaks off, answers with 500, 502, 503 or half a JSON, is full, or answers as another model than it was
asked for (a fall-back from an adapter to its base) did not answer: the same request goes to one other replica that holds
the same checkpoint; where engines are full, to each. Where there is no other, an engine that is well is asked once more:
vLLM answers with a bare 500 where its API takes an image to be with its engine that is not, and sends it along the next
time. With an image it is asked three times, since that may happen twice. Where a swap began meanwhile, the request waits for
its end first. That is safe as long as nothing of an answer is with the client, since an unanswered sample has no effect. A
stream that breaks off later ends with an error event.

A client can make any engine fail its own request. So a fault speaks against an engine only where the engine, asked how it
is, is not well; what sound engines answer with 5xx is the request's own fault, and is told as 422, streamed or not. A
request that was there each time when engines died is refused, too (suspects.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import jiter
import orjson
from starlette.types import Receive, Scope, Send

from vcot.pipeline.client import DIGEST_HEADER, EXPECT_HEADER
from vcot.pipeline.errors import ServerError
from vcot.pipeline.records import CheckpointRef
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.engine.serve_section import ServeSection
from vcot.services.gateway.fleet.group import Fleet, ImageKey, NotServedError, RestingError, Wish, stamp
from vcot.services.gateway.fleet.pool import Answer, LostError
from vcot.services.gateway.fleet.replica import Replica
from vcot.services.gateway.fleet.routing import image_key
from vcot.services.gateway.fleet.upstream import EngineFault, Upstream
from vcot.services.gateway.http.answers import (
    CHECKPOINT_HEADER,
    REQUEST_ID,
    Refusal,
    error_event,
    header_value,
    send_json,
    send_refusal,
)
from vcot.services.gateway.http.content import check_content, check_size
from vcot.services.gateway.http.exchange import exchange_of
from vcot.services.gateway.http.metrics import Metrics
from vcot.services.gateway.http.suspects import Suspects
from vcot.services.gateway.swap.verified import served_name

_RETRY_AFTER_S = 5
_REST_RETRY_AFTER_S = 60
_AGAIN_AFTER_S = 0.2
"""Before the same engine is asked once more: what was on its way to it is there by then."""
_BROKEN = frozenset((500, 502, 503))


class Proxy:
    """An ASGI application for the inference routes."""

    def __init__(self, fleet: Fleet, settings: ServeSection, metrics: Metrics, max_wait_s: float) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._allowed_hosts = frozenset(host.lower() for host in settings.allowed_image_hosts)
        self._max_image_pixels = settings.max_image_pixels
        self._max_wait_s = max_wait_s
        self._suspects = Suspects()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whose body comes in one message (services/gateway/http/limits.py)."""
        exchange = exchange_of(scope)
        try:
            body = (await receive())["body"]
            request = _parse(body)
            exchange.model = request["model"]
            check_content(request, self._allowed_hosts, self._max_image_pixels)
            async with self._suspects.in_turn(body):
                await self._answer(scope, request, body, send)
        except Refusal as refusal:
            await send_refusal(scope, send, refusal)
        except RestingError as error:
            await send_refusal(scope, send, Refusal(503, "resting", str(error), retry_after_s=_REST_RETRY_AFTER_S))
        except ServerError as error:
            await send_refusal(scope, send, Refusal(503, "unavailable", str(error), retry_after_s=_RETRY_AFTER_S))

    async def _answer(self, scope: Scope, request: dict[str, Any], body: bytes, send: Send) -> None:
        model, expect, key = request["model"], header_value(scope, EXPECT_HEADER), partial(image_key, request)
        wish = Wish(model, expect, partial(self._resolve, model, expect), key)
        replica, target = await self._find(wish)
        call = _Call(scope, request, target.ref, send)
        exchange = exchange_of(scope)
        tried: list[Replica] = []
        while True:
            exchange.admitted, exchange.replica = time.monotonic(), replica.name
            try:
                life = replica.life
                with replica.admitted(target.ref.digest) as upstream:
                    await call.relay(upstream)
                return self._suspects.forget(body)
            except EngineFault as fault:
                self._metrics.count_fault(replica.name, fault.reason)
                if fault.was_there:
                    self._suspects.blame(body, life)
                if fault.has_begun:
                    return await call.end_with(fault)
                self._suspects.check(body)
                other = self._next(fault, target.ref.digest, key, [*tried, replica])
                if other is None:
                    raise _final(fault) from None
                self._metrics.count_retry(fault.reason)
                if other is replica:
                    await asyncio.sleep(_AGAIN_AFTER_S)
                tried.append(replica)
                replica = other
                if not replica.gate.admission.serves(target.ref.digest):  # a swap began
                    replica, target = await self._find(wish)
                    call = _Call(scope, request, target.ref, send)

    async def _find(self, wish: Wish) -> tuple[Replica, Checkpoint]:
        """A replica that serves what is asked for. Raises Refusal, ServerError."""
        try:
            replica, target = await self._fleet.find(wish, self._max_wait_s)
        except NotServedError as error:
            trial = self._fleet.trial if self._fleet.is_held_up(wish.target()) else None
            raise _not_live(wish, error.live, trial) from None
        _check_expected(target.ref, wish.expect)
        return replica, target

    def _next(self, fault: EngineFault, digest: str, key: ImageKey, tried: list[Replica]) -> Replica | None:
        """Who is asked the same after `fault`; the last of `tried` is who was asked."""
        if fault.reason == "429":
            return self._fleet.route(digest, key, tried)
        again = None if fault.is_broken else tried[-1]
        if len(tried) == 1:
            return self._fleet.route(digest, key, tried) or again
        may_drift = len(tried) == 2 and key() is not None  # its image may have been on its way there, too
        return again if may_drift else None

    def _resolve(self, model: str, expect: str | None) -> Checkpoint:
        """The checkpoint that an alias or a name means. Raises Refusal."""
        checkpoint = self._fleet.resolve(model, expect)
        if checkpoint is None:
            name = model[:100]
            message = f"no checkpoint or alias {name!r}; {self._fleet.registry.suggest(name)}"
            raise Refusal(404, "model_not_found", message)
        return checkpoint


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

    async def relay(self, upstream: Upstream) -> None:
        """Pass one engine's answer on. Raises EngineFault where it gives none, or breaks off; Refusal for a bad request."""
        try:
            await self._relay(upstream)
        except EngineFault as fault:
            if fault.is_broken is None:
                fault.is_broken = not await upstream.is_sound()
                fault.was_there = fault.is_broken and fault.was_sent
            raise

    async def _relay(self, upstream: Upstream) -> None:
        headers = {REQUEST_ID: exchange_of(self._scope).request_id}
        try:
            async with upstream.post(self._scope["path"], self._body, headers) as response:
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
        await send_json(self._send, response.status, data, _stamp_headers(self._ref, kind))

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
            headers = _stamp_headers(self._ref, "text/event-stream; charset=utf-8")
            pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": pairs})

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


def _final(fault: EngineFault) -> Refusal:
    """What the client is told where no replica is left to ask."""
    if fault.retry_after is not None:
        return Refusal(429, "engine_full", str(fault), headers={"retry-after": fault.retry_after})
    if fault.reason.isdecimal() and not fault.is_broken:
        return Refusal(422, "request_failed", f"{fault}; the engine is well, so the request is at fault: change it")
    return Refusal(502, "engine_lost", str(fault), retry_after_s=_RETRY_AFTER_S)


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


def _not_live(wish: Wish, live: Checkpoint, trial: Checkpoint | None) -> Refusal:
    model, name = wish.model, wish.target().ref.name
    means = f"{model} means {name}" if model != name else f"{model} was asked for"
    if trial is not None:
        message = (
            f"{means}, but {trial.ref.name} is on trial; ask again in a moment (`vcot swap policy {name}` ends it)"
        )
        return Refusal(503, "checkpoint_on_trial", message, retry_after_s=_RETRY_AFTER_S)
    message = f"{means}, but {live.ref.name} is live; make it so with `vcot swap policy {name}`"
    return Refusal(409, "checkpoint_not_live", message, headers=_stamp_headers(live.ref))


def _check_expected(ref: CheckpointRef, expect: str | None) -> None:
    """Raise Refusal unless these are the weights that the client expects."""
    if expect is not None and expect != ref.digest:
        message = (
            f"weights {expect[:19]} were expected, but {ref.name} with {ref.digest[:19]} is live; swap, or ask anew"
        )
        raise Refusal(409, "weights_not_live", message, headers=_stamp_headers(ref))


def _stamp_headers(ref: CheckpointRef, content_type: str = "application/json") -> dict[str, str]:
    return {"content-type": content_type, CHECKPOINT_HEADER: ref.name, DIGEST_HEADER: ref.digest}


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
