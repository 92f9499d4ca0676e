"""What `vcot status` says of a run, as records, which whoever only reads them gets without what makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from pydantic import model_validator

from vcot.pipeline.judges.cost import Cost
from vcot.pipeline.records import Record, Usage
from vcot.services.run.live import Live


class StageStatus(Record):
    """What there is of one stage."""

    stage: str
    requested: int = 0
    ok: int = 0
    failed: int = 0
    """Tried without an answer; the stage's command tries again."""
    refused: int = 0
    owed: int = 0
    """Never tried."""
    reasons: Mapping[str, int] = {}
    """How many failed or were refused for what."""
    note: str = ""
    """Where there are no numbers: why; else a remark."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.requested != self.ok + self.failed + self.refused + self.owed:
            raise ValueError(f"stage {self.stage} does not add up: {self!r}")
        return self


class RunStatus(Record):
    """What `vcot status` shows."""

    run: str
    state: str
    """`not begun`, `at work`, `stopped` (unfinished, and no command at work), `finished` or `damaged`."""
    recipe: str | None = None
    holder: int | None = None
    """The process that writes to the run; 0 for none, None where that cannot be told."""
    live: Live | None = None
    """The command that is at work, or the last one that was."""
    live_age_s: float | None = None
    """How old what `live` says is."""
    stages: tuple[StageStatus, ...] = ()
    sampled: Usage | None = None
    """Tokens of all the run's responses."""
    scored: Usage | None = None
    """Tokens of what checkpoints were asked about given texts: image gains, and how likely options are."""
    judged: Cost | None = None
    problems: tuple[str, ...] = ()
    """What could not be read, and what to do about it."""
