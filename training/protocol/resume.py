"""Which of TRL's checkpoints is whole, and the curves up to it: what a worker needs to go on after `kill -9`.

TRL writes a checkpoint file by file, and resumes without complaint from one whose optimizer or random state is missing,
with other weights at the end. So a checkpoint counts only with our marker, written last, that lists every file's size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from vcot.pipeline.files import replace_file
from vcot.training.protocol.job import TrainProgress

MARKER = "complete.json"
_PREFIX = "checkpoint-"
_NEEDED = ("adapter_model.safetensors", "scheduler.pt", "trainer_state.json")
_OPTIMIZER = ("optimizer", "global_step")
"""What the optimizer's state is called: a file or, under FSDP and DeepSpeed, a folder."""


def mark_complete(checkpoint: Path) -> None:
    """Put every file of a finished checkpoint on disk, then the marker."""
    sizes = {}
    for path in _files(checkpoint):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes[str(path.relative_to(checkpoint))] = path.stat().st_size
    replace_file(checkpoint / MARKER, json.dumps(sizes))


def find_last_complete(steps: Path, num_processes: int = 1) -> Path | None:
    """The checkpoint with the most steps whose marker agrees with its files; None where there is none.

    Each of `num_processes` ranks needs its random state in it.
    """
    found = [path for path in steps.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return next((path for path in sorted(found, key=step_of, reverse=True) if _is_complete(path, num_processes)), None)


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was saved after."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def truncate_progress(path: Path, step: int) -> float:
    """Drop the points after `step`, and a torn last line; returns the training time spent until then, in seconds."""
    points = [point for point in _read_points(path) if point.step <= step]
    replace_file(path, "".join(f"{point.model_dump_json()}\n" for point in points))
    return points[-1].elapsed_s if points else 0.0


def _read_points(path: Path) -> Iterator[TrainProgress]:
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        try:
            yield TrainProgress.model_validate_json(line)
        except ValidationError:
            return


def _is_complete(checkpoint: Path, num_processes: int) -> bool:
    try:
        sizes: dict[str, int] = json.loads((checkpoint / MARKER).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    states = ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{rank}.pth" for rank in range(num_processes)]
    if not all(name in sizes for name in (*_NEEDED, *states)) or not any(n.startswith(_OPTIMIZER) for n in sizes):
        return False
    return sizes == {str(path.relative_to(checkpoint)): path.stat().st_size for path in _files(checkpoint)}


def _files(checkpoint: Path) -> Iterator[Path]:
    return (path for path in sorted(checkpoint.rglob("*")) if path.is_file() and MARKER not in path.name)
