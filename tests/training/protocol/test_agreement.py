"""The rule that says whether a checkpoint is the policy that was trained."""

from __future__ import annotations

import numpy as np
import pytest

from vcot.pipeline.errors import CheckpointError
from vcot.pipeline.records import CheckpointRef
from vcot.training.protocol.agreement import NO_NUMBER, Answers, Probe, check_merge, compare_margins, find_served_fault
from vcot.training.protocol.job import MergeReport, Retention


def answers(*logprobs):
    return Answers.of([[value] for value in logprobs])


def test_answers_are_compared_token_by_token():
    base, policy = Answers.of([[-1.0, -2.0], [-3.0]]), Answers.of([[-0.5, -2.0], [-4.0]])
    assert policy.difference(base) == 1.0
    assert policy.margins(base, beta=0.1) == pytest.approx([0.1 * (0.5 + 1.0)])
    assert policy.difference(Answers.of([[float("nan"), -2.0], [-4.0]])) == NO_NUMBER


def test_what_is_left_of_the_margins():
    before = np.array([1.0, 2.0, -1.0, 2.0])
    assert compare_margins(before, before) == Retention(before=1.0, after=1.0, kept=1.0, kept_se=0.0, error=0.0)
    half = compare_margins(before, before / 2)
    assert (half.kept, half.error, half.after) == pytest.approx((0.5, 0.5, 0.5))
    noisy = compare_margins(before, before + np.array([2.0, -1.0, 0.0, 0.0]))
    assert noisy.kept == pytest.approx(1)
    assert noisy.error > 0.5, "noise that leaves the mean is seen"
    assert compare_margins(before, before * np.nan).error == NO_NUMBER
    assert compare_margins(before * 0, before).error == NO_NUMBER


def make_report(**changes):
    exact = Retention(before=0.1, after=0.1, kept=1.0, kept_se=0.0, error=0.0)
    fields = {"dtype": "float32", "held": "float32", "max_abs_logprob": 1e-6, "differs_from_base": 0.1}
    ref = CheckpointRef(name="dpo-x", digest="sha256:1", kind="merged")
    return MergeReport(**{"checkpoint": ref, "num_changed_tensors": 3, "retention": exact, **fields, **changes})


def lossy(error):
    return Retention(before=0.0464, after=0.0130, kept=0.28, kept_se=0.0, error=error)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_abs_logprob": 0.006}, "otherwise than base \\+ adapter"),
        ({"max_abs_logprob": NO_NUMBER}, "otherwise than base \\+ adapter"),
        ({"held": "bfloat16", "retention": lossy(0.72)}, "in bfloat16 keeps 28% of the reward margins.*: do this"),
        ({"retention": lossy(NO_NUMBER)}, "keeps 28%"),
        ({"unquantized": lossy(0.31)}, "on the base in 4 bits, with an error of 31%"),
        ({"num_changed_tensors": 0}, "as its base does"),
        ({"differs_from_base": 1e-7}, "as its base does"),
    ],
)
def test_gate_of_a_new_checkpoint(changes, said):
    check_merge(make_report(), "do this")
    check_merge(make_report(held="bfloat16", max_abs_logprob=0.1), "do this")
    check_merge(make_report(unquantized=lossy(0.29)), "do this")
    with pytest.raises(CheckpointError, match=said):
        check_merge(make_report(**changes), "do this")


def test_trap_rounded_weights():
    """Every log-prob is within bfloat16's tolerance, and yet most of the update is gone; noise alone is let pass."""
    base = answers(-1.0, -1.0, -2.0, -2.0, -1.5, -1.0)
    policy = answers(-0.95, -1.05, -1.93, -2.06, -1.46, -1.05)
    draw = np.random.default_rng(0)

    def fault(share, noise):
        shares = zip(base.logprobs, policy.logprobs, draw.normal(0, noise, 6), strict=True)
        served = Answers(tuple(b + share * (p - b) + e for b, p, e in shares))
        return find_served_fault(served, base, make_probe(base, policy), "bfloat16")

    assert fault(1.0, 0.0) is None
    assert fault(1.0, 0.01) is None
    assert "28% +- 0% of the trained reward margin is left in bfloat16, where 95% must be" in fault(0.28, 0.0)
    assert "cannot be told from its base" in fault(0.0, 0.03)


def make_probe(base, policy):
    ref = CheckpointRef(name="dpo-x", digest="sha256:1", kind="merged")
    return Probe(checkpoint=ref, beta=0.1, pairs=(), base=base.record(), policy=policy.record(), stored=policy.record())
