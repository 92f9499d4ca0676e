"""What comparisons in rounds share: whose turn it is, processor time, medians, and how far vcot is ahead."""

from __future__ import annotations

import resource
import statistics
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from bench.engine import say
from vcot.pipeline.errors import VcotError

Outcome = TypeVar("Outcome")
"""A data class of figures."""


class PeerError(VcotError):
    """A command failed, did not end in time, or did something else than it was told."""


async def play(
    names: Collection[str],
    number: int,
    folder: Path,
    measure: Callable[[str, Path], Awaitable[Outcome]],
    faults: dict[str, str],
) -> dict[str, Outcome]:
    """Round `number` of all that did not fail before, each in a folder of its own; `faults` gets what a failed one says."""
    turn: dict[str, Outcome] = {}
    for name in take_turns(names, number):
        if name in faults:
            continue
        try:
            turn[name] = await measure(name, folder / f"round-{number}" / name)
        except PeerError as error:
            faults[name] = str(error)
        say(f"round {number}, {name}: {turn.get(name, faults.get(name))}")
    return turn


def take_turns(names: Collection[str], number: int) -> list[str]:
    """The names in round `number`: each round begins with another."""
    listed = [*names]
    shift = number % len(listed)
    return listed[shift:] + listed[:shift]


def children_s() -> float:
    """Processor time of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def medians(outcomes: Sequence[Any], digits: int = 2) -> dict[str, float]:
    """Of each figure."""
    named = [asdict(outcome) for outcome in outcomes]
    return {figure: round(statistics.median(one[figure] for one in named), digits) for figure in named[0]}


def compare(
    rounds: Sequence[Mapping[str, Outcome]], good: Sequence[str], higher: Mapping[str, bool]
) -> dict[str, float]:
    """The median over rounds of each peer's figure over vcot's, or of vcot's over the peer's where higher is better, so that
    more than 1 means that vcot is ahead. Nothing where vcot is not among the good.
    """

    def ahead(turn: Mapping[str, Outcome], name: str, figure: str) -> float:
        ours, theirs = getattr(turn["vcot"], figure), getattr(turn[name], figure)
        return float(ours / theirs if higher[figure] else theirs / ours)

    return {
        f"{figure}_vs_{name}": round(statistics.median(ahead(turn, name, figure) for turn in rounds), 2)
        for name in good
        for figure in higher
        if name != "vcot" and "vcot" in good
    }
