"""Whether a checkpoint's files are still those that were registered: by their digest, and cheaply by their state."""

from __future__ import annotations

from pathlib import Path

from vcot.pipeline.errors import CheckpointError
from vcot.pipeline.identity import MANIFEST, compute_digest
from vcot.pipeline.records import CheckpointRef

FileState = tuple[tuple[str, int, int], ...]
"""Of each file its name, size and the time of its last change (ns)."""


def check_digest(directory: Path, ref: CheckpointRef) -> None:
    """Raise CheckpointError unless the files are those that `ref` is of; reads all of them."""
    digest = compute_digest(directory)
    if digest != ref.digest:
        raise CheckpointError(
            f"checkpoint {ref.name} in {directory} has weights {digest[:19]}, but was {ref.digest[:19]} when it was made; "
            "its files were changed: restore them, or make it again"
        )


def stat_files(directory: Path) -> FileState:
    """Every file but the manifest, with what would change if it were written again.

    The time is that of the inode's last change, which nobody can set: a copy that keeps a file's own time changes it, too.
    """
    stats = (
        (path.name, path.stat()) for path in sorted(directory.glob("*")) if path.is_file() and path.name != MANIFEST
    )
    return tuple((name, status.st_size, status.st_ctime_ns) for name, status in stats)
