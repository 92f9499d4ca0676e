"""The gateway's ASGI application, where one process is all of it, and what it answers besides inference: /admin, figures."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from vcot.pipeline.errors import CheckpointError, SwapError, VcotError
from vcot.pipeline.records import Record
from vcot.services.engine.serve_section import ServeSection
from vcot.services.gateway.admin import (
    AddRequest,
    CheckpointList,
    GatewayState,
    RegisterRequest,
    ReplicaList,
    Rested,
    RestRequest,
    Swapped,
    SwapRequest,
    TrialRequest,
)
from vcot.services.gateway.fleet import rest
from vcot.services.gateway.fleet.group import Fleet
from vcot.services.gateway.http.answers import Refusal, error_body
from vcot.services.gateway.http.bodies import read_body
from vcot.services.gateway.http.dispatch import MAX_WAIT_S, Dispatcher
from vcot.services.gateway.http.front import INFERENCE_ROUTES, build_front, make_slots
from vcot.services.gateway.http.keys import ADMIN, INFERENCE, Guarded
from vcot.services.gateway.http.limits import Counts, Slots
from vcot.services.gateway.http.metrics import CONTENT_TYPE, Metrics
from vcot.services.gateway.http.observe import write_to_stderr
from vcot.services.gateway.stamps import stamp
from vcot.services.gateway.swap import rollout

_TAKE_PATHS = ("/admin/checkpoints", "/admin/trial")
_OWN_FAULTS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE))
"""Of the gateway's disk or its open files, whatever path was asked for."""


@dataclass(frozen=True)
class Deciding:
    """What the one process has that decides for a fleet."""

    slots: Slots
    dispatcher: Dispatcher
    others: ASGIApp
    """Answers all but inference."""


def make_deciding(
    fleet: Fleet,
    run_directory: Path,
    settings: ServeSection,
    counts: Counts | None = None,
    *,
    max_wait_s: float = MAX_WAIT_S,
) -> Deciding:
    """Its parts; `counts` where other processes carry requests for it."""
    slots = make_slots(settings, counts)
    metrics = Metrics(fleet, slots.places)
    return Deciding(slots, Dispatcher(fleet, metrics, max_wait_s), operator_app(fleet, run_directory, metrics))


def build_app(fleet: Fleet, run_directory: Path, settings: ServeSection) -> ASGIApp:
    """The application of a process that decides and carries."""
    own = make_deciding(fleet, run_directory, settings)
    count = own.dispatcher.metrics.count
    return build_front(own.dispatcher, own.others, own.slots, settings, count, write_to_stderr)


def operator_app(fleet: Fleet, run_directory: Path, metrics: Metrics) -> ASGIApp:
    """All but inference."""
    admin = _Admin(fleet, run_directory, metrics)
    return Starlette(
        routes=[
            Route("/health", admin.health, methods=["GET"]),
            Route("/metrics", admin.metrics, methods=["GET"], middleware=[Middleware(Guarded, keys=INFERENCE)]),
            Mount(
                "/v1",
                routes=[
                    Route("/models", admin.models, methods=["GET"]),
                    Route("/models/{name}", admin.model, methods=["GET"]),
                ],
                middleware=[Middleware(Guarded, keys=INFERENCE)],
            ),
            Mount(
                "/admin",
                routes=[
                    Route("/state", admin.state, methods=["GET"]),
                    Route("/checkpoints", admin.checkpoints, methods=["GET"]),
                    Route("/checkpoints", admin.register, methods=["POST"]),
                    Route("/checkpoints/{name}", admin.show, methods=["GET"]),
                    Route("/checkpoints/{name}", admin.retire, methods=["DELETE"]),
                    Route("/swap", admin.swap, methods=["POST"]),
                    Route("/trial", admin.try_out, methods=["POST"]),
                    Route("/trial", admin.end_trial, methods=["DELETE"]),
                    Route("/rest", admin.rest, methods=["POST"]),
                    Route("/wake", admin.wake, methods=["POST"]),
                    Route("/replicas", admin.replicas, methods=["GET"]),
                    Route("/replicas", admin.add_replica, methods=["POST"]),
                    Route("/replicas/{name}", admin.remove_replica, methods=["DELETE"]),
                ],
                middleware=[Middleware(Guarded, keys=ADMIN)],
            ),
        ],
        exception_handlers={
            **dict.fromkeys((VcotError, ValidationError, OSError, ValueError), _explain),
            HTTPException: _explain_route,
            Refusal: _explain_refusal,
        },
    )


