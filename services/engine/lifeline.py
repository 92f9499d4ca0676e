"""Runs one command that must not outlive the process that wanted it, however that process ends.

Model: a small keeper process (this file, run as a script) stands between the two. Its standard input is a pipe whose
other end only the wanting process holds; when that end closes (stopped, crashed or killed -9), the keeper ends the
command's whole process group: SIGTERM, a grace period, SIGKILL. It is a subreaper, so that what the command started and
orphaned is ended, too. Should the keeper itself be killed, the kernel sends the command SIGTERM. The keeper has the
command's exit status.

Limits: standard library only, and no import of vcot (it runs with -I, in about 20 ms). A command that a signal ended
gives 128 + the signal's number. Elsewhere than on Linux only the process group is ended.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.05


def keeper_command(command: Sequence[str], grace_s: float) -> list[str]:
    """The command line that runs `command` under a keeper; give it a pipe for standard input, and a session of its own."""
    return [sys.executable, "-I", __file__, str(grace_s), *command]


def keep(command: Sequence[str], grace_s: float) -> int:
    """Run `command` until it ends or standard input closes; the exit status."""
    prctl: Callable[..., int] = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: 0
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0),  # safe: no other thread runs yet
    )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: _stop(process, grace_s))
    threading.Thread(target=_stop_at_end_of_input, args=(process, grace_s), daemon=True).start()
    status = process.wait()
    _kill_remaining(process.pid)
    return status if status >= 0 else 128 - status


def _stop_at_end_of_input(process: subprocess.Popen[bytes], grace_s: float) -> None:
    while os.read(0, 4096):
        pass
    _stop(process, grace_s)


def _stop(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Ask the command to end (only it: it stops its own children), then make the whole group end."""
    if process.poll() is not None:
        return
    process.terminate()
    timer = threading.Timer(grace_s, _signal_group, (process.pid, signal.SIGKILL))
    timer.daemon = True
    timer.start()


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return


def _kill_remaining(group: int) -> None:
    """End what the command left behind: its group, and orphans that came to us as their subreaper."""
    _signal_group(group, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        for pid in _own_children():
            os.kill(pid, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(_POLL_S)
        except ChildProcessError:
            return


def _own_children() -> list[int]:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in children.read_text("ascii").split()] if children.exists() else []


if __name__ == "__main__":
    sys.exit(keep(sys.argv[2:], float(sys.argv[1])))
