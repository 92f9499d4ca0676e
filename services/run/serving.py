"""Serving a run: the process that answers at one URL, and how other commands find it, start it and steer it.

Model: one process is the gateway (uvicorn) and supervises the vLLM servers below it. While it listens,
`<run>/serving.json` says where, and as which process. A command that needs the gateway uses the one that serves the run
already, or starts

    python -m vcot.services.run.serving RUN [section.field=value ...]

as a child of its own, which ends with the command, however that ends.

Limits: one gateway for a run; commands on the same host.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from vcot.pipeline.errors import MachineError, ServerError, UnreachableError, VcotError
from vcot.pipeline.printable import printable
from vcot.pipeline.records import Record
from vcot.services.checkpoints.registry import Checkpoint, Registry
from vcot.services.engine.command import can_sleep, find_build
from vcot.services.engine.lifeline import keeper_command
from vcot.services.engine.logs import bound, keep_bounded
from vcot.services.engine.serve_section import ServeSection
from vcot.services.gateway.admin import fetch_state, named_error, wake
from vcot.services.recipes.recipe import Recipe
from vcot.services.run.announcement import announced, is_served, only_gateway, owning, read_serving
from vcot.services.run.directory import Run, open_run

if TYPE_CHECKING:
    from vcot.services.gateway.fleet.group import Fleet

Progress = Callable[[str], None]
"""Takes one short line on what is being waited for."""

_log = logging.getLogger(__name__)
_GRACE_S = 20.0
_POLL_S = 0.2
_STALLED_CLIENT_MS = 60_000


@dataclass(frozen=True)
class GatewayHandle:
    """A live gateway of a run."""

    url: str
    """For example http://127.0.0.1:8100; the OpenAI API is under /v1."""
    started_here: bool
    """Whether this command started it (and stops it at exit)."""


class Failure(Record):
    """What a gateway that could not serve says on its standard output."""

    kind: str
    """Name of the exception, in vcot.pipeline.errors."""
    message: str


def serve(run: Run, progress: Progress, *, owned: bool = False) -> None:
    """Serve the run until SIGINT or SIGTERM: the gateway in this process, vLLM supervised as a child.

    `owned`: for a command that started this process and ends it.

    Raises MachineError for a port in use or a run that is served already, CheckpointError, and ServerError where vLLM
    does not start.
    """
    import uvloop

    uvloop.run(_serve(run, progress, owned))


async def _serve(run: Run, progress: Progress, owned: bool) -> None:
    from vcot.services.engine.ray_server import RayServer
    from vcot.services.engine.vllm import VllmServer
    from vcot.services.gateway.fleet.group import Fleet
    from vcot.services.gateway.fleet.roster import Roster
    from vcot.services.gateway.http import keys
    from vcot.services.gateway.swap.claim import find_owner

    settings = run.recipe.serve
    with only_gateway(run), _listening(settings) as listener, ExitStack() as saying:
        url = _url(listener)
        saying.enter_context(announced(run, url, owned))
        registry = Registry(run.directory)
        await asyncio.to_thread(registry.base, run.recipe.model, progress)
        max_lora_rank = served_lora_rank(run.recipe)

        def launch(checkpoint: Checkpoint, number: int, devices: str | None) -> VllmServer | RayServer:
            log = run.path("logs", f"vllm-{number}.log" if number else "vllm.log").absolute()
            if settings.ray_address is not None:
                return RayServer(checkpoint, settings, log, max_lora_rank)
            return VllmServer(checkpoint, settings, log, devices, max_lora_rank)

        fleet = Fleet(
            registry,
            settings,
            Roster(run.directory, settings),
            launch,
            progress,
            max_lora_rank=max_lora_rank,
            can_sleep=_can_sleep(settings),
            owner=find_owner(run.directory, f"{url} (process {os.getpid()} on {socket.gethostname()})"),
        )
        progress(f"the gateway listens at {url}")
        for warning in keys.warnings(listener.getsockname()[0]):
            fleet.warn(warning)
        front = _front(fleet, run.directory, settings, listener, progress)
        await _serve_until_stopped(fleet, front, run.directory / "logs", saying.close)


def _can_sleep(settings: ServeSection) -> bool:
    """Whether servers of our own have vLLM's sleep mode; of Ray's nodes we know that they have GPUs. Raises MachineError."""
    if settings.upstreams:
        return False
    if settings.ray_address is not None:
        return can_sleep(settings, "cuda" if settings.gpus_per_replica else "cpu")
    return can_sleep(settings, find_build())


def served_lora_rank(recipe: Recipe) -> int | None:
    """The rank of the adapters that servers must take; None where the recipe makes none that vLLM could serve."""
    may_serve = recipe.train.target_modules == "language-model" or recipe.serve.swap == "adapter"
    return recipe.train.lora_r if may_serve else None


def _front(
    fleet: Fleet, directory: Path, settings: ServeSection, listener: socket.socket, progress: Progress
) -> Coroutine[None, None, None]:
    """What answers clients until cancelled: this process, or workers of its."""
    from vcot.services.gateway.http.app import build_app  # with uvicorn a third of a second that others need not pay
    from vcot.services.gateway.http.server import serve_app
    from vcot.services.gateway.workers.processes import Workers

    if settings.gateway_workers > 1:
        return Workers(fleet, directory, settings, listener, progress).serve()
    return serve_app(build_app(fleet, directory, settings), listener)


