"""Several responses to a question: the vote, pass@k, and where the uncertainty comes from."""

import io
import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vcot.eval.repeats import build_repeats, describe_repeats, pass_at_k, render_repeats, vote_share
from vcot.eval.statistics import clustered_error, estimate_accuracy
from vcot.pipeline.records import CheckpointRef, Score

BASE = CheckpointRef(name="base", digest="sha256:aa", kind="base")


def score(task, answer, index=0, seed=0, error=None, image=None, temperature=0.8):
    value = None if error else "no_answer" if answer is None else "correct" if answer == "A" else "incorrect"
    return Score(
        key=f"{task}-{seed}-{index}", task=str(task), index=index, seed=seed, subject=None, image=image,
        checkpoint=BASE.digest, prompt="cot", temperature=temperature, value=value, answer=answer, target="A", num_choices=4,
        error=error,
    )  # fmt: skip


def question(task, answers, **fields):
    return [score(task, None if a == "-" else a, index, **fields) for index, a in enumerate(answers)]


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_one(case):
    num_right, num, k = case
    subsets = list(combinations(range(num), k))
    share = Fraction(sum(any(i < num_right for i in subset) for subset in subsets), len(subsets))
    assert pass_at_k(num_right, num, k) == pytest.approx(float(share))


def test_pass_at_k_stays_in_bounds_where_binomials_would_not_and_wants_a_k_that_there_is():
    assert pass_at_k(1, 100_000, 50_000) == pytest.approx(0.5)
    assert pass_at_k(0, 8, 8) == 0
    assert pass_at_k(1, 8, 8) == 1
    for k in (0, 9):
        with pytest.raises(ValueError, match="k is from 1"):
            pass_at_k(1, 8, k)


def test_pass_at_k_is_unbiased_where_the_plug_in_is_not():
    rng = np.random.default_rng(0)
    right = rng.binomial(5, 0.2, 20_000)
    true = 1 - 0.8**3
    assert np.mean([pass_at_k(c, 5, 3) for c in right]) == pytest.approx(true, abs=0.008)
    assert np.mean(1 - (1 - right / 5) ** 3) < true - 0.02


@pytest.mark.parametrize(
    ("answers", "share"),
    [("AAB", 1), ("ABB", 0), ("AB", 1 / 2), ("ABCC", 0), ("ABC", 1 / 3), ("A--", 1), ("---", 0), ("AABBCCD", 1 / 3)],
)
def test_the_vote(answers, share):
    assert vote_share(question(1, answers)) == pytest.approx(share)


def test_a_row_says_all_of_it():
    scores = [s for task in range(20) for s in question(task, "AAAB" if task % 2 else "BBBA")]
    [row] = build_repeats(scores, [BASE])
    assert (row.num_responses, row.num_questions, row.accuracy.value, row.vote.value) == (4, 20, 0.5, 0.5)
    assert {each.k: each.share.value for each in row.pass_at} == pytest.approx(
        {1: 0.5, 2: 0.75, 4: 1.0}
    )  # of two: 1 - C(1,2)/C(4,2) = 1, and 1 - C(3,2)/C(4,2) = 1/2
    assert row.within == pytest.approx(0.25)  # 4/3 x 3/4 x 1/4
    assert row.between == pytest.approx(0.0625 * 20 / 19 - 0.25 / 4)
    assert row.error == pytest.approx(0.25 / math.sqrt(19))
    assert row.least_error == pytest.approx(math.sqrt(row.error**2 - 0.25 / 80))
    assert 0 < row.correlation < 0.1


def test_responses_of_several_seeds_are_further_ones_of_the_question():
    one_seed = [s for task in range(6) for s in question(task, "AB" if task else "AA")]
    two_seeds = [score(s.task, s.answer, seed=s.index) for s in one_seed]
    assert build_repeats(two_seeds, [BASE]) == build_repeats(one_seed, [BASE])


def test_a_failed_request_is_no_response_and_its_question_in_no_pass_at_more():
    scores = question(1, "AA") + question(2, "AB") + [score(3, "B"), score(3, None, 1, error="timed out")]
    [row] = build_repeats(scores, [BASE])
    assert [(each.k, each.num_questions, each.share.value) for each in row.pass_at] == [(1, 3, 0.5), (2, 2, 1.0)]


def test_one_response_to_each_question_has_no_row():
    assert build_repeats([score(task, "A") for task in range(5)], [BASE]) == []
    assert build_repeats(question(1, "AB"), [BASE]) == [], "one question says nothing of others"


