"""Which of a benchmark's questions a logged response answers. Pure.

What was asked decides where a row holds it: question, options and their order, and the gold letter; of a question that is
answered in words, the question. Else the id does: the
task's, with or without the data set's name before it, or what the data set's own files call the question (ScienceQA's pid).
Questions that ask the same with the same gold option, about different images, are dealt to such rows in the order of their
ids in the log: no figure of one log depends on which is which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vcot.eval.logged.layouts import Asked, Logged
from vcot.pipeline.records import Task

REASONS = {
    "unknown": "the benchmark has no such question: see --benchmark, --split and, for ScienceQA's pids, --path",
    "other_options": "asked with other options, or in another order, than the benchmark has",
    "other_gold": "logged with another gold answer than the benchmark has",
    "doubled": "the question has a response already, which counts; if they are several responses, give --repeated",
    "no_text": "the row has no text: the request failed",
    "unreadable": "the row cannot be read; mend it, or log it anew",
}
"""Why a row is not scored, by the word that accounts use; and what to do about it."""

_Content = tuple[str, tuple[str, ...]]


@dataclass
class Matcher:
    """Finds the questions of one log. Mutated by `find`, which remembers what it dealt."""

    tasks: Sequence[Task]
    names: Mapping[str, str]
    """What the data set's own files call a question -> the task's id."""
    _by_id: dict[str, int] = field(init=False)
    _by_content: dict[_Content, list[int]] = field(init=False, default_factory=dict)
    _questions: set[str] = field(init=False)
    _dealt: dict[tuple[int, ...], dict[str, int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        own = {task.id: number for number, task in enumerate(self.tasks)}
        short = {task.id.removeprefix(f"{task.source}/"): number for number, task in enumerate(self.tasks)}
        named = {name: own[task] for name, task in self.names.items() if task in own}
        self._by_id = short | named | own
        self._questions = {_squeeze(task.question) for task in self.tasks}
        for number, task in enumerate(self.tasks):
            self._by_content.setdefault(_content(task.question, task.choices), []).append(number)

    def find(self, logged: Logged) -> int | str:
        """The number of the question, or a reason of `REASONS`."""
        own = None if logged.is_numbered else self._by_id.get(logged.id)
        if logged.asked is None:
            return "unknown" if own is None else own
        alike = self._by_content.get(_content(logged.asked.question, logged.asked.choices))
        if alike is not None:
            return self._deal(alike, logged.asked, own, logged.id)
        if own is None:
            is_asked = logged.asked.choices and _squeeze(logged.asked.question) in self._questions
            return "other_options" if is_asked else "unknown"
        return self._check(own, logged.asked)

    def _check(self, own: int, asked: Asked) -> int | str:
        """The question with that id, which a row words in its own way, if the options that it says are the same."""
        task = self.tasks[own]
        if asked.choices and _content("", asked.choices) != _content("", task.choices):
            return "other_options"
        return own if asked.answer in ("", task.answer_letter) else "other_gold"

    def _deal(self, alike: Sequence[int], asked: Asked, own: int | None, name: str) -> int | str:
        """One of the questions that ask this: the one with that id, or else the next that has no row yet."""
        fitting = [number for number in alike if asked.answer in ("", self.tasks[number].answer_letter)]
        if own in fitting or not fitting:
            return own if own in fitting else "other_gold"
        if len({(task.answer, task.gold, task.accepted) for task in map(self.tasks.__getitem__, fitting)}) > 1:
            return "unknown"
        dealt = self._dealt.setdefault(tuple(fitting), {})
        return dealt.setdefault(name, fitting[min(len(dealt), len(fitting) - 1)])


def _content(question: str, choices: Sequence[str]) -> _Content:
    return _squeeze(question), tuple(map(_squeeze, choices))


def _squeeze(text: str) -> str:
    return " ".join(text.split())
