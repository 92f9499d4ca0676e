"""How a command is stopped: by Ctrl-C or SIGTERM, once or twice, from its first import on, with one line that says so."""

from __future__ import annotations

import os
import signal
from types import FrameType

SAID = "stopped; the same command, with the same flags, goes on where it was"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


def stop_at_once() -> None:
    """While a command is only imported there is nothing to put in order: the first signal ends the process."""
    for number in _SIGNALS:
        signal.signal(number, _end)


def stop_in_order() -> None:
    """From now on a signal is a KeyboardInterrupt, so that what is under way can be kept."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)


def ignore_signals() -> None:
    """The process is ending already: a second Ctrl-C changes nothing."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def cancel_at_sigterm() -> None:
    """From now on, SIGTERM cancels the present task, so that what it holds is put away."""
    import asyncio  # which a command that serves nothing need not import

    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


def _end(number: int, _: FrameType | None) -> None:
    os.write(2, f"vcot: {SAID}\n".encode())
    os._exit(128 + number)


def _terminate(_: int, __: FrameType | None) -> None:
    raise Terminated
