"""Ratings of things that were compared two at a time: Bradley and Terry (1952), with intervals. Pure.

The estimate is choix's (iterative Luce spectral ranking, Maystre and Grossglauser 2015), which is the maximum of the
likelihood. Each pair is given a tenth of a win either way beside what was played, so that who won every game has a finite
rating. A tie is half a win each. Intervals come from the curvature of the likelihood at its maximum. Ratings are shown on
Elo's scale: 400 points are odds of 10 to 1, and the mean of all is 1000.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ELO_MEAN = 1000.0
_ELO = 400 / math.log(10)
_PRIOR = 0.1
_CRITICAL = 1.959964
"""Of 95 %, by the normal distribution."""


@dataclass(frozen=True)
class Game:
    """Two things that were compared, by their places in a list."""

    first: int
    second: int
    won: float
    """By the first: 1, 0.5 for a tie, or 0."""


@dataclass(frozen=True)
class Rating:
    """On Elo's scale, with its 95 % interval."""

    value: float
    low: float
    high: float


def rate(num: int, games: Sequence[Game]) -> list[Rating]:
    """A rating for each of `num` things. Raises ValueError where the games do not connect all of them."""
    if not is_connected(num, games):
        raise ValueError(f"{len(games)} comparisons do not connect all {num}")
    import choix
    import numpy as np

    wins = np.full((num, num), _PRIOR)
    np.fill_diagonal(wins, 0.0)
    for game in games:
        wins[game.first, game.second] += game.won
        wins[game.second, game.first] += 1 - game.won
    strengths = choix.ilsr_pairwise_dense(wins) if num > 1 else np.zeros(1)
    strengths = strengths - strengths.mean()
    expected = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
    weights = (wins + wins.T) * expected * (1 - expected)
    covariance = np.linalg.pinv(np.diag(weights.sum(axis=1)) - weights)
    halves = _CRITICAL * np.sqrt(np.diag(covariance))
    return [_show(float(value), float(half)) for value, half in zip(strengths, halves, strict=True)]


def _show(strength: float, half: float) -> Rating:
    value = ELO_MEAN + _ELO * strength
    return Rating(value, value - _ELO * half, value + _ELO * half)


def is_connected(num: int, games: Sequence[Game]) -> bool:
    """Whether any two of `num` things are linked by comparisons."""
    return len(set(_group(num, games))) <= 1


def _group(num: int, games: Sequence[Game]) -> list[int]:
    """For each thing a number that it shares with those to which comparisons link it."""
    groups = list(range(num))
    for game in games:
        old, new = groups[game.second], groups[game.first]
        groups = [new if group == old else group for group in groups]
    return groups


def list_all(num: int) -> list[tuple[int, int]]:
    """Each with each, once."""
    return [(first, second) for first in range(num) for second in range(first + 1, num)]


def count_swiss_rounds(num: int) -> int:
    """One more than it takes to single out a winner."""
    return min(num - 1, math.ceil(math.log2(num)) + 1) if num > 1 else 0


def pair_swiss(num: int, games: Sequence[Game]) -> list[tuple[int, int]]:
    """Who meets whom next: each one that has won about as much and that it has not met; of an odd number, one rests, and
    more only where all have met.

    Who has rested comes first, and as long as some are not linked to the others, those are met. Of two pairings that are
    as good, always the same is made.
    """
    won, met, groups = [0.0] * num, set[frozenset[int]](), _group(num, games)
    for game in games:
        won[game.first] += game.won
        won[game.second] += 1 - game.won
        met.add(frozenset((game.first, game.second)))
    played = [sum(place in pair for pair in met) for place in range(num)]
    left = sorted(range(num), key=lambda place: (played[place], -won[place], place))

    def list_others(first: int, left: Sequence[int]) -> list[int]:
        others = [place for place in left if frozenset((first, place)) not in met]
        return sorted(others, key=lambda place: (groups[place] == groups[first], abs(won[place] - won[first])))

    paired = (_pair_off(left, list_others, num_resting) for num_resting in range(num % 2, num + 1, 2))
    return next(pairs for pairs in paired if pairs is not None)


def _pair_off(
    left: Sequence[int], list_others: Callable[[int, Sequence[int]], list[int]], num_resting: int
) -> list[tuple[int, int]] | None:
    """Each in turn with the first of its others that lets all but `num_resting` find one; None where that cannot be."""
    if not left:
        return []
    first, *rest = left
    for other in list_others(first, rest):
        pairs = _pair_off([place for place in rest if place != other], list_others, num_resting)
        if pairs is not None:
            return [(first, other), *pairs]
    return _pair_off(rest, list_others, num_resting - 1) if num_resting else None
