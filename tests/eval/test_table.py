"""Table 1 from scores: what counts, what does not, and what the differences say."""

import io

import pytest
from rich.console import Console

from vcot.eval.table import (
    build_chance,
    build_differences,
    build_results,
    describe_differences,
    describe_family,
    format_p,
    render_results,
)
from vcot.pipeline.records import CheckpointRef, Score

BASE = CheckpointRef(name="base", digest="sha256:aa", kind="base")
POLICY = CheckpointRef(name="dpo-1", digest="sha256:bb", kind="merged", parent="sha256:aa")
SUBJECTS = ("NAT", "SOC", "LAN")


def score(task, value, checkpoint=BASE, index=0, error=None, **fields):
    defaults = {"subject": "NAT", "image": f"image-{task}", "prompt": "cot", "temperature": 0.4, "num_choices": 4}
    return Score(
        key=f"{checkpoint.name}-{task}-{index}-{fields}", task=str(task), checkpoint=checkpoint.digest, value=value,
        target="A", error=error, **(defaults | fields),
    )  # fmt: skip


def outcomes(num_correct, num, first=0, **fields):
    return [score(first + i, "correct" if i < num_correct else "incorrect", **fields) for i in range(num)]


def test_failed_requests_are_in_no_figure_and_no_answers_are_not_correct():
    scores = [
        score(1, "correct"),
        score(2, "no_answer"),
        score(3, None, error="timed out"),
        score(4, "incorrect", subject="LAN"),
    ]
    [row] = build_results(scores, [BASE, POLICY], SUBJECTS, seed=3, num_samples=1)
    assert set(row.accuracy) == {"Avg", "NAT", "LAN"}
    assert row.accuracy["Avg"].value == pytest.approx(1 / 3)
    assert (row.accuracy["NAT"].value, row.accuracy["LAN"].value) == (0.5, 0)
    assert (row.num_scored, row.num_failed, row.seed) == (3, 1, 3)
    assert row.no_answer == pytest.approx(1 / 3)


def test_everything_failed():
    [row] = build_results([score(1, None, error="x")], [BASE], SUBJECTS, seed=0, num_samples=1)
    assert (row.accuracy, row.num_scored, row.num_failed, row.chance) == ({}, 0, 1, 0.25)
    assert render([row], [], {})


def test_rows_stand_by_checkpoint_then_prompt_then_temperature():
    scores = [
        score(1, "correct", checkpoint=checkpoint, prompt=prompt, temperature=temperature)
        for prompt in ("zero_shot", "cot")
        for temperature in (0.8, 0.4)
        for checkpoint in (POLICY, BASE)
    ]
    rows = build_results(scores, [BASE, POLICY], SUBJECTS, seed=0, num_samples=1)
    assert [(row.checkpoint.name, row.prompt, row.temperature) for row in rows] == [
        (name, prompt, temperature)
        for name in ("base", "dpo-1")
        for prompt in ("zero_shot", "cot")
        for temperature in (0.4, 0.8)
    ]


def test_questions_about_one_image_are_one_cluster():
    scores = [score(i, "correct" if i % 4 < 2 else "incorrect", image=f"image-{i // 4}") for i in range(40)]
    [row] = build_results(scores, [BASE], SUBJECTS, seed=0, num_samples=1)
    assert row.accuracy["Avg"].n == 10


def test_chance_counts_each_question_once():
    scores = [score(1, "correct", index=i) for i in range(5)] + [score(2, "correct", num_choices=2, subject="LAN")]
    assert build_chance(scores, SUBJECTS) == {"Avg": 0.375, "NAT": 0.25, "LAN": 0.5}


def test_columns_are_the_benchmarks_and_a_text_cannot_be_guessed():
    scores = [
        score(1, "correct", subject="clocks", num_choices=0),
        score(2, "incorrect", subject="other", num_choices=0),
    ]
    [row] = build_results(scores, [BASE], ("clocks", "signs"), seed=0, num_samples=1)
    assert {column: interval.value for column, interval in row.accuracy.items()} == {"Avg": 0.5, "clocks": 1.0}
    assert row.chance == 0
    assert build_chance(scores, ("clocks", "signs")) == {"Avg": 0, "clocks": 0}


def test_difference_is_paired_on_the_questions_that_both_answered():
    scores = outcomes(50, 100) + outcomes(70, 100, checkpoint=POLICY)[:-1]
    scores += [score(99, None, checkpoint=POLICY, error="timed out"), score(100, "correct")]
    [difference] = build_differences(scores, BASE, [POLICY])
    assert difference.num_questions == 99
    assert difference.accuracy.value == pytest.approx(20 / 99)
    assert difference.accuracy.low > 0
    assert difference.p_value == difference.p_holm < 0.001


def test_several_samples_of_a_question_are_averaged():
    scores = [score(t, v, index=i) for t in range(10) for i, v in enumerate(("correct", "incorrect"))]
    scores += [score(t, "correct", index=i, checkpoint=POLICY) for t in range(10) for i in range(2)]
    [difference] = build_differences(scores, BASE, [POLICY])
    assert (difference.num_questions, difference.accuracy.value) == (10, 0.5)


