"""uvicorn, as a process of the gateway runs it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from vcot.services.gateway.http import heap
from vcot.services.gateway.http.connection import KEEP_ALIVE_S, ClientConnection

_PROXIES = "127.0.0.0/8,::1"


async def serve_app(app: ASGIApp, listener: socket.socket) -> None:
    """Answer who connects there until cancelled; then answers that are on the way have a few seconds to end."""
    server = UnsignalledServer(
        quiet_config(app, http=ClientConnection, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=5)
    )
    heap.settle()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.shield(serving)
    finally:
        server.should_exit = True
        await asyncio.wait({serving})


def quiet_config(app: ASGIApp, **options: Any) -> uvicorn.Config:
    """HTTP alone, without a line for each request; `options` are uvicorn's.

    Only a proxy of this machine is believed whose request it passes on, whatever FORWARDED_ALLOW_IPS says: who seems to be
    of this machine needs no key where none is set (keys.py).
    """
    return uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        forwarded_allow_ips=_PROXIES,
        **options,
    )


class UnsignalledServer(uvicorn.Server):
    """Takes no signals: uvicorn's own handling raises them again before its caller has put things away."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield
