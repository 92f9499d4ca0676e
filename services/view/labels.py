"""What a person says of responses, kept in the run, and how far the judge agrees.

Model: `<run>/view/labels.jsonl` has a line for each thing that was said, in order. What was said last of a response, or of
two, holds, and `none` takes it back. A line is on disk before the viewer says that it is kept, and none is ever changed. A
last line that a crash cut short is left as it is, and the next begins on a line of its own; what cannot be read is counted.

Agreement is what the judge's report card calls AUC (eval/report_card.py), with a person in place of the gold answer: how
often, within a task, a right response scores above a wrong one, and the better of two above the other; a tie is a half.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import ValidationError, model_validator

from vcot.eval.report_card import Duel
from vcot.eval.statistics import estimate_accuracy
from vcot.pipeline.errors import InputError
from vcot.pipeline.records import Interval, Record

LABELS = "labels.jsonl"
K = TypeVar("K")
Opinion = Literal["right", "wrong", "better", "none"]


class Label(Record):
    """One thing that was said."""

    part: str
    task: str
    response: str
    """Its key."""
    said: Opinion
    than: str | None = None
    """The key of the response that it is better than, or that it is no longer compared with."""
    at: float
    """When, in seconds since 1970."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.said == "better" and self.than is None:
            raise ValueError("a better response is better than another: `than` is missing")
        if self.said in ("right", "wrong") and self.than is not None:
            raise ValueError(f"a {self.said} response is not compared: leave `than` out")
        if self.than == self.response:
            raise ValueError("a response is not better than itself")
        return self


@dataclass(frozen=True)
class Labels:
    """All that holds."""

    marked: Mapping[str, Label]
    """`right` or `wrong`, by the response's key."""
    compared: Mapping[frozenset[str], Label]
    """`better`, by the keys of both."""
    num_unreadable: int = 0

    @property
    def all(self) -> list[Label]:
        """In the order in which they were said first."""
        return [*self.marked.values(), *self.compared.values()]

    def find(self, response: str, other: str) -> Label | None:
        """Which of two is the better one, where that was said."""
        return self.compared.get(frozenset((response, other)))

    @property
    def tasks(self) -> set[tuple[str, str]]:
        """(part, task) of each task with a label."""
        return {(label.part, label.task) for label in self.all}


def keep_label(path: Path, label: Label) -> None:
    """Add a label, durably. Raises InputError where it cannot be kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        line = f"{label.model_dump_json()}\n".encode()
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another viewer of the run may write, too
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}), so the label is not kept; see to it") from None


def read_labels(path: Path) -> Labels:
    """What holds of all that was said."""
    marked: dict[str, Label] = {}
    compared: dict[frozenset[str], Label] = {}
    num_unreadable = 0
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            label = Label.model_validate_json(line)
        except ValidationError:
            num_unreadable += 1
            continue
        if label.than is None:
            _hold(marked, label.response, label)
        else:
            _hold(compared, frozenset((label.response, label.than)), label)
    return Labels(marked, compared, num_unreadable)


def _hold(held: dict[K, Label], key: K, label: Label) -> None:
    if label.said == "none":
        held.pop(key, None)
    else:
        held[key] = label


class Agreement(Record):
    """How often the judge ranks as you do."""

    auc: Interval | None
    """None where nothing can be compared yet."""
    num_labels: int
    num_compared: int
    """Pairs of responses with two scores of which you said, or implied, which is better."""
    num_unscored: int
    """Such pairs in which the judge gave one no score."""


def measure_agreement(labels: Labels, scores: Mapping[str, float], clusters: Mapping[str, str]) -> Agreement:
    """The judge's agreement with the person, clustered by image.

    `scores` are by response; `clusters` say the image of each task, and a task without one stands for itself.
    """
    pairs = list(_list_pairs(labels))
    duels = [
        Duel(task, clusters.get(task, task), scores[better], scores[worse])
        for task, better, worse in pairs
        if better in scores and worse in scores
    ]
    auc = estimate_accuracy([duel.won for duel in duels], [duel.cluster for duel in duels]) if duels else None
    return Agreement(auc=auc, num_labels=len(labels.all), num_compared=len(duels), num_unscored=len(pairs) - len(duels))


def _list_pairs(labels: Labels) -> Iterator[tuple[str, str, str]]:
    """Task, better and worse response: each right one against each wrong one, and those that were compared themselves."""
    by_task: dict[tuple[str, str], dict[str, list[str]]] = {}
    for key, label in labels.marked.items():
        by_task.setdefault((label.part, label.task), {}).setdefault(label.said, []).append(key)
    for (_, task), said in by_task.items():
        for right in said.get("right", ()):
            for wrong in said.get("wrong", ()):
                if frozenset((right, wrong)) not in labels.compared:
                    yield task, right, wrong
    for label in labels.compared.values():
        assert label.than is not None
        yield label.task, label.response, label.than


def say_agreement(agreement: Agreement, judge: str) -> Sequence[str]:
    """That in sentences."""
    said = [f"{agreement.num_labels} labels."]
    if agreement.auc is None:
        return [
            *said,
            "Call one response of a task right and another wrong, or one better: then agreement can be counted.",
        ]
    auc = agreement.auc
    said.append(
        f"{judge} ranks as you do in {auc.value:.0%} ({auc.low:.0%} to {auc.high:.0%}) of {agreement.num_compared} "
        f"comparison{'s' if agreement.num_compared > 1 else ''} within a task; 50% is a coin."
    )
    if agreement.num_unscored:
        said.append(f"{agreement.num_unscored} more cannot be counted, since the judge gave one of the two no score.")
    return said
