"""Ratings from comparisons, checked against what they must say and against the likelihood itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from vcot.pipeline.ranking import Game, count_swiss_rounds, is_connected, list_all, pair_swiss, rate

GAMES = st.integers(2, 6).flatmap(
    lambda num: st.tuples(
        st.just(num),
        st.fixed_dictionaries({pair: st.sampled_from([0.0, 0.5, 1.0]) for pair in list_all(num)}),
    )
)


def play(outcomes):
    return [Game(first, second, won) for (first, second), won in outcomes.items()]


def minus_log_posterior(strengths, num, games):
    """With a tenth of a win either way between each two, as the module says."""
    virtual = [Game(a, b, w) for a, b in list_all(num) for w in (1.0, 0.0)]
    weighted = [(game, 1.0) for game in games] + [(game, 0.1) for game in virtual]
    total = 0.0
    for game, weight in weighted:
        lead = strengths[game.first] - strengths[game.second]
        total += weight * (game.won * np.logaddexp(0, -lead) + (1 - game.won) * np.logaddexp(0, lead))
    return total + strengths.mean() ** 2


@given(GAMES)
@settings(max_examples=40)
def test_ratings_are_the_maximum_of_the_likelihood(drawn):
    num, outcomes = drawn
    best = minimize(minus_log_posterior, np.zeros(num), args=(num, play(outcomes)), tol=1e-10).x
    expected = 1000 + 400 / np.log(10) * (best - best.mean())
    assert [rating.value for rating in rate(num, play(outcomes))] == pytest.approx(expected, abs=0.5)


def test_the_interval_is_that_of_the_likelihoods_curvature():
    """Two that met 100 times: the variance of the log odds is 1 / (n p (1 - p)), and each has half of the difference."""
    games = [Game(0, 1, 1.0)] * 70 + [Game(0, 1, 0.0)] * 30
    first, second = rate(2, games)
    share = (70 + 0.1) / (100 + 0.2)
    error = 1 / np.sqrt(100.2 * share * (1 - share))
    half = 1.96 * error / 2 * 400 / np.log(10)
    assert first.value - second.value == pytest.approx(400 * np.log10(share / (1 - share)), abs=0.1)
    assert (first.high - first.low) / 2 == pytest.approx(half, rel=1e-3)


def test_who_won_every_game_is_first_by_a_finite_lead_and_ties_make_equals():
    best, middle, worst = rate(3, [Game(0, 1, 1.0), Game(0, 2, 1.0), Game(1, 2, 1.0)])
    assert 3000 > best.value > middle.value > worst.value > -1000
    assert len({round(rating.value, 6) for rating in rate(3, [Game(a, b, 0.5) for a, b in list_all(3)])}) == 1
    assert rate(1, [])[0].value == 1000


def test_what_no_comparison_links_is_not_rated():
    assert not is_connected(4, [Game(0, 1, 1.0), Game(2, 3, 1.0)])
    assert is_connected(4, [Game(0, 1, 1.0), Game(2, 3, 1.0), Game(1, 3, 0.5)])
    with pytest.raises(ValueError, match="2 comparisons do not connect all 4"):
        rate(4, [Game(0, 1, 1.0), Game(2, 3, 1.0)])


@given(st.integers(2, 12), st.randoms(use_true_random=False))
def test_a_swiss_schedule_connects_all_without_a_second_meeting(num, random):
    games = []
    for _ in range(count_swiss_rounds(num)):
        pairs = pair_swiss(num, games)
        assert len({place for pair in pairs for place in pair}) == 2 * len(pairs)
        assert len(pairs) == num // 2 or num == 6, "of six, all that have not met may be of two groups of three"
        games += [Game(a, b, random.choice([0.0, 0.5, 1.0])) for a, b in pairs]
    met = [frozenset((game.first, game.second)) for game in games]
    assert len(set(met)) == len(met)
    assert is_connected(num, games)


def test_a_swiss_round_leaves_none_out_who_could_have_played():
    """With (0, 2) and (1, 3), 4 and 5 would be left, who have met."""
    games = [Game(0, 1, 0.5), Game(2, 3, 0.5), Game(4, 5, 0.5)]
    assert pair_swiss(6, games) == [(0, 2), (1, 4), (3, 5)]


def test_a_swiss_round_pairs_those_that_won_as_often():
    games = [Game(0, 1, 1.0), Game(2, 3, 0.0)]
    assert pair_swiss(4, games) == [(0, 3), (1, 2)]
    assert pair_swiss(3, [Game(0, 1, 1.0)]) == [(2, 1)], "who has rested comes first"
    assert [count_swiss_rounds(num) for num in (1, 2, 3, 8)] == [0, 1, 2, 4]
