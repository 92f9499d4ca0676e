"""From the rows of a log to responses that are read, with an account of each row: none is dropped without a word."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from vcot.eval.logged.layouts import Logged
from vcot.eval.logged.log_rows import Fault
from vcot.eval.logged.matching import REASONS, Matcher
from vcot.eval.logged.readings import Said
from vcot.eval.matrix import LogAccount
from vcot.pipeline.records import Task
from vcot.pipeline.stage import Tally

_NUM_EXAMPLES = 5
Rows = Iterable[Logged | tuple[str, Fault]]


@dataclass
class Intake:
    """Of one log. Mutated by `take`."""

    log: str
    tasks: Sequence[Task]
    matcher: Matcher
    is_repeated: bool
    """Whether rows with one id are several responses to the question, and not a mistake."""
    _tally: Tally = field(init=False)
    _examples: dict[str, list[str]] = field(init=False, default_factory=lambda: defaultdict(list))
    _seen: dict[int, set[str]] = field(init=False, default_factory=dict)
    """By question, the responses that there are, by what tells them apart; empty where they are as many as there are."""

    def __post_init__(self) -> None:
        self._tally = Tally(f"score {self.log}", total=0)

    def take(self, rows: Rows) -> Iterator[Said]:
        """The responses that are scored."""
        for row in rows:
            self._tally.total += 1
            if not isinstance(row, Logged):
                self._refuse("unreadable", f"{row[0]} {row[1].why}")
                continue
            found = self._find(row)
            if isinstance(found, str):
                self._refuse(found, row.name)
            else:
                self._tally.add("ok")
                yield Said(found, row.text or "", row.is_cut)

    def _find(self, row: Logged) -> int | str:
        """The row's question, or why it is not scored."""
        found = self.matcher.find(row)
        if isinstance(found, str):
            return found
        if row.text is None:
            return "no_text"
        seen = self._seen.setdefault(found, set())
        if not self.is_repeated:
            if row.sample in seen:
                return "doubled"
            seen.add(row.sample)
        return found

    def _refuse(self, reason: str, name: str) -> None:
        self._tally.add("failed" if reason == "no_text" else "refused", reason=reason)
        if len(self._examples[reason]) < _NUM_EXAMPLES:
            self._examples[reason].append(name)

    def account(self) -> LogAccount:
        """What became of the rows so far."""
        missing = [task.id for number, task in enumerate(self.tasks) if number not in self._seen]
        return LogAccount(
            log=self.log,
            count=self._tally.close(),
            examples={reason: tuple(names) for reason, names in self._examples.items()},
            num_asked=len(self.tasks),
            num_missing=len(missing),
            missing=tuple(missing[:_NUM_EXAMPLES]),
        )


def describe_account(account: LogAccount) -> list[str]:
    """What is not scored and what is missing, each in a sentence with some of its places and the remedy."""
    said = []
    for reason, names in account.examples.items():
        number, word = account.count.reasons[reason], reason.replace("_", " ")
        said.append(f"{account.log}: {number} {word}, as {', '.join(names)}: {REASONS[reason]}")
    if account.num_missing:
        missing = (
            f"{account.num_missing} of {account.num_asked} questions have no response, as {', '.join(account.missing)}"
        )
        said.append(f"{account.log}: {missing}: they are in no figure")
    return said
