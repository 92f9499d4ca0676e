"""Intervals that cover, tests that hold their level, and the closed forms they must agree with."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vcot.eval.statistics import (
    Noise,
    PairedDifference,
    adjust_holm,
    chance_level,
    clustered_error,
    compare_paired,
    compare_signs,
    compare_unpaired,
    estimate_accuracy,
    estimate_slope,
    measure_correlation,
    minimum_detectable_effect,
    plan_effect,
    split_variance,
    wilson_interval,
)
from vcot.pipeline.records import Interval


def bits(correct, n):
    return np.arange(n) < correct


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (3, 44), (44, 44), (1210, 2017)])
def test_wilson_is_scipys(correct, n):
    low, high = wilson_interval(correct / n, n, stats.norm.ppf(0.975))
    closed = stats.binomtest(correct, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((closed.low, closed.high), abs=1e-12)


def test_one_question_per_image_is_a_wilson_interval_with_students_t():
    interval = estimate_accuracy(bits(1210, 2017), range(2017))
    expected = wilson_interval(1210 / 2017, 2017, stats.t.ppf(0.975, 2016))
    assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-12)
    assert interval.n == 2017
    assert interval.value == 1210 / 2017


@pytest.mark.parametrize(("correct", "n"), [(0, 44), (44, 44), (0, 400), (1, 400)])
def test_interval_near_the_ends_is_within_bounds_and_has_width(correct, n):
    interval = estimate_accuracy(bits(correct, n), range(n))
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.high - interval.low > 2 / n


def test_repeating_every_question_adds_nothing():
    values = bits(30, 44)
    once = estimate_accuracy(values, range(44))
    eight_times = estimate_accuracy(np.tile(values, 8), list(range(44)) * 8)
    assert (eight_times.low, eight_times.high) == pytest.approx((once.low, once.high), abs=2e-3)
    assert eight_times.n == 44


def test_all_right_in_few_clusters_counts_clusters():
    few = estimate_accuracy(np.ones(40), np.arange(40) // 10)
    many = estimate_accuracy(np.ones(40), range(40))
    assert few.low < 0.5 < many.low
    uneven = estimate_accuracy(np.ones(6), [0, 0, 0, 1, 1, 2])
    assert uneven.low == pytest.approx(wilson_interval(1.0, 36 / (9 + 4 + 1), stats.t.ppf(0.975, 2))[0])


@pytest.mark.parametrize(
    ("values", "labels", "size"),
    [
        ([1, 0, 1, 0], [0, 0, 1, 1], 4.0),  # images answered alike: no variance between them
        ([1, 0, 1, 0, 1, 1], [0, 0, 1, 1, 2, 2], 6.0),  # less variance between than within: never more than the answers
        ([1, 1, 1, 0, 0, 0, 1, 0], [0, 0, 1, 1, 2, 2, 3, 3], 8 * (0.25 / 8) / (2 * 4 / 3 / 64)),
        ([1, 1, 0, 0], [0, 0, 1, 1], 2.0),  # the images decide: as many as they are
    ],
)
def test_the_effective_size_by_hand(values, labels, size):
    interval, num_images = estimate_accuracy(values, labels), max(labels) + 1
    expected = wilson_interval(float(np.mean(values)), size, stats.t.ppf(0.975, num_images - 1))
    assert (interval.low, interval.high) == pytest.approx(expected)


def test_one_cluster_says_nothing():
    assert estimate_slope([1, 2], [1, 3], ["a", "a"]) == Interval(value=2, low=2, high=2, n=1)
    assert estimate_accuracy([1, 0, 1], ["a"] * 3).model_dump() == {"value": 2 / 3, "low": 0, "high": 1, "n": 1}
    result = compare_paired([1, 0], [0, 0], ["a"] * 2)
    whole = Interval(value=-0.5, low=-1.0, high=1.0, n=1)
    assert result == PairedDifference(whole, p_value=1.0, mde=1.0)
    with pytest.raises(ValueError, match="one cluster cannot be compared"):
        compare_unpaired(whole, 0.5, 100)


def test_nothing_to_estimate():
    with pytest.raises(ValueError, match="no responses"):
        estimate_accuracy([], [])
    with pytest.raises(ValueError, match="no questions"):
        compare_paired([], [], [])


def draw_clusters(rng, num_clusters, mean, correlation, shift=0.0):
    """Beta-binomial answers: 1 to 4 questions an image, which share a difficulty."""
    sizes = rng.integers(1, 5, num_clusters)
    scale = 1 / correlation - 1
    difficulty = rng.beta(mean * scale, (1 - mean) * scale, num_clusters)
    labels = np.repeat(np.arange(num_clusters), sizes)
    return np.clip(difficulty[labels] + shift, 0, 1), labels


@pytest.mark.parametrize(
    ("num_clusters", "mean"), [(20, 0.5), (44, 0.1), (44, 0.67), (44, 0.95), (400, 0.67), (400, 0.98)]
)
def test_interval_covers(num_clusters, mean):
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(600):
        probability, labels = draw_clusters(rng, num_clusters, mean, 0.3)
        interval = estimate_accuracy(rng.random(len(labels)) < probability, labels)
        covered += interval.low <= mean <= interval.high
    assert covered / 600 >= 0.93


def test_interval_that_ignores_clusters_would_not_cover():
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(600):
        probability, labels = draw_clusters(rng, 100, 0.67, 0.5)
        interval = estimate_accuracy(rng.random(len(labels)) < probability, range(len(labels)))
        covered += interval.low <= 0.67 <= interval.high
    assert covered / 600 < 0.91


@pytest.mark.parametrize(("num_clusters", "mean"), [(44, 0.67), (200, 0.5), (200, 0.97)])
@pytest.mark.parametrize("num_samples", [1, 4])
def test_paired_test_holds_its_level_and_its_interval_covers(num_clusters, mean, num_samples):
    rng = np.random.default_rng(11)
    rejected = covered = 0
    for _ in range(400):
        probability, labels = draw_clusters(rng, num_clusters, mean, 0.3)
        first, second = (rng.binomial(num_samples, probability) / num_samples for _ in range(2))
        result = compare_paired(first, second, labels)
        rejected += result.p_value < 0.05
        covered += result.interval.low <= 0 <= result.interval.high
    assert rejected / 400 <= 0.075
    assert covered == 400 - rejected


def test_effect_as_large_as_the_mde_is_found_four_times_in_five():
    rng = np.random.default_rng(3)
    base, labels = draw_clusters(rng, 300, 0.5, 0.3)
    mde = compare_paired(rng.random(len(labels)) < base, rng.random(len(labels)) < base, labels).mde
    better = np.clip(base + mde, 0, 1)
    true = float((better - base).mean())
    assert true == pytest.approx(mde, rel=0.1)
    found = sum(
        compare_paired(rng.random(len(labels)) < base, rng.random(len(labels)) < better, labels).p_value < 0.05
        for _ in range(300)
    )
    assert 0.7 < found / 300 < 0.9


def test_one_question_per_image_is_close_to_the_paired_t_test():
    rng = np.random.default_rng(1)
    first, second = (rng.random(2000) < p for p in (0.6, 0.63))
    closed = stats.ttest_rel(second.astype(float), first.astype(float))
    result = compare_paired(first, second, range(2000))
    assert result.p_value == pytest.approx(closed.pvalue, rel=0.02)
    assert result.interval.low == pytest.approx(closed.confidence_interval().low, abs=2e-4)


def test_agresti_and_min_by_hand():
    # 100 questions: 10 only the second had right, 4 only the first.
    first = np.array([0] * 10 + [1] * 4 + [1] * 86)
    second = np.array([1] * 10 + [0] * 4 + [1] * 86)
    result = compare_paired(first, second, range(100))
    size, only_second, only_first = 102, 10.5, 4.5
    centre = (only_second - only_first) / size
    error = math.sqrt(only_second + only_first - (only_second - only_first) ** 2 / size) / size
    half = stats.t.ppf(0.975, 99) * error
    assert (result.interval.low, result.interval.high) == pytest.approx((centre - half, centre + half), abs=4e-4)
    assert result.interval.value == pytest.approx(0.06)


def test_checkpoints_that_agree_everywhere_are_not_certainly_equal():
    result = compare_paired(bits(200, 400), bits(200, 400), range(400))
    assert result.p_value == 1
    assert result.interval.low == -result.interval.high < -0.004
    assert result.mde > 0.005


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 9)), min_size=1, max_size=40),
)
def test_invariants(rows):
    first, second, labels = zip(*rows, strict=True)
    interval = estimate_accuracy(first, labels)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    forward, backward = compare_paired(first, second, labels), compare_paired(second, first, labels)
    assert forward.interval.value == -backward.interval.value
    assert forward.p_value == backward.p_value
    assert -1 <= forward.interval.low <= forward.interval.high <= 1
    assert (forward.p_value < 0.05) == (not forward.interval.low <= 0 <= forward.interval.high)


def test_a_published_share_is_compared_with_both_errors():
    found, mde = compare_unpaired(Interval(value=0.7, low=0.6, high=0.8, n=50), 0.6, 2000)
    critical = stats.t.ppf(0.975, 49)
    error = math.hypot(0.1 / critical, math.sqrt(0.6 * 0.4 / 2000))
    assert (found.value, found.n) == (pytest.approx(0.1), 50)
    assert (found.low, found.high) == pytest.approx((0.1 - critical * error, 0.1 + critical * error))
    assert mde == pytest.approx((critical + stats.t.ppf(0.8, 49)) * error)


@pytest.mark.parametrize(("value", "share"), [(0.0, 0.99), (1.0, 0.01)])
def test_a_difference_stays_within_bounds(value, share):
    found, mde = compare_unpaired(Interval(value=value, low=0.0, high=1.0, n=2), share, 100)
    assert (found.low if value < share else found.high) == (-1.0 if value < share else 1.0)
    assert 0 < mde <= 1


def test_mde_of_the_standard_error():
    assert minimum_detectable_effect(0.01, 10**6) == pytest.approx(0.028016, abs=1e-5)
    assert minimum_detectable_effect(0.9, 5) == 1


def test_chance_level():
    assert chance_level([2, 4, 4]) == pytest.approx(1 / 3)


def test_holm():
    assert adjust_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust_holm([0.9, 0.8]) == [1, 1]
    assert adjust_holm([]) == []


def test_a_few_clusters_widen_the_interval_by_the_small_sample_factor():
    """Two images with four questions each: the sandwich variance times clusters / (clusters - 1), by hand."""
    first, second = np.zeros(8), np.array([1, 1, 1, 0, 0, 0, 0, -1])
    found = compare_paired(first, second, [0] * 4 + [1] * 4)
    mean = second.mean()
    squares = sum((second[part] - mean).sum() ** 2 for part in (slice(0, 4), slice(4, 8))) * 2 / (2 - 1)
    centre, error = second.sum() / 10, math.sqrt(squares + 2 / (2 - 1)) / 10
    half = stats.t.ppf(0.975, 1) * error
    assert found.p_value == pytest.approx(2 * stats.t.sf(abs(centre) / error, 1))
    assert (found.interval.low, found.interval.high) == (max(-1.0, centre - half), min(1.0, centre + half))


def test_signs_count_the_better_one_and_equals_say_nothing():
    found = compare_signs([0, 0, 0.5, 1, 1], [1, 0.25, 0.5, 1, 0])
    assert (found.num_first, found.num_second, found.p_value) == (1, 2, 1.0)
    assert compare_signs([1, 1], [1, 1]).p_value == 1
    assert compare_signs([0] * 6, [1] * 6).p_value == pytest.approx(2 / 2**6)


def test_variances_by_hand():
    found = split_variance([1, 0, 1, 1, 0, 0, 1], ["a", "a", "b", "b", "c", "c", "d"])
    assert found.within == pytest.approx((0.5 + 0 + 0) / 3)
    assert found.between == pytest.approx(np.var([0.5, 1, 0, 1], ddof=1) - 0.5 / 3 * (3 / 2 + 1) / 4)
    assert found.correlation == pytest.approx(found.between / (found.between + found.within))
    assert split_variance([1, 0], ["a", "b"]) is None
    assert split_variance([1, 0], ["a", "a"]) is None
    assert split_variance([1] * 4, ["a", "a", "b", "b"]).correlation == 0


def test_shares_are_worth_as_much_as_the_responses_behind_them():
    rng = np.random.default_rng(4)
    right = rng.binomial(8, 0.5, 100) / 8
    alone, behind = estimate_accuracy(right, range(100)), estimate_accuracy(right, range(100), num_behind=8)
    assert behind.high - behind.low < 0.5 * (alone.high - alone.low)
    even = estimate_accuracy([0.5] * 4, range(4), num_behind=3)
    assert (even.low, even.high) == pytest.approx(wilson_interval(0.5, 12, stats.t.ppf(0.975, 3)))


@pytest.mark.parametrize("num_responses", [1, 4])
def test_the_planned_difference_is_the_one_that_the_test_then_says_it_could_see(num_responses):
    """Two checkpoints of equal skill, whose questions are hard for both or for one alone."""
    rng = np.random.default_rng(6)
    common, own = rng.random(4_000), rng.random((2, 4_000))
    chance = np.where(rng.random(4_000) < 0.6, common, own)  # a question's share of right answers, for either
    right = rng.random((2, num_responses, 4_000)) < chance[:, None]
    first, second = right[0], right[1]
    alike = 4 * (np.var(chance) if num_responses > 1 else 0.0)
    correlation = float(np.cov(chance)[0, 1]) / 0.25
    planned = plan_effect(Noise(float(right.mean()), correlation, alike), 4_000, num_responses)
    found = compare_paired(first.mean(0), second.mean(0), range(4_000))
    assert planned == pytest.approx(found.mde, rel=0.04)
    shares = float(first.mean()), float(second.mean())
    measured = measure_correlation(found.mde, 3_999, 4_000, num_responses, shares, alike)
    assert measured == pytest.approx(correlation, abs=0.04)
    assert measure_correlation(found.mde, 3_999, 4_000, num_responses, (0.0, 0.5), alike) == 0


def test_the_planned_difference_by_hand():
    noise = Noise(accuracy=0.6, correlation=0.2, alike=0.5)
    assert noise.paired_variance(1) == pytest.approx(2 * 0.24 * 0.8)
    assert noise.paired_variance(4) == pytest.approx(2 * 0.24 * ((1 + 3 * 0.5) / 4 - 0.2))
    assert Noise(accuracy=0.6, correlation=0.9, alike=0.5).paired_variance(4) == 0
    error = math.sqrt(100 * noise.paired_variance(1) + 100 / 99) / 102
    power, level = stats.t.ppf(0.8, 99), stats.t.ppf(0.975, 99)
    assert plan_effect(noise, 100, 1) == pytest.approx((level + power) * error)
    strict = stats.t.ppf(1 - 0.025 / 6, 99)
    assert plan_effect(noise, 100, 1, num_tests=6) == pytest.approx((strict + power) * error)


def test_a_correlation_is_measured_by_turning_the_plan_round():
    noise = Noise(accuracy=0.7, correlation=0.35, alike=0.6)
    for num_responses in (1, 5):
        mde = plan_effect(noise, 300, num_responses)
        measured = measure_correlation(mde, 299, 300, num_responses, (0.7, 0.7), 0.6)
        assert measured == pytest.approx(0.35)
    uneven = measure_correlation(plan_effect(noise, 300, 1), 299, 300, 1, (0.7, 0.9), 0.6)
    variance = noise.paired_variance(1)
    assert uneven == pytest.approx((0.21 + 0.09 - variance) / (2 * math.sqrt(0.21 * 0.09)))


def test_the_clustered_error_by_hand():
    """Three clusters, whose sums of deviations from 0.5 are 1, -1 and 0; times 3 / (3 - 1)."""
    assert clustered_error([1, 1, 0, 0, 1, 0], ["a", "a", "b", "b", "c", "c"]) == pytest.approx(
        math.sqrt(2 * 3 / 2) / 6
    )