class _Admin:
    """The gateway's own answers."""

    def __init__(self, fleet: Fleet, run_directory: Path, metrics: Metrics) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._run = str(run_directory.absolute())

    async def health(self, _: Request) -> Response:
        """200 while a checkpoint is live or being swapped, or the servers rest; 503 with the reason else."""
        admission = self._fleet.best.gate.admission
        is_serving = admission.phase in ("live", "resting") or admission.is_changing
        content = {"status": admission.phase, "message": admission.message}
        return _json(content, 200 if is_serving else 503)

    async def metrics(self, _: Request) -> Response:
        """What Prometheus reads."""
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)

    async def models(self, _: Request) -> Response:
        """OpenAI's list: what anyone can ask for right now."""
        return _json({"object": "list", "data": self._cards()})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        card = next((card for card in self._cards() if name in (card["id"], card["root"])), None)
        if card is not None:
            return _json(card)
        message = f"{name[:100]!r} is not served now; /v1/models lists what is"
        return Response(error_body(message, "model_not_found", 404), 404, media_type="application/json")

    def _cards(self) -> list[dict[str, Any]]:
        aliases, created = self._fleet.registry.aliases(), int(time.time())
        data = []
        for checkpoint in self._fleet.served():
            if self._fleet.registry.find(checkpoint.ref.name) is None:  # on trial
                continue
            name, root = checkpoint.ref.name, stamp(checkpoint.ref)
            card = {"object": "model", "created": created, "owned_by": "vcot", "root": root}
            names = dict.fromkeys([*(alias for alias, meant in aliases.items() if meant == name), name])
            data += [{"id": known, **card} for known in names]
        return data

    async def state(self, _: Request) -> Response:
        """What the gateway does now."""
        fleet, admission, live = self._fleet, self._fleet.best.gate.admission, self._fleet.live
        state = GatewayState(
            run=self._run,
            pid=os.getpid(),
            phase=admission.phase,
            message=admission.message,
            live=live.ref if live else None,
            in_flight=sum(replica.in_flight for replica in fleet.replicas),
            aliases=fleet.registry.aliases(),
            warnings=tuple(fleet.warnings),
            num_restarts=sum(replica.num_restarts for replica in fleet.replicas),
            replicas=tuple(replica.state for replica in fleet.replicas),
        )
        return _json(state.model_dump(mode="json"))

    async def replicas(self, _: Request) -> Response:
        """The servers behind the gateway."""
        listed = ReplicaList(replicas=tuple(replica.state for replica in self._fleet.replicas))
        return _json(listed.model_dump(mode="json"))

    async def add_replica(self, request: Request) -> Response:
        """One more; it takes requests once it is verified."""
        wanted = await read_body(request, AddRequest)
        return _json(self._fleet.add(wanted.url).state.model_dump(mode="json"), 202)

    async def remove_replica(self, request: Request) -> Response:
        """Drain and drop one."""
        await self._fleet.remove(request.path_params["name"])
        return await self.replicas(request)

    async def checkpoints(self, _: Request) -> Response:
        """What is registered."""
        registry = self._fleet.registry
        listed = CheckpointList(checkpoints=tuple(registry.describe(c.ref.name) for c in registry.list()))
        return _json(listed.model_dump(mode="json"))

    async def register(self, request: Request) -> Response:
        """Add a checkpoint directory."""
        wanted = await read_body(request, RegisterRequest)
        checkpoint = await asyncio.to_thread(self._fleet.registry.register, Path(wanted.path))
        return _json(checkpoint.ref.model_dump(mode="json"), 201)

    async def show(self, request: Request) -> Response:
        """One checkpoint, and what it is used for."""
        return _json(self._fleet.registry.describe(request.path_params["name"]).model_dump(mode="json"))

    async def retire(self, request: Request) -> Response:
        """Forget a checkpoint."""
        return _json(self._fleet.registry.retire(request.path_params["name"]).model_dump(mode="json"))

    async def swap(self, request: Request) -> Response:
        """Make a checkpoint live."""
        wanted = await read_body(request, SwapRequest)
        return await self._counted(rollout.swap(self._fleet, wanted.alias, wanted.checkpoint), "swapped")

    async def try_out(self, request: Request) -> Response:
        """Put a checkpoint on trial."""
        wanted = await read_body(request, TrialRequest)
        checkpoint = wanted.name or Path(str(wanted.path))
        return await self._counted(rollout.try_out(self._fleet, checkpoint, wanted.owner), "tried")

    async def end_trial(self, request: Request) -> Response:
        """Serve what is live again, if nobody else has the checkpoint on trial."""
        await rollout.end_trial(self._fleet, request.query_params.get("owner", ""))
        return await self.state(request)

    async def rest(self, request: Request) -> Response:
        """Have the servers rest, or rest on."""
        wanted = await read_body(request, RestRequest)
        rested = Rested(ways=await rest.rest(self._fleet, wanted.way, wanted.lease_s))
        return _json(rested.model_dump(mode="json"))

    async def wake(self, request: Request) -> Response:
        """Have them serve again."""
        await read_body(request, Record)
        await rest.wake(self._fleet)
        return await self.state(request)

    async def _counted(self, change: Awaitable[Swapped], done: str) -> Response:
        try:
            swapped = await change
        except VcotError as error:
            self._metrics.count_swap("", type(error).__name__)
            raise
        is_changed = swapped.way != "none"
        outcome = done if is_changed else "unchanged"
        self._metrics.count_swap(swapped.way, outcome, swapped.pause_s if is_changed else None)
        return _json(swapped.model_dump(mode="json"))