def test_no_common_setting_is_no_difference():
    assert (
        build_differences(outcomes(5, 10) + outcomes(5, 10, checkpoint=POLICY, temperature=0.8), BASE, [POLICY]) == []
    )


def test_p_values_are_corrected_for_their_number():
    scores = [
        s
        for temperature, right in ((0.4, 60), (0.8, 52))
        for s in outcomes(50, 100, temperature=temperature)
        + outcomes(right, 100, checkpoint=POLICY, temperature=temperature)
    ]
    first, second = build_differences(scores, BASE, [POLICY])
    assert first.p_holm == pytest.approx(2 * first.p_value)
    assert second.p_holm == pytest.approx(second.p_value)


def test_three_checkpoints_are_compared_among_themselves_in_one_family():
    other = CheckpointRef(name="mdpo", digest="sha256:cc", kind="merged", parent="sha256:aa")
    scores = outcomes(50, 100) + outcomes(60, 100, checkpoint=POLICY) + outcomes(75, 100, checkpoint=other)
    found = build_differences(scores, BASE, [POLICY, other])
    assert [(d.policy.name, d.base.name) for d in found] == [("dpo-1", "base"), ("mdpo", "base"), ("mdpo", "dpo-1")]
    assert [round(100 * d.accuracy.value) for d in found] == [10, 25, 15]
    least = min(found, key=lambda d: d.p_value)
    assert least.p_holm == pytest.approx(3 * least.p_value)
    assert "all 3 differences of this table together, of 3 pairs of checkpoints" in describe_family(found)
    assert [text.split(" with ")[0] for text in describe_differences(found)] == [
        "dpo-1 answers more questions right than base",
        "mdpo answers more questions right than base",
        "mdpo answers more questions right than dpo-1",
    ]


def test_mcnemars_exact_test_stands_beside_the_paired_one():
    """Of 12 questions the policy alone has 6 right: 2 / 2**6; at half of the level where two such tests are made."""
    scores = outcomes(4, 12) + outcomes(10, 12, checkpoint=POLICY)
    [found] = build_differences(scores, BASE, [POLICY])
    assert (found.better_on, found.p_exact) == ((0, 6), pytest.approx(2 / 64))
    [said] = describe_differences([found])
    assert "McNemar's exact test, which counts the questions on which each is the better one, says the same." in said
    assert describe_family([found]) == "p is of one test only, and so not corrected."
    scores += outcomes(4, 12, temperature=0.8) + outcomes(10, 12, checkpoint=POLICY, temperature=0.8)
    both = build_differences(scores, BASE, [POLICY])
    assert [d.p_exact for d in both] == pytest.approx([4 / 64] * 2)
    [said] = describe_differences(both)
    assert "says otherwise with cot at 0.4 (6 questions to 0, p = 0.062) and" in said
    assert "McNemar" not in describe_differences([found.model_copy(update={"p_exact": None})])[0]


@pytest.mark.parametrize(
    ("right", "said"),
    [
        (80, "dpo-1 answers more questions right than base with cot at 0.4 (+30.0 points, p < 0.001)."),
        (20, "dpo-1 answers fewer questions right than base with cot at 0.4 (-30.0 points, p < 0.001)."),
        (51, "The difference cannot be told from noise."),
    ],
)
def test_sentences(right, said):
    differences = build_differences(outcomes(50, 100) + outcomes(right, 100, checkpoint=POLICY), BASE, [POLICY])
    [text] = describe_differences(differences)
    assert text.startswith(said)
    assert f"a true difference of {100 * differences[0].mde:.1f} points" in text


def render(results, differences, chance, width=80):
    console = Console(file=io.StringIO(), width=width)
    for part in render_results(results, differences, chance, SUBJECTS):
        console.print(part)
    return console.file.getvalue()


def test_table_fits_eighty_columns():
    scores = [
        s
        for prompt in ("zero_shot", "cot")
        for first, subject in ((0, "NAT"), (100, "SOC"), (200, "LAN"))
        for checkpoint, right in ((BASE, 30), (POLICY, 40))
        for s in outcomes(right, 44, first, checkpoint=checkpoint, prompt=prompt, subject=subject)
    ]
    results = build_results(scores, [BASE, POLICY], SUBJECTS, seed=0, num_samples=1)
    text = render(results, build_differences(scores, BASE, [POLICY]), build_chance(scores, SUBJECTS))
    assert "…" not in text
    assert "zero_shot 0.4 68.2" in " ".join(text.split())
    assert "chance 25.0 25.0 25.0 25.0" in " ".join(text.split())
    assert "dpo-1 - base" in text


def test_format_p():
    assert [format_p(p) for p in (0.0002, 0.0123, 0.4, 1.0)] == ["p < 0.001", "p = 0.012", "p = 0.4", "p = 1"]
