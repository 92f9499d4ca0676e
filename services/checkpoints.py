"""The registry. SKELETON, signatures final."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.recipe import ModelSection
from pipeline.records import CheckpointManifest, CheckpointRef


@dataclass(frozen=True)
class Checkpoint:
    """A registered checkpoint: where its files are, and what they are."""

    directory: Path
    manifest: CheckpointManifest

    @property
    def ref(self) -> CheckpointRef:
        """Name and digest."""
        return self.manifest.checkpoint


class Registry:
    """The checkpoints of one run, in `<run>/checkpoints/registry.json`; safe to use from several processes."""

    def __init__(self, run_directory: Path) -> None:
        raise NotImplementedError

    def base(self, model: ModelSection) -> Checkpoint:
        """The recipe's untaught model under `model.name`, found, digested and registered at first use. Slow for big models."""
        raise NotImplementedError

    def register(self, directory: Path) -> Checkpoint:
        """Verify and add a directory with checkpoint.json; adding the same one again changes nothing. CheckpointError."""
        raise NotImplementedError

    def resolve(self, name: str) -> Checkpoint:
        """The checkpoint of that name or alias. Raises CheckpointError, naming the nearest."""
        raise NotImplementedError

    def list(self) -> list[Checkpoint]:
        """All registered checkpoints, in the order of registration."""
        raise NotImplementedError