def _json(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def _explain_route(request: Request, error: Exception) -> Response:
    """No such route, or not with that method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:100]}"
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    why = "the gateway passes on only what it can bind to one checkpoint's weights"
    message = f"{what} is not served here: {why}, POST {' and POST '.join(INFERENCE_ROUTES)}"
    body = error_body(message, code, error.status_code)
    return Response(body, error.status_code, error.headers, media_type="application/json")


def _explain_refusal(_: Request, error: Exception) -> Response:
    """A body that is not what is meant."""
    assert isinstance(error, Refusal)
    body = error_body(str(error), error.code, error.status)
    return Response(body, error.status, error.headers, media_type="application/json")


def _explain_odd(request: Request, error: OSError | ValueError) -> Response:
    """A path that cannot be used is the client's fault, a full disk the gateway's; all else is a bug, raised for the log."""
    is_own = isinstance(error, OSError) and error.errno in _OWN_FAULTS
    if request.url.path in _TAKE_PATHS and not is_own:
        message = f"that cannot be used ({error}); give the path of a checkpoint's directory"
        return Response(error_body(message, "invalid_request", 422), 422, media_type="application/json")
    if isinstance(error, OSError):
        message = f"the gateway cannot use its own files ({error}); see to its disk, and ask again"
        return Response(error_body(message, "ServerError", 503), 503, media_type="application/json")
    raise error


def _explain(request: Request, error: Exception) -> Response:
    """An error as an answer; the class name of one of ours is the code, so that a client can raise the same again."""
    if isinstance(error, OSError | ValueError) and not isinstance(error, ValidationError):
        return _explain_odd(request, error)
    status = 404 if isinstance(error, CheckpointError) else 409 if isinstance(error, SwapError) else 503
    if isinstance(error, ValidationError):
        fault = error.errors()[0]
        message = f"{'.'.join(map(str, fault['loc'])) or 'body'}: {fault['msg']}"
        return Response(error_body(message, "invalid_request", 422), 422, media_type="application/json")
    return Response(error_body(str(error), type(error).__name__, status), status, media_type="application/json")
