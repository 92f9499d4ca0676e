"""What every stage does with its items: work off what is owed, several at a time, and account for each.

requested = ok + cached + failed + refused, always. `failed` is owed again by the same command; `refused` will never
succeed as it is asked, is counted and named, and holds nobody up.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from pipeline.concurrency import map_bounded
from pipeline.errors import StageError
from pipeline.records import Judgment, Response, StageCount

T = TypeVar("T")
R = TypeVar("R", Response, Judgment)
MAX_FAILURES_IN_A_ROW = 3
"""Times the concurrency: with so many failures in a row and no answer between them, the server is gone."""


@dataclass
class Tally:
    """The running account of one stage; mutated by the stage that made it."""

    stage: str
    total: int
    ok: int = 0
    cached: int = 0
    failed: int = 0
    refused: int = 0
    last_error: str = ""

    def add(self, outcome: Literal["ok", "cached", "failed", "refused"], num: int = 1) -> None:
        """Count `num` items."""
        setattr(self, outcome, getattr(self, outcome) + num)

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
        )


OnProgress = Callable[[Tally], None]


async def work_off(
    owed: Iterable[T],
    work: Callable[[T], Awaitable[Sequence[R]]],
    tally: Tally,
    *,
    limit: int,
    on_progress: OnProgress,
) -> StageCount:
    """Run `work` over `owed`, at most `limit` at a time; each call returns the durable records of one item.

    Raises StageError when so many items in a row fail that nobody seems to answer any more.
    """
    on_progress(tally)
    failures_in_a_row = 0
    async for records in map_bounded(work, owed, limit=limit):
        for record in records:
            tally.add(_outcome(record))
        failed = records[-1].error is not None and not records[-1].refused
        failures_in_a_row = failures_in_a_row + 1 if failed else 0
        tally.last_error = records[-1].error or tally.last_error
        on_progress(tally)
        if failures_in_a_row >= MAX_FAILURES_IN_A_ROW * limit:
            raise StageError(
                f"{tally.stage}: {failures_in_a_row} requests in a row failed, the last with: {tally.last_error}; "
                "see that the server runs, then repeat the command: what was answered is kept"
            )
    return tally.close()


def _outcome(record: Response | Judgment) -> Literal["ok", "failed", "refused"]:
    if record.error is None:
        return "ok"
    return "refused" if record.refused else "failed"
