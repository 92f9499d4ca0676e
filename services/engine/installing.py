"""What installs a part that is missing: make in the repository, pip where vcot came as a wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_MAKEFILE = Path(__file__).resolve().parents[2] / "Makefile"


def tell_install(extra: Literal["serve", "train", "ray"], makefile: Path = _MAKEFILE) -> str:
    """The command that installs what serving, training or a Ray cluster needs."""
    if not makefile.is_file():
        return f'pip install "vcot[{extra}]"'
    return "make setup (REQUIREMENTS=gpu on a machine with GPUs)" if extra == "serve" else "make setup"
