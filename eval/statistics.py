"""How sure a benchmark's figures are: intervals, paired differences and what the benchmark could have seen at all.

Questions about one image are not independent, so every figure is clustered by image (Miller 2024, "Adding error bars to
evals"). Pure functions over arrays with one entry per response or question and a cluster label for each.

Accuracy: a Wilson score interval whose sample size is the effective one (Korn and Graubard 1998): the number of
responses divided by the design effect, that is the cluster-robust variance over the binomial one, not below 1 (a
smaller one is noise), and at most what it would be if each image gave one answer to all its questions. The critical
value is Student's with clusters - 1 degrees of freedom. A Wilson interval stays within [0, 1] and is sensible for the
44 questions of LAN and near 0 and 1, where mean +- 1.96 standard errors and the bootstrap have no width at all.

Difference: the mean over questions of the paired differences, with a cluster-robust standard error and Student's t; for
one question per image it is the paired t-test. As Agresti and Min (2005) do for paired proportions, half a question is
added in which only the one was right, and half in which only the other was: so two checkpoints that agree on every
question are not reported as equal with certainty. Interval and p-value come from the same statistic and always agree.
McNemar's (1947) exact test stands beside it: it asks only which of the two is better on how many questions, takes each
question as independent, and needs no large sample.

Several responses to a question, of one seed or of several, are draws from that question: they count in its cluster, so that
they narrow the interval by what they tell and not by their number. `split_variance` says how much of the uncertainty they
can remove at all.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vcot.pipeline.records import Interval

CONFIDENCE = 0.95
POWER = 0.8
_TAIL = (1 + CONFIDENCE) / 2

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PairedDifference:
    """The second of two checkpoints minus the first, on the same questions; in shares, not points."""

    interval: Interval
    p_value: float
    """Two-sided, that the two are equally good."""
    mde: float
    """The smallest true difference that a benchmark of this size and noise finds with 80 % power at the 5 % level."""


@dataclass(frozen=True)
class Variances:
    """Of single responses' correctness: between the questions, and within one question from response to response."""

    between: float
    """Of the questions' true shares, at least 0."""
    within: float
    """The mean over questions of the variance of their responses."""

    @property
    def correlation(self) -> float:
        """Of two responses to one question, in [0, 1]; 0 where nothing varies."""
        total = self.between + self.within
        return self.between / total if total else 0.0


@dataclass(frozen=True)
class SignTest:
    """On how many questions each of two checkpoints is better, and McNemar's exact p-value, two-sided."""

    num_first: int
    num_second: int
    p_value: float


