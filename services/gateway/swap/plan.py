"""What a replica should hold: the registry's live checkpoint, and the adapters of it that an alias means.

`checkpoint` and `adapters` are cheap, and true at the moment of the call; `verified` and `publish` read whole files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vcot.pipeline.errors import CheckpointError
from vcot.pipeline.files import replacing_folder
from vcot.pipeline.identity import compute_digest
from vcot.services.checkpoints.registry import BASE_ALIAS, Checkpoint, Registry


@dataclass
class Plan:
    """Mutated by its Replica, and by the swap that starts one for a checkpoint that is not live yet."""

    registry: Registry
    warn: Callable[[str], None]
    pinned: Checkpoint | None = None
    """What a replica was added for, registered or not, until that is live."""
    _excluded: set[str] = field(default_factory=set)
    """Digests of what turned out to be unusable."""

    def checkpoint(self) -> Checkpoint:
        """The weights. Raises CheckpointError."""
        if self.pinned is not None:
            return self.pinned
        live = self.registry.find(self.registry.live() or BASE_ALIAS)
        return self.registry.resolve(BASE_ALIAS) if live is None or live.ref.digest in self._excluded else live

    def adapters(self, checkpoint: Checkpoint) -> list[Checkpoint]:
        """What is to be served on them."""
        meant = [self.registry.find(alias) for alias in self.registry.aliases()]
        found = {a.ref.digest: a for a in meant if a and a.ref.kind == "adapter" and a.ref.digest not in self._excluded}
        return [adapter for adapter in found.values() if adapter.ref.parent == checkpoint.ref.digest]

    def exclude(self, checkpoint: Checkpoint, reason: str) -> None:
        """Do without it, aloud, until the replica is started again."""
        self._excluded.add(checkpoint.ref.digest)
        self.warn(f"checkpoint {checkpoint.ref.name} is not served: {reason}")

    def verified(self) -> Checkpoint:
        """The checkpoint, its files verified; the base where they are not what they were. Raises CheckpointError.

        Nothing takes the place of what a replica was added for.
        """
        self._excluded.clear()
        checkpoint = self.checkpoint()
        if self.registry.find(checkpoint.ref.name) is None:
            return self.registry.inspect(checkpoint.directory)
        try:
            return self.registry.verify(checkpoint.ref.name)
        except CheckpointError as error:
            base = self.registry.resolve(BASE_ALIAS)
            if base.ref.name == checkpoint.ref.name or self.pinned is not None:
                raise
            self._excluded.add(checkpoint.ref.digest)
            self.warn(f"{base.ref.name} is served instead of {checkpoint.ref.name}: {error}")
            return self.registry.verify(base.ref.name)

    def publish(self, adapter: Checkpoint) -> Path:
        """The directory that vLLM reads it from, made at first use. Raises CheckpointError.

        A copy under the digest: its path was never anything else's, and vLLM reads it again whenever it made room.
        """
        folder = self.registry.served_folder / adapter.ref.digest.removeprefix("sha256:")
        with self.registry.publishing():
            if not folder.is_dir():
                with replacing_folder(folder) as whole:
                    shutil.copytree(adapter.directory, whole, dirs_exist_ok=True)
            if compute_digest(folder) != adapter.ref.digest:
                shutil.rmtree(folder)
                raise CheckpointError(
                    f"adapter {adapter.ref.name} in {adapter.directory} is not what was registered; restore it, or make it "
                    "again"
                )
        return folder
