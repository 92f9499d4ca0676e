"""What every stage does with its items: work off what is owed, several at a time, and account for each.

requested = ok + cached + failed + refused, always. `failed` is owed again by the same command; `refused` will never
succeed as it is asked, is counted by reason, and holds nobody up. A fault of the account or server ends the stage: nothing
more is asked, and what is in flight is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, TypeVar

from vcot.pipeline.concurrency import Limit, map_bounded
from vcot.pipeline.errors import AccountError, RequestError, StageError
from vcot.pipeline.faults import Place, find_remedy
from vcot.pipeline.odds import OptionScores
from vcot.pipeline.records import ImageGain, Judgment, Response, StageCount

T = TypeVar("T")
Kept = Response | Judgment | ImageGain | OptionScores
R = TypeVar("R", Response, Judgment, ImageGain, OptionScores)
MAX_FAILURES_IN_A_ROW = 3
"""Times the concurrency: with so many failures in a row and no answer between them, the server is gone."""
QUEUED = "queued"
"""The reason of what is answered later, in a batch, and says nothing of the server."""
_KEPT = "what was answered is kept, and the same command goes on"


@dataclass
class Tally:
    """The running account of one stage; mutated by the stage that made it."""

    stage: str
    total: int
    ok: int = 0
    cached: int = 0
    failed: int = 0
    refused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    last_error: str = ""

    def add(self, outcome: Literal["ok", "cached", "failed", "refused"], num: int = 1, reason: str = "") -> None:
        """Count `num` items; those without a result under a reason."""
        setattr(self, outcome, getattr(self, outcome) + num)
        if outcome in ("failed", "refused"):
            self.reasons[reason or "unknown"] += num

    def add_new(self, record: Kept) -> None:
        """Count what came of asking."""
        self.add(_outcome(record), reason=record.reason)
        self.last_error = record.error or self.last_error

    def add_kept(self, record: Kept) -> None:
        """Count what an earlier command was told, for good."""
        self.add("refused" if record.error is not None else "cached", reason=record.reason)

    @property
    def finished(self) -> int:
        """Items with an outcome."""
        return self.ok + self.cached + self.failed + self.refused

    def close(self) -> StageCount:
        """The final account; raises ValueError unless every item has exactly one outcome."""
        return StageCount(
            stage=self.stage,
            requested=self.total,
            ok=self.ok,
            cached=self.cached,
            failed=self.failed,
            refused=self.refused,
            reasons=dict(self.reasons),
        )


def batched(items: Iterable[T], size: int = 16) -> Iterator[tuple[T, ...]]:
    """`items` in tuples of `size`, as work that goes through a whole run takes them."""
    iterator = iter(items)
    while chunk := tuple(islice(iterator, size)):
        yield chunk


OnProgress = Callable[[Tally], None]


async def work_off(
    owed: Iterable[T],
    work: Callable[[T], Awaitable[Sequence[R]]],
    tally: Tally,
    *,
    limit: Limit,
    place: Place,
    on_progress: OnProgress,
) -> StageCount:
    """Run `work` over `owed`, at most `limit` at a time; each call returns the durable records of one item.

    A RequestError that `work` lets through is of the account: no further item is drawn, those in flight are finished, and
    AccountError says what to do at `place`. Raises StageError when so many items in a row fail, or are refused before any
    was answered, that it is not the items.
    """
    on_progress(tally)
    faults: list[RequestError] = []
    in_a_row = 0
    async for records in map_bounded(_guard(work, faults), _draw(owed, faults), limit=limit):
        for record in records:
            tally.add_new(record)
        in_a_row = in_a_row + 1 if _are_suspect(records, tally) else 0
        on_progress(tally)
        if in_a_row >= MAX_FAILURES_IN_A_ROW * (limit if isinstance(limit, int) else limit()):
            raise StageError(
                f"{tally.stage}: {in_a_row} requests in a row failed, the last with: {tally.last_error}; "
                f"see that the server runs and takes such requests, then repeat the command: {_KEPT}"
            )
    if faults:
        fault = faults[0]
        raise AccountError(f"{tally.stage}: {fault}; {find_remedy(fault.reason, place)}; {_KEPT}") from fault
    return tally.close()


def _guard(
    work: Callable[[T], Awaitable[Sequence[R]]], faults: list[RequestError]
) -> Callable[[T], Awaitable[Sequence[R]]]:
    """`work` that puts a fault of the account in `faults`, so that its siblings can end."""

    async def guarded(item: T) -> Sequence[R]:
        try:
            return await work(item)
        except RequestError as fault:
            faults.append(fault)
            return ()

    return guarded


def _draw(owed: Iterable[T], faults: list[RequestError]) -> Iterator[T]:
    """What is owed, until there is a fault of the account."""
    for item in owed:
        if faults:
            return
        yield item


def _outcome(record: Kept) -> Literal["ok", "failed", "refused"]:
    if record.error is None:
        return "ok"
    return "refused" if record.refused else "failed"


def _are_suspect(records: Sequence[Kept], tally: Tally) -> bool:
    """Whether it may be the server: a refusal is the item's own as soon as another item was answered."""
    if not records or records[-1].error is None or records[-1].reason == QUEUED:
        return False
    return not records[-1].refused or not tally.ok + tally.cached
