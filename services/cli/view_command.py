"""`vcot view`: the viewer over one run or several, on this machine, until Ctrl-C."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from vcot.pipeline.errors import InputError
from vcot.services.cli.stop import Terminated, cancel_at_sigterm
from vcot.services.cli.target import run_directory
from vcot.services.cli.terminal import Terminal
from vcot.services.gateway.http.server import UnsignalledServer, quiet_config
from vcot.services.view.entry import TOKEN
from vcot.services.view.shown import ViewedRun
from vcot.services.view.viewer import create_app

HOST = "127.0.0.1"
_GRACE_S = 1
_NUM_BUNDLED = 60


def view(runs: Sequence[Path], port: int, bundle: Path | None, tasks: int | None) -> None:
    """Serve the viewer until a signal, or write its pages into a folder.

    Raises InputError for what is no run, for a port that is taken, and for flags that do not go together.
    """
    directories = runs or [run_directory(None, None)]
    if bundle is not None:
        _write(directories, port, bundle, _NUM_BUNDLED if tasks is None else tasks)
        return
    if tasks is not None:
        raise InputError("--tasks says how many tasks a bundle has; add --bundle DIR")
    shown = [ViewedRun(number, directory) for number, directory in enumerate(directories)]
    try:
        asyncio.run(_serve(shown, port, Terminal()))
    except asyncio.CancelledError:
        raise Terminated from None


def _write(directories: Sequence[Path], port: int, out: Path, num_tasks: int) -> None:
    from vcot.services.view.bundle import write_bundle  # with what makes an index, which a viewer does without

    if len(directories) > 1:
        raise InputError("a bundle is of one run; write one for each")
    if port or num_tasks < 0:
        raise InputError(f"--tasks {num_tasks} must be 0 or more" if num_tasks < 0 else "a bundle has no --port")
    found, terminal = write_bundle(directories[0], out, num_tasks), Terminal()
    left = f"; {found.num_left_out:,} more are only in the run" if found.num_left_out else ""
    terminal.heading("view", str(directories[0]))
    terminal.say(
        f"{out / 'index.html'}: the overview, and {found.num_tasks:,} tasks with their chains and images{left}"
    )


async def _serve(runs: Sequence[ViewedRun], port: int, terminal: Terminal) -> None:
    cancel_at_sigterm()
    token = secrets.token_urlsafe(24)
    config = quiet_config(create_app(runs, token), timeout_graceful_shutdown=_GRACE_S)
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
