"""The gateway's ASGI application: the OpenAI API for clients, /admin for the operator, each with keys of its own."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from pipeline.errors import CheckpointError, SwapError, VcotError
from pipeline.recipe import ServeSection
from services.admin import GatewayState, RegisterRequest, SwapRequest
from services.gateway.answers import error_body
from services.gateway.engine import Engine
from services.gateway.keys import ADMIN, INFERENCE, Guarded
from services.gateway.limits import Limits, Slots
from services.gateway.metrics import CONTENT_TYPE, Metrics
from services.gateway.observe import Observed
from services.gateway.proxy import Proxy, stamp

_INFERENCE = ("/v1/chat/completions", "/v1/completions", "/v1/models")
_ROUTES = frozenset((*_INFERENCE, "/health", "/metrics", "/admin/state", "/admin/checkpoints", "/admin/swap"))
"""Counted under their own names."""


def build_app(engine: Engine, run_directory: Path, settings: ServeSection, *, max_wait_s: float = 600.0) -> Starlette:
    """The application. A request that meets a swap waits for it, at most `max_wait_s`."""
    slots = Slots(settings.max_in_flight, settings.max_queued)
    proxy = Limits(Proxy(engine, settings, max_wait_s), slots, int(settings.max_body_mb * 1e6))
    metrics = Metrics(engine, slots.places)
    admin = _Admin(engine, run_directory, metrics)
    return Starlette(
        middleware=[Middleware(Observed, metrics=metrics, routes=_ROUTES)],
        routes=[
            Route("/health", admin.health, methods=["GET"]),
            Route("/metrics", admin.metrics, methods=["GET"], middleware=[Middleware(Guarded, keys=INFERENCE)]),
            Mount(
                "/v1",
                routes=[
                    Route("/chat/completions", proxy, methods=["POST"]),
                    Route("/completions", proxy, methods=["POST"]),
                    Route("/models", admin.models, methods=["GET"]),
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
                ],
                middleware=[Middleware(Guarded, keys=ADMIN)],
            ),
        ],
        exception_handlers={VcotError: _explain, ValidationError: _explain},
    )


class _Admin:
    """The gateway's own answers."""

    def __init__(self, engine: Engine, run_directory: Path, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._run = str(run_directory.absolute())

    async def health(self, _: Request) -> Response:
        """200 while a checkpoint is live or being swapped; 503 with the reason else."""
        admission = self._engine.gate.admission
        is_serving = admission.verdict != "refuse"
        content = {"status": admission.phase, "message": admission.message}
        return _json(content, 200 if is_serving else 503)

    async def metrics(self, _: Request) -> Response:
        """What Prometheus reads."""
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)

    async def models(self, _: Request) -> Response:
        """OpenAI's list: what can be asked for right now."""
        live = self._engine.gate.admission.checkpoint
        names: list[str] = []
        if live is not None:
            aliases = self._engine.registry.aliases()
            names = list(dict.fromkeys([*(a for a, name in aliases.items() if name == live.ref.name), live.ref.name]))
        card = {"object": "model", "created": int(time.time()), "owned_by": "vcot", "root": live and stamp(live.ref)}
        return _json({"object": "list", "data": [{"id": name, **card} for name in names]})

    async def state(self, _: Request) -> Response:
        """What the gateway does now."""
        admission = self._engine.gate.admission
        state = GatewayState(
            run=self._run,
            pid=os.getpid(),
            phase=admission.phase,
            message=admission.message,
            live=admission.checkpoint.ref if admission.checkpoint else None,
            in_flight=admission.in_flight,
            aliases=self._engine.registry.aliases(),
            warnings=tuple(self._engine.warnings),
            num_restarts=self._engine.num_restarts,
        )
        return _json(state.model_dump(mode="json"))

    async def checkpoints(self, _: Request) -> Response:
        """What is registered."""
        listed = [
            {"directory": str(c.directory), **c.ref.model_dump(mode="json")} for c in self._engine.registry.list()
        ]
        return _json({"checkpoints": listed})

    async def register(self, request: Request) -> Response:
        """Add a checkpoint directory."""
        wanted = RegisterRequest.model_validate_json(await request.body())
        checkpoint = await asyncio.to_thread(self._engine.registry.register, Path(wanted.path))
        return _json(checkpoint.ref.model_dump(mode="json"), 201)

    async def show(self, request: Request) -> Response:
        """One checkpoint, and what it is used for."""
        return _json(self._engine.registry.describe(request.path_params["name"]).model_dump(mode="json"))

    async def retire(self, request: Request) -> Response:
        """Forget a checkpoint."""
        return _json(self._engine.registry.retire(request.path_params["name"]).model_dump(mode="json"))

    async def swap(self, request: Request) -> Response:
        """Make a checkpoint live."""
        wanted = SwapRequest.model_validate_json(await request.body())
        try:
            swapped = await self._engine.swap(wanted.alias, wanted.checkpoint)
        except VcotError as error:
            self._metrics.count_swap(type(error).__name__)
            raise
        self._metrics.count_swap("swapped" if swapped.pause_s else "unchanged", swapped.pause_s or None)
        return _json(swapped.model_dump(mode="json"))


def _json(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def _explain(_: Request, error: Exception) -> Response:
    """An error of ours as an answer; its class name is the code, so that a client can raise the same again."""
    status = 404 if isinstance(error, CheckpointError) else 409 if isinstance(error, SwapError) else 503
    if isinstance(error, ValidationError):
        fault = error.errors()[0]
        message = f"{'.'.join(map(str, fault['loc'])) or 'body'}: {fault['msg']}"
        return Response(error_body(message, "invalid_request", 422), 422, media_type="application/json")
    return Response(error_body(str(error), type(error).__name__, status), status, media_type="application/json")
