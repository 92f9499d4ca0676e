"""What a person sees of long work: a heading per stage, live progress, and the account at its end.

On a terminal a progress bar moves; elsewhere (a log, CI) a line is printed every few seconds. All of it goes to stderr, so
that a command's result on stdout can be piped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from vcot.pipeline.printable import printable
from vcot.pipeline.records import Record, StageCount
from vcot.pipeline.report import Accounted, Began, Completed, Ended, Event, Found, Progress, Said, Waiting, Warned

_LINE_EVERY_S = 5.0
_MAX_WIDTH = 1000
"""Of a table in a pipe, in characters."""


class _Console(Console):
    """Shows all text as it reads: neither a terminal's commands nor rich's markup in it are obeyed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Everything that is printed, drawn or updated comes through here."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class Terminal:
    """Listens to the steps of one command; with `as_json`, its result is shown as JSON; `quiet` leaves out how it goes on.

    Mutated by whoever reports; a command reports from one place at a time.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.err = _Console(stderr=True)
        self.out = _Console()
        self._as_json = as_json
        self._quiet = quiet
        self._began = time.monotonic()
        self._stages: list[tuple[str, float]] = []
        self._preface: tuple[str, str] | None = None
        self._open: list[_Live] = []

    def __call__(self, event: Event) -> None:
        """Show what a step tells."""
        match event:
            case Began(step, what, is_aside):
                if is_aside:
                    self._open.append(_Aside(self._stages, self._stages[-1][0] if self._stages else step))
                self.heading(step, what)
            case Said(text):
                self.say(text)
            case Warned(text):
                self.warn(text)
            case Accounted(count):
                self._account(count)
            case Found(result, data):
                self._find(result, data)
            case Completed():
                self._summarise()
            case _:
                self._follow(event)

    def _follow(self, event: Progress | Waiting | Ended) -> None:
        """What lasts: a bar or a status on a terminal, a line now and then elsewhere."""
        last = self._open[-1] if self._open else None
        match event:
            case Progress(unit, done, total, note):
                if not isinstance(last, _Bar | _Lines):
                    last = _Bar(self.err, unit) if self._moves else _Lines(self.say, unit)
                    self._open.append(last)
                last.advance(done, total, note)
            case Waiting(text):
                if isinstance(last, _Status | _Once):
                    last.update(text)
                else:
                    self._open.append(_Status(self.err, text) if self._moves else _Once(self.say))
            case Ended():
                self._open.pop().end()

    @property
    def _moves(self) -> bool:
        """Whether what lasts is shown as it moves."""
        return self.err.is_terminal and not self._quiet

    def preface(self, what: str) -> None:
        """Said before all else, once a command has something to say: one that fails before has said its error only."""
        self._preface = ("run", what)

    def heading(self, stage: str, what: str) -> None:
        """A stage begins."""
        self._say_preface()
        self._stages.append((stage, time.monotonic()))
        self._note((f"{self._clock()} ", "dim"), (f"{stage:<9}", "bold cyan"), what)

    def say(self, text: str) -> None:
        """A line below the heading."""
        self._say_preface()
        self._note((f"{self._clock()} ", "dim"), " " * 9, text)

    def _say_preface(self) -> None:
        if self._preface is not None:
            preface, self._preface = self._preface, None
            self.heading(*preface)

    def warn(self, text: str) -> None:
        """A line that must be seen."""
        self._print((f"{self._clock()} ", "dim"), ("warning  ", "bold yellow"), text)

    def show_log(self, name: str, line: str) -> None:
        """A line of a log; may be called from another thread."""
        self._note((f"{self._clock()} ", "dim"), (f"{name:<9}", "dim"), (line, "dim"))

    def _summarise(self) -> None:
        """Where the time went."""
        ends = [began for _, began in self._stages[1:]] + [time.monotonic()]
        spent: dict[str, float] = {}
        for (stage, began), end in zip(self._stages, ends, strict=True):
            spent[stage] = spent.get(stage, 0.0) + end - began
        parts = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in spent.items())
        self.say(f"{time.monotonic() - self._began:.0f} s in all: {parts}")

    def _note(self, *parts: str | tuple[str, str]) -> None:
        if not self._quiet:
            self._print(*parts)

    def _print(self, *parts: str | tuple[str, str]) -> None:
        self.err.print(Text.assemble(*parts), soft_wrap=True)

    def _find(self, result: RenderableType, data: Record | Sequence[Record] | None) -> None:
        """For a person the result, for a program its data: ASCII, since a terminal may be behind it."""
        if not self._as_json:
            self.show(result)
        elif data is not None:
            records = [data] if isinstance(data, Record) else data
            plain = [record.model_dump(mode="json") for record in records]
            self.show(json.dumps(plain[0] if isinstance(data, Record) else plain, indent=1))

    def show(self, result: RenderableType) -> None:
        """The command's result, on stdout; text keeps its own lines, so that it can be copied; a piped table is not cut."""
        out = self.out
        if isinstance(result, Table) and not out.is_terminal:
            wanted = Measurement.get(out, out.options.update(width=_MAX_WIDTH), result).maximum
            out = _Console(width=max(out.width, wanted))
        out.print(result, soft_wrap=isinstance(result, str))

    def _account(self, count: StageCount) -> None:
        """The accounting equation of a stage that ended."""
        parts = [f"{count.requested} requested", f"{count.ok} ok", f"{count.cached} cached"]
        parts += [
            f"{number} {name}" for name, number in (("failed", count.failed), ("refused", count.refused)) if number
        ]
        reasons = f" ({count.by_reason})" if count.reasons else ""
        self.say(" = ".join((parts[0], " + ".join(parts[1:]))) + reasons)

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self._began)
        return f"{seconds // 60:>2}:{seconds % 60:02}"


class _Live(Protocol):
    """What lasts until the steps say that it ended."""

    def end(self) -> None:
        """It is over."""


class _Aside:
    """A stage within another, which goes on afterwards."""

    def __init__(self, stages: list[tuple[str, float]], present: str) -> None:
        self._stages = stages
        self._present = present

    def end(self) -> None:
        self._stages.append((self._present, time.monotonic()))


class _Bar:
    """A bar that moves."""

    def __init__(self, console: Console, unit: str) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn(unit, markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, TextColumn("{task.fields[note]}", markup=False), console=console, transient=True)
        self._bar.start()
        self._task = self._bar.add_task(unit, total=None, note="")

    def advance(self, done: int, total: int, note: str) -> None:
        self._bar.update(self._task, completed=done, total=total or None, note=note)

    def end(self) -> None:
        self._bar.stop()


class _Status:
    """One line that is replaced."""

    def __init__(self, console: Console, text: str) -> None:
        self._status = console.status(Text(text))
        self._status.start()

    def update(self, text: str) -> None:
        self._status.update(Text(text))

    def end(self) -> None:
        self._status.stop()


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

    def end(self) -> None:
        pass


class _Once:
    """Prints a message when it changes."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._last = ""

    def update(self, message: str) -> None:
        if message != self._last:
            self._last = message
            self._say(message)

    def end(self) -> None:
        pass