def test_pass_at_one_is_the_accuracy_with_its_interval():
    rng = np.random.default_rng(2)
    scores = [s for task in range(60) for s in question(task, ["A" if x else "B" for x in rng.random(4) < 0.4])]
    [row] = build_repeats(scores, [BASE])
    assert row.pass_at[0].share.model_dump() == pytest.approx(row.accuracy.model_dump())


def test_intervals_are_clustered_by_image():
    scores = [s for task in range(40) for s in question(task, "AB", image=f"i{task // 4}")]
    [row] = build_repeats(scores, [BASE])
    assert {row.accuracy.n, row.vote.n, row.pass_at[1].share.n} == {10}


@pytest.mark.parametrize(("mean", "k"), [(0.3, 1), (0.3, 4), (0.8, 2)])
def test_interval_of_pass_at_k_covers(mean, k):
    rng = np.random.default_rng(5)
    draws = rng.beta(mean * 2, (1 - mean) * 2, 200_000)
    true, covered = float(np.mean(1 - (1 - draws) ** k)), 0
    for _ in range(300):
        right = rng.binomial(8, rng.beta(mean * 2, (1 - mean) * 2, 80))
        interval = estimate_accuracy([pass_at_k(c, 8, k) for c in right], range(80), num_behind=8 // k)
        covered += interval.low <= true <= interval.high
    assert covered / 300 >= 0.92


def test_the_sentence_and_the_table():
    scores = [s for task in range(20) for s in question(task, "AAAB" if task % 2 else "BBBA")]
    rows = build_repeats(scores, [BASE])
    [said] = describe_repeats(rows)
    assert "from 5.74 points to 1.28 at best (cot at 0.8" in said
    console = Console(file=io.StringIO(), width=80)
    for part in render_repeats(rows):
        console.print(part)
    text = " ".join(console.file.getvalue().split())
    assert "cot 0.8 50.0" in text
    assert "pass@2" in text
    assert "…" not in text


def test_one_image_has_no_standard_error_and_two_have():
    [alone] = build_repeats(question(1, "AB", image="one") + question(2, "AA", image="one"), [BASE])
    assert alone.error == 1.0
    [two] = build_repeats(question(1, "AB", image="one") + question(2, "AA", image="two"), [BASE])
    assert two.error == clustered_error([1, 0, 1, 1], ["one", "one", "two", "two"])


def test_pass_at_is_told_for_powers_of_two_and_for_all_responses():
    [row] = build_repeats(question(1, "ABBBBBBB") + question(2, "BBBBBBBB"), [BASE])
    assert [each.k for each in row.pass_at] == [1, 2, 4, 8]
    [row] = build_repeats(question(1, "ABB") + question(2, "BBB"), [BASE])
    assert [each.k for each in row.pass_at] == [1, 2, 3]
    assert row.pass_at[1].share == estimate_accuracy([pass_at_k(1, 3, 2), pass_at_k(0, 3, 2)], ["1", "2"], num_behind=1)


def test_the_sentence_is_of_the_setting_that_gains_most():
    [row] = build_repeats(question(1, "AB") + question(2, "BB"), [BASE])
    little = row.model_copy(update={"error": 0.10, "least_error": 0.099})
    much = row.model_copy(update={"error": 0.06, "least_error": 0.01, "temperature": 0.2})
    [said] = describe_repeats([little, much])
    assert said.startswith("base: ")
    assert "from 6.00 points to 1.00 at best (cot at 0.2" in said


def test_the_table_has_the_largest_ks_and_nothing_where_there_were_fewer_responses():
    scores = [s for task in range(4) for s in question(task, "A" + "B" * 15)]
    scores += [s for task in range(4) for s in question(task, "AABB", temperature=0.2)]
    [table, *_] = render_repeats(build_repeats(scores, [BASE]))
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    text = console.file.getvalue()
    header = next(line.split() for line in text.splitlines() if "alike" in line)
    assert header == ["one", "vote", "pass@4", "pass@8", "pass@16", "alike"]
    many = next(line.split() for line in text.splitlines() if "cot 0.8" in line)
    few = next(line.split() for line in text.splitlines() if "cot 0.2" in line)
    assert [cell for cell in many if cell in ("25.0", "50.0", "100.0")] == ["25.0", "50.0", "100.0"]
    assert few.count("100.0") == 1
    assert len(few) < len(many)
    assert "Several responses" in str(table.title)
    assert "commonest" in str(table.caption)
