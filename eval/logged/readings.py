"""What each rule reads in the responses of one log: arrays, so that a million responses take a few megabytes.

Model: one process matches rows with questions and hands batches of texts to workers, which read them under every rule; no
more batches are under way than there are workers, twice. Results come in the order of the rows.
"""

from __future__ import annotations

import os
import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vcot.eval.rules import RULES, Rule
from vcot.pipeline.stage import batched

_BATCH = 2000
_NUM_OWN = 2
"""Batches that this process reads before it starts others."""
CUT = "cut"


class Said(NamedTuple):
    """A response to be read."""

    task: int
    text: str
    is_cut: bool


@dataclass
class Readings:
    """Of one log; mutated by `add` only."""

    tasks: list[NDArray[np.int32]] = field(default_factory=list)
    """The question of each response, in batches, as below."""
    picks: dict[str, list[NDArray[np.int8]]] = field(default_factory=dict)
    """By rule, which option each response names; -1 for none."""
    reasons: dict[str, Counter[str]] = field(default_factory=dict)
    """By rule, why none was read, and how often."""
    points: list[NDArray[np.float64]] = field(default_factory=list)
    """Of answers in words, instead of `picks`: what each earns by the benchmark's own rule, in [0, 1]; NaN for no answer."""

    @property
    def num_read(self) -> int:
        """Responses so far."""
        return sum(map(len, self.tasks))

    def add(self, batch: Sequence[Said], read: Batch) -> None:
        """Take in what was read of a batch."""
        self.tasks.append(np.fromiter((said.task for said in batch), np.int32, len(batch)))
        for name, (picks, reasons) in read.items():
            self.picks.setdefault(name, []).append(np.frombuffer(picks, np.int8))
            self.reasons.setdefault(name, Counter()).update(reasons)


Batch = dict[str, tuple[bytes, Counter[str]]]
"""By rule: the options' numbers, 255 for none, and why none."""


@dataclass
class Reader:
    """Reads responses under the rules of those names. Starts workers when there is work for them; close it at the end."""

    rules: Sequence[str]
    choices: Sequence[Sequence[str]]
    """By question."""
    _pool: ProcessPoolExecutor | None = None

    def read(self, said: Iterable[Said]) -> Iterator[Readings]:
        """The same object again and again, which holds more with each batch."""
        found, own = Readings(), _Worker(self.rules, self.choices)
        owed: deque[tuple[Sequence[Said], Future[Batch]]] = deque()
        for number, batch in enumerate(batched(said, _BATCH)):
            if number < _NUM_OWN:
                found.add(batch, own.read(batch))
            else:
                owed.append((batch, self._start().submit(_read_in_worker, batch)))
            if len(owed) > 2 * count_workers():
                _take_in(found, owed)
            yield found
        while owed:
            _take_in(found, owed)
            yield found

    def _start(self) -> ProcessPoolExecutor:
        if self._pool is None:
            arguments = (self.rules, self.choices)
            self._pool = ProcessPoolExecutor(count_workers(), get_context("spawn"), _begin_worker, arguments)
        return self._pool

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def count_workers() -> int:
    """As many as there are cores for this process."""
    return len(os.sched_getaffinity(0))


def _take_in(found: Readings, owed: deque[tuple[Sequence[Said], Future[Batch]]]) -> None:
    batch, future = owed.popleft()
    found.add(batch, future.result())


class _Worker:
    """What a process that reads holds."""

    def __init__(self, rules: Sequence[str], choices: Sequence[Sequence[str]]) -> None:
        self._rules = {name: RULES.resolve(name) for name in rules}
        self._choices = choices

    def read(self, batch: Sequence[Said]) -> Batch:
        return {name: self._read(rule, batch) for name, rule in self._rules.items()}

    def _read(self, rule: Rule, batch: Sequence[Said]) -> tuple[bytes, Counter[str]]:
        choices = self._choices
        picked = [CUT if cut and rule.minds_cut else rule.pick(text, choices[task]) for task, text, cut in batch]
        reasons = Counter(found for found in picked if isinstance(found, str))
        return bytes(255 if isinstance(found, str) else found for found in picked), reasons


_here: list[_Worker] = []
"""Of this process, where it is a worker."""


def _begin_worker(rules: Sequence[str], choices: Sequence[Sequence[str]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who started it ends it
    _here.append(_Worker(rules, choices))


def _read_in_worker(batch: Sequence[Said]) -> Batch:
    return _here[0].read(batch)