async def _serve_until_stopped(
    fleet: Fleet, front: Coroutine[None, None, None], logs: Path, withdraw: Callable[[], None]
) -> None:
    """Until a signal, or until the fleet gives up, whose error is raised; no command is sent here from then on."""
    from vcot.services.gateway.fleet.rest import end_forgotten_rests
    from vcot.services.gateway.swap.rollout import end_forgotten_trials

    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    serving = asyncio.create_task(front)
    supervising = asyncio.create_task(fleet.run())
    work_on = (
        partial(end_forgotten_trials, fleet),
        partial(end_forgotten_rests, fleet),
        partial(keep_bounded, logs),
    )
    housekeeping = [asyncio.create_task(_persist(work)) for work in work_on]
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({serving, supervising, *housekeeping, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (serving, supervising, *housekeeping):
            if task.done():
                task.result()
    finally:
        withdraw()
        serving.cancel()
        await asyncio.wait({serving})
        ends = (supervising, *housekeeping, stopping)
        for each in ends:
            each.cancel()
        await asyncio.gather(*ends, return_exceptions=True)


async def _persist(work: Callable[[], Awaitable[None]], pause_s: float = 5.0) -> None:
    """Do a housekeeper's endless work; a bug in it is told, and ends neither it nor the gateway."""
    while True:
        try:
            await work()
        except Exception:  # noqa: BLE001 - neither the work nor the gateway ends by it
            _log.exception("the gateway's housekeeping failed and goes on in %g s", pause_s)
        await asyncio.sleep(pause_s)


@asynccontextmanager
async def running_gateway(run: Run, progress: Progress) -> AsyncIterator[GatewayHandle]:
    """The run's live gateway: the one that serves already, or a child started here and stopped at exit.

    Raises what kept the gateway from serving.
    """
    if is_served(run) and (url := await _until_live(run, progress, None)) is not None:
        yield GatewayHandle(url, started_here=False)
        return
    with owning(run):
        async with _child(run) as child:
            url = await _until_live(run, progress, child)
            assert url is not None
            yield GatewayHandle(url, started_here=True)


@asynccontextmanager
async def _child(run: Run) -> AsyncIterator[asyncio.subprocess.Process]:
    command = [sys.executable, "-P", "-m", "vcot.services.run.serving", str(run.directory.absolute()), *run.overrides]
    path = run.path("logs", "gateway.log")
    bound(path)
    with path.open("ab") as log:
        child = await asyncio.create_subprocess_exec(
            *keeper_command(command, _GRACE_S),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        assert child.stdin is not None
        child.stdin.close()
        await child.wait()


async def _until_live(run: Run, progress: Progress, child: asyncio.subprocess.Process | None) -> str | None:
    """The gateway's URL, once a checkpoint is live; says what is being waited for.

    None where it is another command's, and ends: that command was stopped or killed a moment ago.
    """
    said, deadline = "", time.monotonic() + 2 * run.recipe.serve.start_timeout_s
    while time.monotonic() < deadline:
        if child is not None and child.returncode is not None:
            raise await _failure_of(child, run)
        if child is None and not is_served(run):
            return None
        message = said or ("starting the gateway" if child is not None else "waiting for the gateway")
        if (serving := read_serving(run)) is not None and is_served(run):
            try:
                state = await fetch_state(serving.url)
            except UnreachableError:
                pass  # it listens in a moment
            else:
                if state.phase == "resting":  # for a command that was killed, or another that holds the run no more
                    state = await wake(serving.url)
                if state.live is not None:
                    return serving.url
                message = state.message
        if message != said:
            progress(message)
            said = message
        await asyncio.sleep(_POLL_S)
    raise ServerError(f"the gateway of {run.directory} was not ready in time ({said}); see {run.path('logs')}")


async def _failure_of(child: asyncio.subprocess.Process, run: Run) -> VcotError:
    assert child.stdout is not None
    text = await child.stdout.read()
    try:
        failure = Failure.model_validate_json(text)
    except ValidationError:
        log = run.path("logs", "gateway.log")
        return ServerError(f"the gateway ended with status {child.returncode}; see {log}")
    return named_error(failure.kind, failure.message)


@contextmanager
def _listening(settings: ServeSection) -> Iterator[socket.socket]:
    """A bound socket, so that a port in use is said before anything is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise MachineError(f"serve.host = {settings.host!r} is no address of this machine ({error.strerror})") from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # A client that stopped reading is dropped by the kernel, with the answer that is buffered for it.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_CLIENT_MS)
        try:
            listener.bind(address)
            listener.listen(2048)
        except OSError as error:
            raise MachineError(
                f"port {settings.port} on {settings.host} cannot be used ({error.strerror}); stop what uses it, or set "
                "serve.port to another (0 takes a free one)"
            ) from None
        yield listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def main(arguments: list[str]) -> int:
    """`python -m vcot.services.run.serving RUN`: what `running_gateway` starts."""

    def say(message: str) -> None:
        with contextlib.suppress(OSError):  # a full disk stops the log, and nothing else
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {printable(message)}\n")
            sys.stderr.flush()

    try:
        with open_run(Path(arguments[0]), None, arguments[1:]) as run:
            serve(run, say, owned=True)
    except VcotError as error:
        say(str(error))
        sys.stdout.write(Failure(kind=type(error).__name__, message=str(error)).model_dump_json())
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
