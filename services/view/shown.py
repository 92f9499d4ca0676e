"""A run as the viewer shows it: its index and the process that keeps it, its ledger, and what a person said of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vcot.pipeline.errors import InputError
from vcot.pipeline.images import ImageStore, media_type
from vcot.pipeline.ledger import Ledger
from vcot.services.engine.lifeline import keeper_command
from vcot.services.run.directory import LEDGER, RECIPE
from vcot.services.run.live import Live, find_holder, read_live
from vcot.services.run.stages import RunStatus
from vcot.services.view.examples import ViewedTask, build_example
from vcot.services.view.index import FOLDER, INDEX, Facets, Index
from vcot.services.view.labels import LABELS, Agreement, Label, Labels, keep_label, measure_agreement, read_labels
from vcot.services.view.queries import Finder, Kept
from vcot.services.view.summary import Summary

_GRACE_S = 2.0


@dataclass(frozen=True)
class Liveness:
    """What changes from one second to the next."""

    live: Live | None
    is_at_work: bool
    age_s: float
    """How old what `live` says is."""
    num_seen: int
    num_items: int
    status: RunStatus | None
    problem: str | None


class ViewedRun:
    """One run. It is only read, but for the folder that is the viewer's own."""

    def __init__(self, number: int, directory: Path) -> None:
        """Raises InputError where there is no run."""
        if not (directory / RECIPE).is_file():
            raise InputError(f"{directory} is not a run (it has no {RECIPE}); name a run's directory")
        self.number, self.directory = number, directory
        self.name = directory.absolute().name
        self.labels_path = directory / FOLDER / LABELS
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self.folder = self._find_folder()
        self.index = Index(self.folder / INDEX)
        self._kept = Kept(self.index)
        self._keeper: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Have the index kept up to date, until `stop` or this process's end."""
        command = [
            sys.executable,
            "-m",
            "vcot.services.view.indexing",
            str(self.directory.absolute()),
            str(self.folder),
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "indexing.log").open("wb") as log:
            self._keeper = subprocess.Popen(
                keeper_command(command, _GRACE_S), stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )

    def _find_folder(self) -> Path:
        """Where the index is kept: in the run, or, where that may not be written, in a temporary folder."""
        own = self.directory / FOLDER
        if os.access(own if own.is_dir() else self.directory, os.W_OK):
            return own
        self._temporary = tempfile.TemporaryDirectory(prefix="vcot-view-")
        return Path(self._temporary.name)

    def stop(self) -> None:
        """End that, and close the index; one in a temporary folder goes."""
        if self._keeper is not None:
            assert self._keeper.stdin is not None
            self._keeper.stdin.close()
            self._keeper.wait()
            self._keeper = None
        self.index.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    @cached_property
    def images(self) -> ImageStore:
        """The run's."""
        return ImageStore(self.directory)

    @property
    def labels(self) -> Labels:
        """What a person said."""
        return read_labels(self.labels_path)

    @property
    def finder(self) -> Finder:
        """Over the run's items, as they are now."""
        return Finder(self.index, self._kept, self.labels.tasks)

    @property
    def facets(self) -> Facets:
        """What its items can be filtered by."""
        return self.index.read("facets", Facets) or Facets()

    @property
    def summary(self) -> Summary | None:
        """Beside other runs; None where it was not made yet."""
        return self.index.read("summary", Summary)

    def find_pulse(self) -> Liveness:
        """How far it is."""
        num_seen, num_items = self.index.progress()
        problem, live = self.index.note("problem"), None
        try:
            live = read_live(self.directory)
        except InputError as error:
            problem = problem or str(error)
        holder = find_holder(self.directory)
        is_at_work = bool(holder) or (holder is None and live is not None and live.end is None)
        age_s = max(0.0, time.time() - live.updated_at) if live else 0.0
        status = self.index.read("status", RunStatus)
        return Liveness(live, is_at_work, age_s, num_seen, num_items, status, problem or self._find_fault())

    def _find_fault(self) -> str | None:
        """What ended the process that keeps the index, where something did."""
        if self._keeper is None or self._keeper.poll() is None:
            return None
        return f"the index is not kept up to date any more; {self.folder / 'indexing.log'} says why"

    def find_example(self, part: str, task: str) -> ViewedTask | None:
        """All of one task; None where the index has none of that name."""
        found = self.index.find(part, task)
        if found is None:
            return None
        ledger = Ledger(self.directory / LEDGER, is_read=True)
        try:
            return build_example(*found, ledger)
        finally:
            ledger.close()

    def read_image(self, example: ViewedTask, number: int) -> tuple[bytes, str] | None:
        """One of a task's images, and its media type; None where it has no such image."""
        images = example.task.images
        if number >= len(images):
            return None
        return self.images.read(images[number]), media_type(images[number])

    def keep(self, label: Label) -> None:
        """Keep what was said of a response that the run has. Raises InputError."""
        found = self.index.find(label.part, label.task)
        keys = {one.key for asked in found[2].asked for one in asked.responses} if found else set()
        if not {label.response, label.than or label.response} <= keys:
            raise InputError(f"task {label.task} of {self.directory} has no such response; reload the page")
        keep_label(self.labels_path, label)

    def measure_agreement(self) -> Agreement:
        """The judge's with the person."""
        labels = self.labels
        scores: dict[str, float] = {}
        clusters: dict[str, str] = {}
        for part, task in sorted(labels.tasks):
            if (found := self.index.find(part, task)) is None:
                continue
            name = found[1].picture
            clusters |= {task: name} if name else {}
            answered = (one for asked in found[2].asked for one in asked.responses)
            scores |= {one.key: one.score for one in answered if one.score is not None}
        return measure_agreement(labels, scores, clusters)
