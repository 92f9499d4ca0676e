"""What a person sees of long work: a heading per stage, live progress, and the account at its end.

On a terminal a progress bar moves; elsewhere (a log, CI) a line is printed every few seconds. All of it goes to stderr, so
that a command's result on stdout can be piped.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from pipeline.records import StageCount
from pipeline.stage import OnProgress, Tally

_LINE_EVERY_S = 5.0
_MAX_WIDTH = 1000
"""Of a table in a pipe, in characters."""


_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a cursor, colours, renames a window, or turns the direction of reading; and what no encoding can say."""


def plain(text: str) -> str:
    """Text that others may have written (models, servers, files' names), as a terminal may show it."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class _Console(Console):
    """Shows all text as it reads: neither a terminal's commands nor rich's markup in it are obeyed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Everything that is printed, drawn or updated comes through here."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))


class Terminal:
    """One per command. Mutated by whoever prints; a command prints from one place at a time."""

    def __init__(self) -> None:
        self.err = _Console(stderr=True)
        self.out = _Console()
        self._began = time.monotonic()
        self._stages: list[tuple[str, float]] = []
        self._preface: tuple[str, str] | None = None

    def preface(self, what: str) -> None:
        """Said before the first heading, so that a command which fails before has said its error only."""
        self._preface = ("run", what)

    def heading(self, stage: str, what: str) -> None:
        """A stage begins."""
        if self._preface is not None:
            preface, self._preface = self._preface, None
            self.heading(*preface)
        self._stages.append((stage, time.monotonic()))
        self._print((f"{self._clock()} ", "dim"), (f"{stage:<9}", "bold cyan"), what)

    def say(self, text: str) -> None:
        """A line below the heading."""
        self._print((f"{self._clock()} ", "dim"), " " * 9, text)

    def warn(self, text: str) -> None:
        """A line that must be seen."""
        self._print((f"{self._clock()} ", "dim"), ("warning  ", "bold yellow"), text)

    def summary(self) -> None:
        """Where the time went."""
        ends = [began for _, began in self._stages[1:]] + [time.monotonic()]
        spent: dict[str, float] = {}
        for (stage, began), end in zip(self._stages, ends, strict=True):
            spent[stage] = spent.get(stage, 0.0) + end - began
        parts = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in spent.items())
        self.say(f"{time.monotonic() - self._began:.0f} s in all: {parts}")

    @contextmanager
    def aside(self, stage: str, what: str) -> Iterator[None]:
        """A stage within the present one, which goes on afterwards."""
        present = self._stages[-1][0] if self._stages else stage
        self.heading(stage, what)
        yield
        self._stages.append((present, time.monotonic()))

    def _print(self, *parts: str | tuple[str, str]) -> None:
        self.err.print(Text.assemble(*parts), soft_wrap=True)

    def show(self, result: RenderableType) -> None:
        """The command's result, on stdout; text keeps its own lines, so that it can be copied; a piped table is not cut."""
        out = self.out
        if isinstance(result, Table) and not out.is_terminal:
            wanted = Measurement.get(out, out.options.update(width=_MAX_WIDTH), result).maximum
            out = _Console(width=max(out.width, wanted))
        out.print(result, soft_wrap=isinstance(result, str))

    def account(self, count: StageCount) -> None:
        """The accounting equation of a stage that ended."""
        parts = [f"{count.requested} requested", f"{count.ok} ok", f"{count.cached} cached"]
        parts += [
            f"{number} {name}" for name, number in (("failed", count.failed), ("refused", count.refused)) if number
        ]
        reasons = f" ({count.by_reason})" if count.reasons else ""
        self.say(" = ".join((parts[0], " + ".join(parts[1:]))) + reasons)

    @contextmanager
    def tracking(self, unit: str, note: Callable[[], str] = str) -> Iterator[OnProgress]:
        """Progress of a stage, by its tally, and a note of the stage's own."""
        with self.steps(unit) as advance:
            yield lambda tally: advance(
                tally.finished, tally.total, "; ".join(filter(None, (note(), _troubles(tally))))
            )

    @contextmanager
    def steps(self, unit: str) -> Iterator[Callable[[int, int, str], None]]:
        """Progress of work that is no tally: `advance(done, total, note)`, with a total of 0 while it is unknown."""
        if not self.err.is_terminal:
            yield _Lines(self.say, unit).advance
            return
        columns = (
            SpinnerColumn(),
            TextColumn(unit, markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        note_column = TextColumn("{task.fields[note]}", markup=False)
        with Progress(*columns, note_column, console=self.err, transient=True) as progress:
            task = progress.add_task(unit, total=None, note="")
            yield lambda done, total, note: progress.update(task, completed=done, total=total or None, note=note)

    @contextmanager
    def waiting(self, what: str) -> Iterator[Callable[[str], None]]:
        """A wait without a known length; call with each new message."""
        if not self.err.is_terminal:
            yield _Once(self.say)
            return
        with self.err.status(Text(what)) as status:
            yield lambda message: status.update(Text(message))

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self._began)
        return f"{seconds // 60:>2}:{seconds % 60:02}"


class _Lines:
    """Prints a progress line every few seconds."""

    def __init__(self, say: Callable[[str], None], unit: str) -> None:
        self._say = say
        self._unit = unit
        self._began = self._last = time.monotonic()
        self._first: int | None = None

    def advance(self, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if self._first is None and total:
            self._first = done
        if now - self._last < _LINE_EVERY_S:
            return
        self._last = now
        if self._first is None:
            self._say(note)
            return
        rate = (done - self._first) / (now - self._began)
        left = f", about {(total - done) / rate:.0f} s left" if rate else ""
        self._say(f"{done}/{total} {self._unit}{left}{'; ' + note if note else ''}")


class _Once:
    """Prints a message when it changes."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._last = ""

    def __call__(self, message: str) -> None:
        if message != self._last:
            self._last = message
            self._say(message)


def _troubles(tally: Tally) -> str:
    return ", ".join(f"{n} {what}" for what, n in (("failed", tally.failed), ("refused", tally.refused)) if n)
