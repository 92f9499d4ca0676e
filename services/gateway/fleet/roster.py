"""Which servers a run's gateway has: the recipe's, and what the operator has added and removed since.

`<run>/replicas.json` keeps the changes over a restart of the gateway. It says, too, of which recipe settings it is a change:
with others in the recipe it counts no more.
"""

from __future__ import annotations

from pathlib import Path

from vcot.pipeline.addresses import UpstreamUrl
from vcot.pipeline.errors import CheckpointError
from vcot.pipeline.files import read_record, write_kept_record
from vcot.pipeline.records import Record
from vcot.services.engine.serve_section import ServeSection

_FILE = "replicas.json"


class Servers(Record):
    """Own servers, by number, and those of others, by URL."""

    num_own: int
    upstreams: tuple[UpstreamUrl, ...]


class ReplicaRoster(Record):
    """`replicas.json`."""

    recipe: Servers
    now: Servers


class Roster:
    """The servers of one run. Mutated by its fleet only; each change is on disk before it counts."""

    def __init__(self, run_directory: Path, settings: ServeSection) -> None:
        self._path = run_directory / _FILE
        self._recipe = Servers(
            num_own=0 if settings.upstreams else settings.replicas, upstreams=tuple(dict.fromkeys(settings.upstreams))
        )
        self.now = self._read()

    def add(self, url: str | None) -> None:
        """One more of our own, or the one at `url`."""
        if url is None:
            self._write(self.now.num_own + 1, self.now.upstreams)
        else:
            self._write(self.now.num_own, (*self.now.upstreams, url))

    def remove(self, url: str | None) -> None:
        """One less of our own, or not the one at `url`."""
        if url is None:
            self._write(self.now.num_own - 1, self.now.upstreams)
        else:
            self._write(self.now.num_own, tuple(known for known in self.now.upstreams if known != url))

    def _read(self) -> Servers:
        changed = read_record(self._path, ReplicaRoster, CheckpointError, remedy="delete it for the recipe's replicas")
        return changed.now if changed is not None and changed.recipe == self._recipe else self._recipe

    def _write(self, num_own: int, upstreams: tuple[str, ...]) -> None:
        now = Servers(num_own=num_own, upstreams=upstreams)
        write_kept_record(self._path, ReplicaRoster(recipe=self._recipe, now=now))
        self.now = now
