"""`serve.gateway_workers` processes that carry requests, started and kept by the one that decides.

Model: all accept from one listening socket, so that whoever is free takes the next connection. Each has a line to this
process, where every request gets its engine and is held until it is over: so a swap waits for the requests of all, and no
worker can stamp an answer with weights that it did not ask for here. A worker that ends takes its own requests with it, and
another is started in its place.
"""

from __future__ import annotations

import asyncio
import mmap
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vcot.services.engine.serve_section import ServeSection
from vcot.services.gateway.fleet.group import Fleet
from vcot.services.gateway.http.app import make_deciding
from vcot.services.gateway.http.limits import Counts
from vcot.services.gateway.workers.desk import Desk
from vcot.services.gateway.workers.wire import Begin

_STOP_S = 10.0
"""What a worker that is asked to stop may still take, before it is killed."""
_MAX_PAUSE_S = 30.0


class Workers:
    """The processes of one gateway."""

    def __init__(
        self,
        fleet: Fleet,
        run_directory: Path,
        settings: ServeSection,
        listener: socket.socket,
        say: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._say = say
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - the workers map it, too, as long as this process lives
        self._file.truncate(Counts.ROW_BYTES * (settings.gateway_workers + 1))
        self._memory = memoryview(mmap.mmap(self._file.fileno(), 0))
        counts = Counts(self._memory, settings.gateway_workers)
        self._deciding = make_deciding(fleet, run_directory, settings, counts)
        self._desks: set[Desk] = set()

    async def serve(self) -> None:
        """Keep them up until cancelled; then they end what they are at, as far as they can in a few seconds."""
        with self._file:
            async with asyncio.TaskGroup() as group:
                for row in range(self._settings.gateway_workers):
                    group.create_task(self._keep(row))

    async def _keep(self, row: int) -> None:
        pause_s = 0.5
        while True:
            began = time.monotonic()
            status = await self._work(row)
            pause_s = 0.5 if time.monotonic() - began > _MAX_PAUSE_S else min(_MAX_PAUSE_S, 2 * pause_s)
            self._say(f"gateway worker {row} ended with status {status}; starting another in {pause_s:.0f} s")
            await asyncio.sleep(pause_s)

    async def _work(self, row: int) -> int:
        """One process, from its start to its end; its exit status."""
        ours, theirs = socket.socketpair()
        with theirs:
            descriptors = (self._listener.fileno(), theirs.fileno(), self._file.fileno())
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "vcot.services.gateway.workers", *map(str, descriptors), str(row)),
                pass_fds=descriptors,
                stdin=asyncio.subprocess.DEVNULL,
            )
        _, desk = await asyncio.get_running_loop().create_connection(self._make_desk, sock=ours)
        desk.send(Begin(settings=self._settings))
        self._desks.add(desk)
        try:
            return await process.wait()
        finally:
            await _stop(process)
            desk.close()
            self._desks.discard(desk)
            Counts(self._memory, row).clear()

    def _make_desk(self) -> Desk:
        return Desk(self._deciding, self._tell_suspicion)

    def _tell_suspicion(self) -> None:
        for desk in self._desks:
            desk.tell_suspicion()


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(_STOP_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
