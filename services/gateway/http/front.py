"""What clients meet: the OpenAI API with its limits and keys, and the way to all else. ASGI."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from vcot.services.engine.serve_section import ServeSection
from vcot.services.gateway.http.answers import Refusal, send_refusal
from vcot.services.gateway.http.keys import INFERENCE, Guarded
from vcot.services.gateway.http.limits import Counts, Limits, Slots
from vcot.services.gateway.http.observe import Count, Observed, Write
from vcot.services.gateway.http.proxy import Proxy
from vcot.services.gateway.http.ticket import Dispatch

INFERENCE_ROUTES = ("/v1/chat/completions", "/v1/completions")
_ROUTES = frozenset(
    (
        *INFERENCE_ROUTES,
        "/v1/models",
        "/health",
        "/metrics",
        "/admin/state",
        "/admin/checkpoints",
        "/admin/swap",
        "/admin/trial",
        "/admin/rest",
        "/admin/wake",
        "/admin/replicas",
    )
)
"""Counted under their own names."""


def make_slots(settings: ServeSection, counts: Counts | None = None, kind: type[Slots] = Slots) -> Slots:
    """What the recipe allows; `counts` where several processes share it."""
    return kind(settings.max_in_flight, settings.max_queued, int(settings.max_held_mb * 1e6), counts)


def build_front(
    dispatch: Dispatch, others: ASGIApp, slots: Slots, settings: ServeSection, count: Count, log: Write
) -> ASGIApp:
    """The application; `others` answers all but inference."""
    limited = Limits(Proxy(dispatch, settings), slots, int(settings.max_body_mb * 1e6))
    return Observed(_Gateway(Guarded(limited, INFERENCE), others), count, _ROUTES, log)


class _Gateway:
    """Inference goes straight to the proxy; Starlette finds the way of all else."""

    def __init__(self, inference: ASGIApp, others: ASGIApp) -> None:
        self._inference = inference
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in INFERENCE_ROUTES:
            await self._others(scope, receive, send)
        elif scope["method"] == "POST":
            await self._inference(scope, receive, send)
        else:
            refusal = Refusal(405, "method_not_allowed", f"{scope['path']} takes POST", headers={"allow": "POST"})
            await send_refusal(scope, send, refusal)
