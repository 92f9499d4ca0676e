"""What is noted of a whole run by the process that keeps its index, for the viewer, which need not know how it is made."""

from __future__ import annotations

from vcot.pipeline.records import Interval, Record

LIVE_PLACE = "<!--live-->"
"""Where the viewer puts what changes from one second to the next; no text of others can say it, since `<` is escaped."""


class Accuracy(Record):
    """A row of Table 1, for runs side by side."""

    checkpoint: str
    setting: str
    accuracy: Interval


class Summary(Record):
    """A run beside others."""

    recipe: str
    model: str
    judge: str
    accuracies: tuple[Accuracy, ...]
    made_at: float
    """In seconds since 1970."""
