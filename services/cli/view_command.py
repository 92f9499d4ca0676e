"""`vcot view`: the viewer over one run or several, on this machine, until Ctrl-C."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import uvicorn

from pipeline.errors import InputError
from services.cli.opening import cancel_at_sigterm, run_directory
from services.cli.stop import Terminated
from services.cli.terminal import Terminal
from services.gateway.http.server import UnsignalledServer
from services.view.entry import TOKEN
from services.view.shown import ViewedRun
from services.view.viewer import create_app

HOST = "127.0.0.1"
_GRACE_S = 1


def view(runs: Sequence[Path], port: int) -> None:
    """Serve the viewer until a signal. Raises InputError for what is no run, and a port that is taken."""
    shown = [ViewedRun(number, directory) for number, directory in enumerate(runs or [run_directory(None, None)])]
    try:
        asyncio.run(_serve(shown, port, Terminal()))
    except asyncio.CancelledError:
        raise Terminated from None


async def _serve(runs: Sequence[ViewedRun], port: int, terminal: Terminal) -> None:
    cancel_at_sigterm()
    token = secrets.token_urlsafe(24)
    config = uvicorn.Config(
        create_app(runs, token),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
    )
    with _listen(port) as listener, ExitStack() as stack:
        for run in runs:
            stack.callback(run.stop)
            run.start()
        where = f"http://{HOST}:{listener.getsockname()[1]}"
        terminal.heading("view", ", ".join(str(run.directory) for run in runs))
        terminal.say(f"{where}/?{TOKEN}={token}")
        terminal.say("open it in a browser on this machine; Ctrl-C ends it, and touches no run")
        await UnsignalledServer(config).serve(sockets=[listener])


def _listen(port: int) -> socket.socket:
    listener = socket.socket(proto=socket.IPPROTO_TCP)  # of which asyncio sees that answers are sent at once
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise InputError(f"port {port} cannot be used ({error.strerror}); give another with --port, or none") from None
    return listener
