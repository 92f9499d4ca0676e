"""Reading a judge's verdict: tolerant of how it is wrapped, and never a guess. Pure.

A verdict is one JSON object with a `rationale` and a whole `score` from 1 to 10. It is read in a code fence, after a
thought, between other words, with further fields, and with 8.0 for 8. Two objects, 7.5 or 11 of 10 are unreadable.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_THOUGHT_END = "</think>"
MIN_SCORE, MAX_SCORE = 1, 10


@dataclass(frozen=True)
class Verdict:
    """What the judge says of a response."""

    score: float
    rationale: str


class Unreadable(ValueError):
    """A text that is no verdict; the message says why."""


def read_verdict(text: str) -> Verdict:
    """The one verdict in `text`. Raises Unreadable."""
    objects = _find_objects(text.rpartition(_THOUGHT_END)[2])
    if len(objects) != 1:
        raise Unreadable(f"it holds {len(objects)} JSON objects instead of one")
    score, rationale = objects[0].get("score"), objects[0].get("rationale")
    if not isinstance(rationale, str):
        raise Unreadable("it has no rationale")
    is_whole = isinstance(score, int | float) and not isinstance(score, bool) and float(score).is_integer()
    if not is_whole or not MIN_SCORE <= score <= MAX_SCORE:  # type: ignore[operator]
        raise Unreadable(f"its score {score!r} is not a whole number from {MIN_SCORE} to {MAX_SCORE}")
    return Verdict(float(score), rationale.encode("utf-8", "replace").decode())  # type: ignore[arg-type]


def _find_objects(text: str) -> list[dict[str, Any]]:
    """The outermost JSON objects, in order."""
    decoder = json.JSONDecoder(object_pairs_hook=_refuse_twice)
    objects, at = [], text.find("{")
    while at >= 0:
        try:
            found, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"it is not JSON ({error})") from None
        objects.append(found)
        at = text.find("{", end)
    return objects


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("it gives a field twice")
    return dict(pairs)
