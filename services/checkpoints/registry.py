"""The checkpoints that a run knows, and which of them answers to which name.

Model: `<run>/checkpoints/registry.json` maps names to directories and manifests, and aliases to names; it also holds which
checkpoint is live. It is replaced in one step under a lock, so several processes may use it, and it is read again when it
has changed. A digest is recomputed only where a file's size or time of change did: 14 GB are not read at each command.

A checkpoint that was trained is registered once it was seen to be served as it was trained (`stages.parity_stage`). Until
then it is a directory in `<run>/checkpoints`, and no alias can mean it.

Limits: a checkpoint's files stay where they are; only a base's manifest, which the hub does not have, is kept in the run.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from pydantic import Field

from vcot.pipeline.errors import CheckpointError
from vcot.pipeline.files import read_record, write_kept_record
from vcot.pipeline.identity import MANIFEST, read_manifest
from vcot.pipeline.manifest import CheckpointManifest
from vcot.pipeline.records import CheckpointRef, Record
from vcot.pipeline.sections import POLICY_ALIAS, ModelSection
from vcot.services.checkpoints.integrity import FileState, check_digest, stat_files
from vcot.services.checkpoints.model_source import find_model
from vcot.services.checkpoints.naming import check_name, is_name

BASE_ALIAS = "base"
_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Checkpoint:
    """A registered checkpoint: where its files are, and what they are."""

    directory: Path
    manifest: CheckpointManifest
    chat_template: Path | None = None
    """What to serve it with where its own template had to be mended."""

    @property
    def ref(self) -> CheckpointRef:
        """Name and digest."""
        return self.manifest.checkpoint


class Entry(Record):
    """One registered checkpoint."""

    directory: str
    manifest: CheckpointManifest
    chat_template: str | None = None
    source: str | None = None
    """What the recipe called a base that was found by `Registry.base`."""
    files: FileState
    """Name, size and time of change (ns) of each file when the digest was computed."""

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """As the rest of the program sees it."""
        template = Path(self.chat_template) if self.chat_template else None
        return Checkpoint(Path(self.directory), self.manifest, template)


class CheckpointInfo(Record):
    """What is known of one registered checkpoint."""

    checkpoint: CheckpointRef
    directory: str
    job: str | None
    """Key of the training job that made it."""
    aliases: tuple[str, ...]
    is_live: bool
    """Whether the servers hold its weights; an adapter is served where an alias means it."""
    has_canary: bool
    """Whether a swap to it can be verified."""


class RegistryFile(Record):
    """`registry.json`."""

    checkpoints: dict[str, Entry] = Field(default_factory=dict)
    aliases: dict[str, str] = Field(default_factory=dict)
    live: str | None = None
    """Whose weights the gateway's servers hold, or are to hold when they start; adapters are served on top of them."""


