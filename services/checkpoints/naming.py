"""What a checkpoint may be called: its name is a file's, a part of a URL, and what clients ask for."""

from __future__ import annotations

import re

from vcot.pipeline.errors import CheckpointError

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def is_name(name: str) -> bool:
    """Whether a checkpoint may be called that."""
    return _SAFE_NAME.fullmatch(name) is not None


def check_name(name: str) -> str:
    """The name, if it can be a file's, a URL's and an API model's. Raises CheckpointError."""
    if not is_name(name):
        raise CheckpointError(
            f"checkpoint name {name!r} is not letters, digits, '.', '_' and '-' (at most 100, a letter or digit first)"
        )
    return name
