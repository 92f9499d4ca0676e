"""What a step tells of its work: events, for whoever listens.

A step is given a `Report` and knows no console. The command line's listener is services/cli/terminal.py; a notebook or a
test listens with any function of one event, and `ignore` listens to nothing.

Progress, a wait and an aside each last until their `Ended`; those that are open end in the reverse of their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from vcot.pipeline.records import Record, StageCount
from vcot.pipeline.stage import OnProgress, Tally


@dataclass(frozen=True)
class Began:
    """A step begins."""

    step: str
    what: str
    is_aside: bool = False
    """Whether it is within another step, which goes on at its `Ended`."""


@dataclass(frozen=True)
class Said:
    """A fact about the present step."""

    text: str


@dataclass(frozen=True)
class Warned:
    """A fact that must be seen."""

    text: str


@dataclass(frozen=True)
class Progress:
    """How far the present work is; the first one opens it."""

    unit: str
    done: int
    total: int
    """0 while it is unknown."""
    note: str


@dataclass(frozen=True)
class Waiting:
    """What is being waited for; the first one opens the wait."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The work, wait or aside that was opened last is over, whether it succeeded or not."""


@dataclass(frozen=True)
class Accounted:
    """The account of a step that came to its end."""

    count: StageCount


@dataclass(frozen=True)
class Found:
    """A result: text, or a table that `rich` renders."""

    result: Any
    data: Record | Sequence[Record] | None = None
    """All of the command's result for programs, with one of the parts that a person is shown."""


@dataclass(frozen=True)
class Completed:
    """All steps are done."""


Event: TypeAlias = Began | Said | Warned | Progress | Waiting | Ended | Accounted | Found | Completed
Report = Callable[[Event], None]
OnSteps = Callable[[int, int, str], None]
"""Takes what is done, what is to be done in all (0 while that is unknown), and a short note."""


def tell(report: Report, parts: Sequence[Any], data: Record | Sequence[Record]) -> None:
    """Report a result in one or more parts, which is `data` for programs."""
    report(Found(parts[0], data))
    for part in parts[1:]:
        report(Found(part))


def ignore(event: Event) -> None:
    """Listen to nothing."""


@contextmanager
def aside(report: Report, step: str, what: str) -> Iterator[None]:
    """A step within the present one."""
    report(Began(step, what, is_aside=True))
    try:
        yield
    finally:
        report(Ended())


@contextmanager
def progress(report: Report, unit: str) -> Iterator[OnSteps]:
    """Progress of work that is no tally."""
    report(Progress(unit, 0, 0, ""))
    try:
        yield lambda done, total, note: report(Progress(unit, done, total, note))
    finally:
        report(Ended())


@contextmanager
def tracking(report: Report, unit: str, note: Callable[[], str] = str) -> Iterator[OnProgress]:
    """Progress of a stage, by its tally, with a note of the stage's own."""
    with progress(report, unit) as advance:
        yield lambda tally: advance(tally.finished, tally.total, "; ".join(filter(None, (note(), _troubles(tally)))))


@contextmanager
def tracking_several(report: Report, unit: str) -> Iterator[Callable[[], OnProgress]]:
    """Progress of stages that go on at once, as one; call for each stage's own listener."""
    tallies: dict[int, Tally] = {}

    def track() -> OnProgress:
        number = len(tallies)
        tallies[number] = Tally("", total=0)

        def follow(tally: Tally) -> None:
            tallies[number] = tally
            done, total = sum(each.finished for each in tallies.values()), sum(each.total for each in tallies.values())
            advance(done, total, "; ".join(filter(None, map(_troubles, tallies.values()))))

        return follow

    with progress(report, unit) as advance:
        yield track


@contextmanager
def waiting(report: Report, what: str) -> Iterator[Callable[[str], None]]:
    """A wait without a known length; call with each new message."""
    report(Waiting(what))
    try:
        yield lambda text: report(Waiting(text))
    finally:
        report(Ended())


def _troubles(tally: Tally) -> str:
    return ", ".join(f"{n} {what}" for what, n in (("failed", tally.failed), ("refused", tally.refused)) if n)
