"""A hub's cache as its client leaves it: what `snapshot_download` finds without a network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal


def write_snapshot(
    cache: Path, kind: Literal["model", "dataset"], name: str, revision: str, files: Mapping[str, bytes]
) -> Path:
    """Put `files`, by path in the repository, into the cache as revision `revision`, to which `main` points; its folder.

    Contents lie under `blobs`, and a snapshot is a folder of symbolic links to them.
    """
    repository = cache / f"{kind}s--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / revision
    for path, content in files.items():
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = snapshot / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(Path(*[".."] * (len(link.relative_to(repository).parts) - 1), "blobs", blob.name))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(revision)
    return snapshot
