"""Our statistics against those of others: scipy, statsmodels, and inspect_ai's formula."""

import numpy as np
import pytest
from scipy import stats

from vcot.eval.statistics import (
    adjust_holm,
    clustered_error,
    compare_paired,
    compare_signs,
    estimate_accuracy,
    estimate_slope,
    split_variance,
)

RNG = np.random.default_rng(13)
CLUSTERS = RNG.integers(0, 30, 200)
FIRST, SECOND = (RNG.random(200) < share for share in (0.55, 0.7))


def inspect_stderr(values, clusters):
    """`stderr(cluster=...)` of inspect_ai (src/inspect_ai/scorer/_metrics/std.py), by its description.

    Over clusters, the sum of all products of two deviations from the mean; times C / (C - 1); its root by their number.
    """
    deviations = np.asarray(values, float) - np.mean(values)
    squares = sum(np.outer(own, own).sum() for label in set(clusters) if len(own := deviations[clusters == label]))
    num = len(set(clusters))
    return np.sqrt(squares * num / (num - 1)) / len(deviations)


def test_the_clustered_error_is_inspects_and_statsmodels():
    from statsmodels.api import OLS

    found = clustered_error(FIRST, list(CLUSTERS))
    assert found == pytest.approx(inspect_stderr(FIRST, CLUSTERS), rel=1e-12)
    fit = OLS(FIRST.astype(float), np.ones(200)).fit(cov_type="cluster", cov_kwds={"groups": CLUSTERS})
    assert found == pytest.approx(fit.bse[0], rel=1e-9)


def test_the_slopes_interval_is_statsmodels_with_the_small_sample_factor_and_students_t():
    from statsmodels.api import OLS, add_constant

    few = CLUSTERS % 4
    lengths = RNG.random(200) + few
    clustered = {"groups": few, "use_correction": False}
    fit = OLS(FIRST.astype(float), add_constant(lengths)).fit(cov_type="cluster", cov_kwds=clustered)
    found = estimate_slope(lengths, FIRST, list(few))
    assert found.value == pytest.approx(fit.params[1], rel=1e-9)
    half = stats.t.ppf(0.975, 3) * np.sqrt(4 / 3) * fit.bse[1]
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=1e-9)


def test_without_clusters_it_is_scipys_standard_error():
    assert clustered_error(FIRST, range(200)) == pytest.approx(stats.sem(FIRST.astype(float)))


def test_the_paired_error_is_the_clustered_one_of_the_differences_but_for_the_added_questions():
    difference = SECOND.astype(float) - FIRST
    found, error = compare_paired(FIRST, SECOND, list(CLUSTERS)), inspect_stderr(difference, CLUSTERS)
    half = stats.t.ppf(0.975, len(set(CLUSTERS)) - 1) * error
    assert (found.interval.high - found.interval.low) / 2 == pytest.approx(half, rel=0.02)


def test_the_accuracys_interval_is_wilsons_of_statsmodels_on_the_effective_size():
    from statsmodels.stats.proportion import proportion_confint

    interval, mean = estimate_accuracy(FIRST, range(200)), FIRST.mean()
    alpha = 2 * stats.norm.sf(stats.t.ppf(0.975, 199))  # Student's critical value, as a level of the normal one
    assert (interval.low, interval.high) == pytest.approx(proportion_confint(mean * 200, 200, alpha, "wilson"))


def test_mcnemars_exact_test_is_statsmodels_and_scipys():
    from statsmodels.stats.contingency_tables import mcnemar

    found = compare_signs(FIRST, SECOND)
    table = [[int((FIRST & SECOND).sum()), found.num_first], [found.num_second, int((~FIRST & ~SECOND).sum())]]
    assert (found.num_first, found.num_second) == (int((FIRST & ~SECOND).sum()), int((SECOND & ~FIRST).sum()))
    assert found.p_value == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert found.p_value == pytest.approx(stats.binomtest(found.num_first, found.num_first + found.num_second).pvalue)


def test_holm_is_statsmodels():
    from statsmodels.stats.multitest import multipletests

    p_values = list(RNG.random(9) ** 3)
    assert adjust_holm(p_values) == pytest.approx(list(multipletests(p_values, method="holm")[1]))


def test_the_variances_are_those_of_an_analysis_of_variance():
    """Balanced: MS within is the one, (MS between - MS within) / k the other; F of scipy is their ratio."""
    shares = RNG.beta(2, 2, 50)
    right = (RNG.random((50, 6)) < shares[:, None]).astype(float)
    found = split_variance(right.ravel(), np.repeat(np.arange(50), 6).tolist())
    ratio = stats.f_oneway(*right).statistic
    assert (found.between * 6 + found.within) / found.within == pytest.approx(ratio)