class Registry:
    """The registry of one run; cheap to make, safe to use from several processes at once."""

    def __init__(self, run_directory: Path) -> None:
        self._folder = run_directory.absolute() / "checkpoints"
        self._path = self._folder / "registry.json"
        self._seen: tuple[tuple[int, int], RegistryFile] | None = None
        """What was read last, and of which file; one value, since threads read at once."""

    def base(self, model: ModelSection, progress: Callable[[str], None] = lambda _: None) -> Checkpoint:
        """The base model under `model.name`, found, described and registered at first use (slow for a big one).

        Its own manifest is taken where it has one; else one is made here. Raises CheckpointError.
        """
        source = f"{model.source}@{model.revision}" if model.revision else model.source
        known = self._read().checkpoints.get(check_name(model.name))
        if known is not None:
            if known.source != source:
                raise CheckpointError(
                    f"{model.name} is {known.source} in {self._path}, and the recipe's model is {source}; use another run"
                )
            return self.verify(model.name)
        directory = find_model(model, progress)
        if (directory / MANIFEST).is_file():
            own, template = read_manifest(directory), None
            ref = own.checkpoint.model_copy(update={"name": model.name})
            manifest = own.model_copy(update={"checkpoint": ref})
        else:
            manifest, template = self._describe(directory, model.name, progress)
        checkpoint = self._add(directory, manifest, template, source)
        with self._changing() as content:
            aliases = {BASE_ALIAS: model.name, POLICY_ALIAS: model.name} | content.aliases
            self._write(content.model_copy(update={"aliases": aliases, "live": content.live or model.name}))
        return checkpoint

    def register(self, directory: Path) -> Checkpoint:
        """Verify and add a directory that holds a manifest; adding it again changes nothing. Raises CheckpointError."""
        directory = directory.absolute()
        return self._add(directory, read_manifest(directory))

    def inspect(self, directory: Path) -> Checkpoint:
        """The checkpoint that `register` would add, verified. Raises CheckpointError as that does."""
        directory = directory.absolute()
        return self._examine(directory, read_manifest(directory)).checkpoint

    def resolve(self, name: str) -> Checkpoint:
        """The checkpoint of that name or alias. Raises CheckpointError, naming the nearest."""
        checkpoint = self.find(name)
        if checkpoint is None:
            raise CheckpointError(f"no checkpoint or alias {name!r} in {self._path}; {self.suggest(name)}")
        return checkpoint

    def find(self, name: str) -> Checkpoint | None:
        """The checkpoint of that name or alias, if there is one."""
        content = self._read()
        entry = content.checkpoints.get(content.aliases.get(name, name))
        return entry.checkpoint if entry else None

    def find_made(self, name: str) -> Checkpoint | None:
        """The checkpoint of that name or alias, or else one that the run made and that is not registered yet."""
        directory, found = self._folder / name, self.find(name)
        if found is not None or not is_name(name) or not (directory / MANIFEST).is_file():
            return found
        manifest = read_manifest(directory)
        return None if manifest.checkpoint.kind == "base" else Checkpoint(directory, manifest)

    def suggest(self, name: str) -> str:
        """What may have been meant by a name that is not known."""
        if self.find_made(name) is not None:
            return (
                f"it was made, and is registered once `vcot parity {name}` has seen that it is served as it was trained"
            )
        content = self._read()
        known = [*content.aliases, *content.checkpoints]
        close = get_close_matches(name, known, n=1)
        return f"did you mean {close[0]}?" if close else f"known are {', '.join(dict.fromkeys(known)) or 'none'}"

    def verify(self, name: str) -> Checkpoint:
        """The checkpoint, after making sure that its files are those that were registered. Raises CheckpointError."""
        checkpoint = self.resolve(name)
        entry = self._read().checkpoints[checkpoint.ref.name]
        if not checkpoint.directory.is_dir():
            raise CheckpointError(
                f"checkpoint {name} is gone: {checkpoint.directory} does not exist; restore or remake it"
            )
        if (files := stat_files(checkpoint.directory)) != entry.files:
            check_digest(checkpoint.directory, checkpoint.ref)
            with self._changing() as content:
                present = content.checkpoints.get(checkpoint.ref.name)
                if present is None or present.checkpoint != checkpoint:
                    raise CheckpointError(
                        f"checkpoint {name} was changed in {self._path} while its files were read; give the command again"
                    )
                checkpoints = content.checkpoints | {checkpoint.ref.name: present.model_copy(update={"files": files})}
                self._write(content.model_copy(update={"checkpoints": checkpoints}))
        return checkpoint

    def find_digest(self, digest: str | None) -> Checkpoint | None:
        """The checkpoint with these weights, if there is one."""
        return next((checkpoint for checkpoint in self.list() if checkpoint.ref.digest == digest), None)

    def list(self) -> list[Checkpoint]:
        """All registered checkpoints, in the order of registration."""
        return [entry.checkpoint for entry in self._read().checkpoints.values()]

    def aliases(self) -> dict[str, str]:
        """Alias to checkpoint name."""
        return dict(self._read().aliases)

    def live(self) -> str | None:
        """Name of the checkpoint that is to be live."""
        return self._read().live

    def check_alias(self, alias: str, name: str) -> None:
        """Raise CheckpointError unless `alias` may mean `name`."""
        if check_name(alias) in self._read().checkpoints and alias != name:
            raise CheckpointError(f"{alias} is a checkpoint's own name and cannot mean {name}; take another alias")

    @property
    def served_folder(self) -> Path:
        """Where the adapters that are served lie under their digests."""
        return self._folder / "served"

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Alone with `served_folder`: the replicas of a gateway start at once, each in a thread."""
        with _locked(self.served_folder.with_suffix(".lock")):
            yield

    def set_live(self, alias: str | None, name: str) -> None:
        """Record, durably, that `name` is served and that `alias` (if one is given) means it. Raises CheckpointError.

        An adapter is served beside what is live, and does not take its place.
        """
        if alias is not None:
            self.check_alias(alias, name)
        with self._changing() as content:
            if name not in content.checkpoints:
                raise CheckpointError(f"checkpoint {name} was retired from {self._path} meanwhile; register it again")
            is_adapter = content.checkpoints[name].manifest.checkpoint.kind == "adapter"
            aliases = content.aliases | ({alias: name} if alias is not None else {})
            live = content.live if is_adapter else name
            self._write(content.model_copy(update={"aliases": aliases, "live": live}))

    def describe(self, name: str) -> CheckpointInfo:
        """The checkpoint of that name or alias, and what it is used for. Raises CheckpointError."""
        checkpoint, content = self.resolve(name), self._read()
        return CheckpointInfo(
            checkpoint=checkpoint.ref,
            directory=str(checkpoint.directory),
            job=checkpoint.manifest.job,
            aliases=tuple(alias for alias, meant in content.aliases.items() if meant == checkpoint.ref.name),
            is_live=content.live == checkpoint.ref.name,
            has_canary=checkpoint.manifest.canary is not None,
        )

    def retire(self, name: str) -> CheckpointRef:
        """Forget a checkpoint; its files stay. Raises CheckpointError for the live one and any that an alias means."""
        with self._changing() as content:
            if name not in content.checkpoints:
                alias = content.aliases.get(name)
                hint = f"{name} is an alias of {alias}" if alias else f"known are {', '.join(content.checkpoints)}"
                raise CheckpointError(f"no checkpoint {name!r} in {self._path}; {hint}")
            aliases = [alias for alias, meant in content.aliases.items() if meant == name]
            if name == content.live:
                raise CheckpointError(f"checkpoint {name} is live and cannot be retired; swap another in first")
            if aliases:
                raise CheckpointError(
                    f"checkpoint {name} cannot be retired while {', '.join(aliases)} means it; point the alias at another"
                )
            kept = {other: entry for other, entry in content.checkpoints.items() if other != name}
            self._write(content.model_copy(update={"checkpoints": kept}))
        return content.checkpoints[name].manifest.checkpoint

    def _add(
        self, directory: Path, manifest: CheckpointManifest, template: Path | None = None, source: str | None = None
    ) -> Checkpoint:
        entry, name = self._examine(directory, manifest, template, source), manifest.checkpoint.name
        if entry != self._read().checkpoints.get(name):
            with self._changing() as content:
                _check_free(self._path, content, directory, manifest.checkpoint)  # another may have been quicker
                self._write(content.model_copy(update={"checkpoints": content.checkpoints | {name: entry}}))
        return entry.checkpoint

    def _examine(
        self, directory: Path, manifest: CheckpointManifest, template: Path | None = None, source: str | None = None
    ) -> Entry:
        """What is to be known of a checkpoint, its files verified. Raises CheckpointError."""
        ref, files, content = manifest.checkpoint, stat_files(directory), self._read()
        known = _check_free(self._path, content, directory, ref)
        if known is None or known.files != files:
            check_digest(directory, ref)
        if known is not None and source is None:  # a base that is registered by its directory stays the recipe's base
            template, source = known.checkpoint.chat_template, known.source
        return Entry(
            directory=str(directory),
            manifest=manifest,
            chat_template=str(template) if template else None,
            source=source,
            files=files,
        )

    def _describe(
        self, directory: Path, name: str, progress: Callable[[str], None]
    ) -> tuple[CheckpointManifest, Path | None]:
        """Have the training side write a base's manifest (it takes torch) into the run."""
        folder = self._folder / name
        if not (folder / MANIFEST).is_file():
            progress(f"asking {directory.name} the canary")
            command = [sys.executable, "-P", "-m", "vcot.training.model.canary", str(directory)]
            command += ["--out", str(folder / MANIFEST), "--name", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
                raise CheckpointError(f"checkpoint {directory} could not be described: {lines[-1]}")
        template = folder / _TEMPLATE
        return read_manifest(folder), template if template.is_file() else None

    def _read(self) -> RegistryFile:
        try:
            status, seen = self._path.stat(), self._seen
        except FileNotFoundError:
            return RegistryFile()
        present = (status.st_mtime_ns, status.st_ino)
        if seen is None or seen[0] != present:
            content = read_record(self._path, RegistryFile, CheckpointError, remedy="restore it") or RegistryFile()
            self._seen = seen = (present, content)
        return seen[1]

    @contextmanager
    def _changing(self) -> Iterator[RegistryFile]:
        """Hold the registry's lock; gives its present content."""
        with _locked(self._path.with_suffix(".lock")):
            yield self._read()

    def _write(self, content: RegistryFile) -> None:
        write_kept_record(self._path, content)


def _check_free(path: Path, content: RegistryFile, directory: Path, ref: CheckpointRef) -> Entry | None:
    """What the registry at `path` has under the name of `ref`. Raises CheckpointError where that is something else."""
    known = content.checkpoints.get(check_name(ref.name))
    if known is None and (ref.name == POLICY_ALIAS or ref.name in content.aliases):
        raise CheckpointError(
            f"the checkpoint in {directory} is named {ref.name}, which is an alias in {path}: whoever asks for it "
            "would get another; give it another name"
        )
    if known is not None and known.manifest.checkpoint.digest != ref.digest:
        raise CheckpointError(
            f"checkpoint {ref.name} is registered already with weights {known.manifest.checkpoint.digest[:19]}, "
            f"and those in {directory} are {ref.digest[:19]}; give it another name"
        )
    return known


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of that file, before other threads and processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
