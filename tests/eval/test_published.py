"""The paper's figures beside ours: only for its model and benchmark, and with what the number of questions can see."""

import io

import pytest
from rich.console import Console

from vcot.eval.published import compare_published, describe_published, load_published, render_published
from vcot.eval.statistics import compare_unpaired, estimate_accuracy
from vcot.eval.table import build_results
from vcot.pipeline.records import CheckpointRef, Interval, Score
from vcot.services.recipes.recipe import load_recipe

PAPER = load_recipe("paper")
BASE = CheckpointRef(name="base", digest="sha256:aa", kind="base")
POLICY = CheckpointRef(name="dpo-1", digest="sha256:bb", kind="merged", parent="sha256:aa")


def make_results(share, num=2017):
    scores = [
        Score(
            key=f"{checkpoint.name}-{i}-{prompt}", task=str(i), subject="NAT", image=str(i), checkpoint=checkpoint.digest,
            prompt=prompt, temperature=0.4, value="correct" if i < share * num else "incorrect", target="A", num_choices=4,
        )
        for checkpoint in (BASE, POLICY) for prompt in ("zero_shot", "cot") for i in range(num)
    ]  # fmt: skip
    return build_results(scores, [BASE, POLICY], (), seed=0, num_samples=1)


def compare(share, num=2017, *overrides):
    recipe = load_recipe("paper", overrides)
    return compare_published(make_results(share, num), recipe.eval, recipe.model.source, load_published())


def test_the_papers_figures_stand_beside_the_base_models():
    zero_shot, cot = compare(0.664)
    assert (zero_shot.checkpoint, zero_shot.prompt, zero_shot.paper, cot.paper) == (BASE, "zero_shot", 0.593, 0.5518)
    assert zero_shot.difference.value == pytest.approx(0.071, abs=5e-4)
    assert zero_shot.mde == pytest.approx(0.0425, abs=5e-4), "2.8 standard errors of 1.05 and 1.09 points together"
    assert zero_shot.is_clear
    assert cot.is_clear


def test_what_the_figures_say_in_words():
    assert describe_published(compare(0.60)) == (
        "base differs from the paper with cot at 0.4 (+4.9 points). The other figure cannot be told from the paper's. With "
        "this many questions on both sides, true differences of 4.3 to 4.4 points are told from noise four times in five. "
        "The weights are the same; prompt, parser and sampling may not be."
    )
    assert "The 2 figures cannot be told from the paper's." in describe_published(compare(0.58, 40))
    out = io.StringIO()
    console = Console(file=out, width=80)
    for part in render_published(compare(0.664)):
        console.print(part)
    assert "zero_shot 0.4 66.4 59.3 +7.1 +4.2 to +10.1 4.3" in " ".join(out.getvalue().split())
    assert describe_published([]) == ""


@pytest.mark.parametrize(
    "override",
    [
        "model.source=nano",
        "eval.split=validation",
        "eval.benchmark=aokvqa",
        "model.source=liuhaotian/llava-v1.5-7b",
        'eval.judge={kind = "pointwise", model = "gpt-4o-mini"}',
    ],
)
def test_another_model_or_benchmark_is_not_compared(override):
    assert compare(0.664, 50, override) == []


def test_a_published_share_adds_its_own_binomial_error():
    ours = estimate_accuracy([1] * 600 + [0] * 400, range(1000))
    interval, mde = compare_unpaired(ours, 0.6, 10**9)
    assert interval.value == pytest.approx(0)
    assert (interval.high - interval.low) == pytest.approx(ours.high - ours.low, rel=1e-3)
    wider, larger = compare_unpaired(ours, 0.6, 1000)
    assert (wider.high - wider.low) == pytest.approx(2**0.5 * (interval.high - interval.low), rel=0.01)
    assert larger == pytest.approx(2**0.5 * mde, rel=0.01)
    with pytest.raises(ValueError, match="one cluster"):
        compare_unpaired(Interval(value=1, low=0, high=1, n=1), 0.6, 1000)
