"""The keys of APIs, which stand in the environment and nowhere else."""

from __future__ import annotations

import os

from vcot.pipeline.errors import MachineError


def read_key(variable: str) -> str:
    """The key in an environment variable, without the space around it; empty where there is none.

    Raises MachineError, which does not show it, for one that no request can carry.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise MachineError(
            f"{variable} holds a line break or a character that is not ASCII, and no request can carry that; set it to the "
            "key alone"
        )
    return key
