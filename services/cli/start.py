"""The `vcot` script: what it takes half a second to import may be interrupted, too."""

from __future__ import annotations

import os
import sys

from vcot.services.cli.stop import stop_at_once


def main() -> None:
    """The entry point."""
    open_streams()
    stop_at_once()
    from vcot.services.cli.outcome import main as run

    run()


def open_streams() -> None:
    """What would be written to a stream that the caller closed (`>&-`) goes nowhere, and not into a file of the run.

    The first file to be opened would be that stream for whatever else writes to it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, number)
            os.set_inheritable(number, True)
            if nowhere != number:
                os.close(nowhere)
            setattr(sys, name, open(number, "w" if number else "r"))  # noqa: SIM115, PTH123 - open as long as the process
