"""What a checkpoint is called in answers to clients, and by vLLM."""

from __future__ import annotations

from vcot.pipeline.records import CheckpointRef
from vcot.services.engine.command import SERVED_NAME


def stamp(ref: CheckpointRef, name: str = "") -> str:
    """What the `model` field of an answer says; `name` may be an alias of the checkpoint."""
    return f"{name or ref.name}@{_short(ref)}"


def served_name(ref: CheckpointRef) -> str:
    """What vLLM calls a checkpoint: an adapter by name and digest, so that its caches are its own; else what it holds."""
    return f"{ref.name}-{_short(ref)}" if ref.kind == "adapter" else SERVED_NAME


def _short(ref: CheckpointRef) -> str:
    return ref.digest.removeprefix("sha256:")[:12]