def estimate_accuracy(correct: ArrayLike, clusters: Sequence[Hashable], *, num_behind: int = 1) -> Interval:
    """The mean of `correct` (from 0 to 1 per response) with its 95 % interval, clustered.

    Where an entry is a share of 0 to 1, `num_behind` says how many responses are behind it at most, and so how many
    independent ones it can be worth. One cluster says nothing about another: its interval is [0, 1]. Raises ValueError for
    no responses.
    """
    values = np.asarray(correct, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no responses to estimate an accuracy from")
    labels = _number(clusters)
    sizes = np.bincount(labels)
    mean = float(values.mean())
    if len(sizes) == 1:
        return Interval(value=mean, low=0.0, high=1.0, n=1)
    size = _effective_size(values, labels, values.size * num_behind)
    low, high = wilson_interval(mean, size, _critical(len(sizes) - 1, _TAIL))
    return Interval(value=mean, low=low, high=high, n=len(sizes))


def wilson_interval(share: float, size: float, critical: float) -> tuple[float, float]:
    """Wilson's (1927) score interval of a `share` of `size` trials, `critical` standard errors wide on each side."""
    square = critical**2
    centre = (share + square / (2 * size)) / (1 + square / size)
    half = critical / (1 + square / size) * math.sqrt(share * (1 - share) / size + square / (4 * size**2))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def compare_paired(first: ArrayLike, second: ArrayLike, clusters: Sequence[Hashable]) -> PairedDifference:
    """`second` minus `first`, each the share correct per question (same questions, same order), clustered.

    One cluster says nothing about another: its interval is [-1, 1]. Raises ValueError for no questions.
    """
    difference = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    if difference.size == 0:
        raise ValueError("no questions to compare on")
    mean = float(difference.mean())
    labels = _number(clusters)
    num_clusters = int(labels.max()) + 1
    if num_clusters == 1:
        return PairedDifference(Interval(value=mean, low=-1.0, high=1.0, n=1), p_value=1.0, mde=1.0)
    # Half a question each way adds nothing to the sum of differences, and 2 * 0.5 * 1**2 to their squares.
    size = difference.size + 2
    centre = float(difference.sum()) / size
    error = math.sqrt(_residual_squares(difference, labels) + num_clusters / (num_clusters - 1)) / size
    freedom = num_clusters - 1
    half = _critical(freedom, _TAIL) * error
    interval = Interval(value=mean, low=max(-1.0, centre - half), high=min(1.0, centre + half), n=num_clusters)
    p_value = float(2 * _special().stdtr(freedom, -abs(centre) / error))
    return PairedDifference(interval, p_value, minimum_detectable_effect(error, freedom))


def estimate_mean(values: ArrayLike, clusters: Sequence[Hashable]) -> tuple[Interval, float]:
    """The mean of any numbers with its 95 % interval (Student's t, clustered, not bounded), and the p that it is 0.

    One cluster says nothing about another: its interval is the mean alone, with no width, p is 1, and `n` says so. Raises
    ValueError for no values.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.size == 0:
        raise ValueError("no values to take the mean of")
    mean, num_clusters = float(numbers.mean()), len(set(clusters))
    if num_clusters == 1:
        return Interval(value=mean, low=mean, high=mean, n=1), 1.0
    freedom, error = num_clusters - 1, clustered_error(numbers, clusters)
    half = _critical(freedom, _TAIL) * error
    ratio = abs(mean) / error if error else math.inf if mean else 0.0
    p_value = float(2 * _special().stdtr(freedom, -ratio))
    return Interval(value=mean, low=mean - half, high=mean + half, n=num_clusters), p_value


def clustered_error(values: ArrayLike, clusters: Sequence[Hashable]) -> float:
    """The standard error of the mean of `values`, clustered in C >= 2 clusters, with the factor C / (C - 1).

    Miller 2024, Appendix A, with that factor; the same as inspect_ai's `stderr(cluster=...)`, and as statsmodels' of a mean.
    """
    numbers = np.asarray(values, dtype=np.float64)
    return math.sqrt(_residual_squares(numbers, _number(clusters))) / numbers.size


def compare_signs(first: ArrayLike, second: ArrayLike) -> SignTest:
    """McNemar's exact test of two shares correct per question (same questions, same order).

    With one response to a question this is McNemar's test; with several it counts on which questions each is the better one,
    which is the sign test. Questions on which both are equally good say nothing. Clusters are not considered.
    """
    difference = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    num_first, num_second = int((difference < 0).sum()), int((difference > 0).sum())
    tail = float(_special().bdtr(min(num_first, num_second), num_first + num_second, 0.5))
    return SignTest(num_first, num_second, min(1.0, 2 * tail))


def split_variance(correct: ArrayLike, questions: Sequence[Hashable]) -> Variances | None:
    """The two variances of `correct` (from 0 to 1 per response), estimated without bias but for the bound at 0.

    A one-way analysis of variance by its moments. Questions with one response tell nothing about `within`. None where
    no question has two responses, or there is only one question.
    """
    values, labels = np.asarray(correct, dtype=np.float64), _number(questions)
    counts = np.bincount(labels)
    if len(counts) < 2 or counts.max() < 2:
        return None
    shares = np.bincount(labels, weights=values) / counts
    repeated = counts > 1
    squares = np.bincount(labels, weights=(values - shares[labels]) ** 2)
    within = float((squares[repeated] / (counts[repeated] - 1)).mean())
    between = float(shares.var(ddof=1)) - within * float((1 / counts).mean())
    return Variances(max(0.0, between), within)


def compare_unpaired(ours: Interval, share: float, num_questions: int) -> tuple[Interval, float]:
    """Our accuracy minus a published `share` of `num_questions`, with its 95 % interval, and the effect it could have seen.

    The error of ours is that of its interval, which is clustered; the published one's is binomial. Raises ValueError for
    fewer than two clusters, which say nothing about another sample.
    """
    if ours.n < 2:
        raise ValueError("one cluster cannot be compared with a published figure")
    freedom = ours.n - 1
    critical = _critical(freedom, _TAIL)
    error = math.hypot((ours.high - ours.low) / 2 / critical, math.sqrt(share * (1 - share) / num_questions))
    difference, half = ours.value - share, critical * error
    interval = Interval(value=difference, low=max(-1.0, difference - half), high=min(1.0, difference + half), n=ours.n)
    return interval, minimum_detectable_effect(error, freedom)


def estimate_slope(over: ArrayLike, of: ArrayLike, clusters: Sequence[Hashable]) -> Interval:
    """The slope of `of` over `over` in a straight line with an intercept, by least squares, clustered; not bounded.

    One cluster says nothing about another: its interval is the slope alone, with no width, and `n` says so. Raises
    ValueError where `over` does not vary.
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (over, of))
    spread = x - x.mean()
    if not spread.any():
        raise ValueError("a slope needs values that differ")
    slope = float(spread @ y / (spread @ spread))
    labels = _number(clusters)
    num_clusters = int(labels.max()) + 1
    if num_clusters == 1:
        return Interval(value=slope, low=slope, high=slope, n=1)
    pulls = np.bincount(labels, weights=spread * (y - y.mean() - slope * spread))
    factor = num_clusters / (num_clusters - 1)
    half = _critical(num_clusters - 1, _TAIL) * math.sqrt(factor * float(pulls @ pulls)) / float(spread @ spread)
    return Interval(value=slope, low=slope - half, high=slope + half, n=num_clusters)


