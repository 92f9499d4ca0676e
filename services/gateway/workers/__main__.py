"""`python -m vcot.services.gateway.workers LISTENER LINE COUNTS ROW`: one worker, on descriptors that it was given."""

from __future__ import annotations

import asyncio
import mmap
import signal
import socket
import sys

from vcot.services.gateway.http.front import build_front, make_slots
from vcot.services.gateway.http.limits import Counts
from vcot.services.gateway.http.observe import write_to_stderr
from vcot.services.gateway.http.server import serve_app
from vcot.services.gateway.workers.carrier import RemoteDispatch, TurnsElsewhere


async def work(listener: socket.socket, line_socket: socket.socket, counts: Counts) -> None:
    """Carry requests until SIGTERM, or until the deciding process is gone."""
    loop = asyncio.get_running_loop()
    _, line = await loop.create_connection(RemoteDispatch, sock=line_socket)
    settings = await line.begun
    slots = make_slots(settings, counts, TurnsElsewhere)
    app = build_front(line, line.call, slots, settings, line.count, write_to_stderr)
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # at Ctrl-C the deciding process ends this one
    serving = asyncio.create_task(serve_app(app, listener))
    ends = [asyncio.create_task(line.ended.wait()), asyncio.create_task(stop.wait())]
    await asyncio.wait({serving, *ends}, return_when=asyncio.FIRST_COMPLETED)
    for task in (serving, *ends):
        task.cancel()
    await asyncio.wait({serving})


def main(listener: int, line: int, counts: int, row: int) -> None:
    """The command."""
    import uvloop

    memory = memoryview(mmap.mmap(counts, 0))
    uvloop.run(work(socket.socket(fileno=listener), socket.socket(fileno=line), Counts(memory, row)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
