"""Answers that follow the prior are counted apart from other wrong ones, and only where the image contradicts it."""

import pytest

from vcot.eval.prior import build_prior, describe_prior
from vcot.pipeline.records import CheckpointRef, Score

BASE = CheckpointRef(name="base", digest="sha256:aa", kind="base")
POLICY = CheckpointRef(name="dpo-1", digest="sha256:bb", kind="merged", parent="sha256:aa")


def make_score(number, answer, target="B", checkpoint=BASE, error=None):
    value = None if error else "no_answer" if answer is None else "correct" if answer == target else "incorrect"
    return Score(
        key=f"{checkpoint.name}{number}{target}", task=f"{number}{target}", subject=None, image=f"{number}{target}",
        checkpoint=checkpoint.digest, prompt="cot", temperature=0.4, value=value, answer=answer, target=target, prior="A",
        num_choices=4, error=error,
    )  # fmt: skip


def make_scores(answers, usual="AAAA", checkpoint=BASE):
    odd = [make_score(i, None if a == "-" else a, checkpoint=checkpoint) for i, a in enumerate(answers)]
    return odd + [make_score(i, a, "A", checkpoint) for i, a in enumerate(usual)]


def test_prior_answers_are_counted_apart():
    scores = [*make_scores("AABC-" * 2, usual="AABA"), make_score(10, None, error="timed out")]
    report = build_prior(scores, [BASE])
    (row,) = report.rows
    assert (row.usual.value, row.seen.value, row.prior.value) == (0.75, 0.2, 0.4)
    assert (row.other, row.no_answer, row.num_failed) == (pytest.approx(0.2), 0.2, 1)
    assert row.prior.n == 10
    assert 0 < row.prior.low < 0.4 < row.prior.high < 1
    assert (report.chance, report.num_drawings, report.differences) == (0.25, 11, ())
    assert describe_prior(report) == (
        "A uniform guess would assert the usual state in 25 % of the contradicting drawings."
    )


def test_a_policy_that_looks_is_told_from_a_base_that_does_not():
    scores = [*make_scores("A" * 24), *make_scores("B" * 20 + "A" * 4, checkpoint=POLICY)]
    report = build_prior(scores, [BASE, POLICY])
    (difference,) = report.differences
    assert difference.accuracy.value == pytest.approx(-20 / 24)
    assert describe_prior(report).startswith(
        "dpo-1 asserts the usual state less often than base with cot at 0.4 (-83.3 points"
    )
    alike = build_prior([*make_scores("A" * 24), *make_scores("A" * 23 + "B", checkpoint=POLICY)], [BASE, POLICY])
    assert describe_prior(alike).startswith("Between the checkpoints nothing can be told from noise.")


def test_without_an_answer_to_one_kind_of_drawing_there_is_no_row():
    assert build_prior(make_scores("AB", usual=""), [BASE]).rows == ()