def minimum_detectable_effect(standard_error: float, freedom: int, num_tests: int = 1) -> float:
    """The smallest true difference found with 80 % power by a two-sided t-test at the 5 % level, at most 1.

    With `num_tests`, at the level that Holm's correction begins with for so many.
    """
    level = 1 - (1 - CONFIDENCE) / 2 / num_tests
    return min(1.0, (_critical(freedom, level) + _critical(freedom, POWER)) * standard_error)


@dataclass(frozen=True)
class Noise:
    """What decides how small a difference an evaluation can see, beside its size; shares and correlations in [0, 1]."""

    accuracy: float
    """Of both checkpoints."""
    correlation: float
    """Of a response of the one checkpoint with one of the other, to the same question."""
    alike: float
    """Of two responses of one checkpoint to the same question."""

    def paired_variance(self, num_responses: int) -> float:
        """Of the difference of two checkpoints' shares at a question, each the mean of `num_responses` responses.

        Miller 2024, section 5: the variance between questions that is not common to both, and what sampling adds.
        """
        own = (1 + (num_responses - 1) * self.alike) / num_responses
        return 2 * self.accuracy * (1 - self.accuracy) * max(0.0, own - self.correlation)


def plan_effect(noise: Noise, num_questions: int, num_responses: int, num_tests: int = 1) -> float:
    """The `minimum_detectable_effect` of `compare_paired` on so many questions, before any is asked; two or more."""
    squares = num_questions * noise.paired_variance(num_responses) + num_questions / (num_questions - 1)
    return minimum_detectable_effect(math.sqrt(squares) / (num_questions + 2), num_questions - 1, num_tests)


def measure_correlation(
    mde: float, freedom: int, num_questions: int, num_responses: int, accuracies: tuple[float, float], alike: float
) -> float:
    """The `Noise.correlation` with which `plan_effect` would have found `mde`, where the checkpoints have `accuracies`.

    What clusters add to the noise is in it. 0 where an accuracy is 0 or 1.
    """
    error = mde / (_critical(freedom, _TAIL) + _critical(freedom, POWER))
    variance = ((error * (num_questions + 2)) ** 2 - (freedom + 1) / freedom) / num_questions
    first, second = (share * (1 - share) for share in accuracies)
    own = (1 + (num_responses - 1) * alike) / num_responses
    return ((first + second) * own - variance) / (2 * math.sqrt(first * second)) if first and second else 0.0


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjustment: compare each with the level as if it were the only test."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def chance_level(num_choices: Sequence[int]) -> float:
    """The expected accuracy of a uniform guess, given each question's number of choices; 0 of them cannot be guessed."""
    return float(np.mean([1 / num if num else 0.0 for num in num_choices]))


def _effective_size(values: Floats, labels: NDArray[np.intp], largest: int) -> float:
    """How many independent responses are worth as much as these, `largest` at most."""
    sizes = np.bincount(labels)
    smallest = values.size**2 / float((sizes**2).sum())
    binomial = float(values.mean() * (1 - values.mean())) / values.size
    if binomial == 0:
        return smallest
    robust = _residual_squares(values, labels) / values.size**2
    return float(np.clip(values.size * binomial / robust, smallest, largest)) if robust else float(largest)


def _residual_squares(values: Floats, labels: NDArray[np.intp]) -> float:
    """Summed over clusters: the squared sum of deviations from the mean; with the small-sample factor C / (C - 1)."""
    sums = np.bincount(labels, weights=values - values.mean())
    return float((sums**2).sum()) * len(sums) / (len(sums) - 1)


def _number(clusters: Sequence[Hashable]) -> NDArray[np.intp]:
    """Labels as 0, 1, 2 ... in the order of their first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.intp)


def _special() -> Any:
    """Imported when it is needed: who only shows what was found starts a third of a second earlier."""
    from scipy import special

    return special


def _critical(freedom: int, level: float) -> float:
    # scipy.stats has the same as t.ppf, and takes ten times as long to import.
    return float(_special().stdtrit(freedom, level))
