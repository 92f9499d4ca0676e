"""A preview says of every policy what it would make, and what making it makes."""

import pytest

from tests.pipeline.test_pair_policies import TASK, judge
from vcot.pipeline.errors import RecipeError
from vcot.pipeline.open_lists import PAIR_POLICY_NAMES
from vcot.pipeline.pair_preview import MAX_EXAMPLES, Previewing
from vcot.pipeline.pairs import build_pairs
from vcot.pipeline.sections import PairsSection


def make_groups():
    right_long = [judge(0, 1.0, "a b c d", letter="A"), judge(1, 0.0, "a b", letter="B")]
    wrong_wins = [judge(0, 0.8, "a", letter="B"), judge(1, 0.6, "a b c", letter="A")]
    tie = [judge(0, 0.5), judge(1, 0.5)]
    secret = [judge(0, 1.0, "a b c d e", letter="A"), judge(1, 0.5, "x")]
    tasks = [TASK.model_copy(update={"id": name}) for name in ("t0", "t1", "t2")]
    tasks.append(TASK.model_copy(update={"id": "t3", "answer": None}))
    return list(zip(tasks, (right_long, wrong_wins, tie, secret), strict=True))


def preview(groups, **settings):
    previewing = Previewing(PairsSection(**settings))
    for task, judged in groups:
        previewing.add(task, judged)
    return previewing.close()


def test_counts_and_means_of_each_policy_are_those_of_its_pairs():
    found = {row.policy: row for row in preview(make_groups()).policies}
    assert set(found) == set(PAIR_POLICY_NAMES.built_ins)
    row = found["best_worst"]
    assert (row.num_pairs, row.count.ok, row.count.requested, row.count.reasons) == (3, 3, 4, {"tie": 1})
    assert row.mean_length_difference == pytest.approx((2 - 2 + 4) / 3)
    assert row.mean_score_gap == pytest.approx((1.0 + 0.2 + 0.5) / 3)
    assert row.share_right == 0.5, "of two with a gold answer, one"
    row = found["gold_aware"]
    assert (row.num_pairs, row.share_right) == (1, 1.0)
    assert row.count.reasons == {"right_not_above_wrong": 1, "none_right": 1, "no_gold": 1}
    row = found["rating"]
    assert (row.num_pairs, row.mean_length_difference, row.mean_score_gap, row.share_right) == (0, None, None, None)


@pytest.mark.parametrize("policy", PAIR_POLICY_NAMES.built_ins)
def test_the_preview_of_a_policy_is_what_pairing_by_it_gives(policy):
    settings = {"policy": policy, "max_per_task": 2}
    made = build_pairs(make_groups(), PairsSection(**settings))
    found = preview(make_groups(), **settings)
    row = next(row for row in found.policies if row.policy == policy)
    assert (row.num_pairs, row.count) == (len(made.pairs), made.count)
    shown = [(example.task, example.chosen_score, example.rejected_score) for example in found.examples]
    assert shown == [(pair.task, pair.chosen_score, pair.rejected_score) for pair in made.pairs][:MAX_EXAMPLES]


def test_ten_examples_are_held_however_many_pairs_there_are():
    group = make_groups()[0]
    found = preview([group] * 25)
    assert (len(found.examples), found.policies[0].num_pairs) == (10, 25)
    assert {row.policy: len(row.examples) for row in found.policies} == {
        row.policy: min(row.num_pairs, 10) for row in found.policies
    }, "of every policy"
    example = found.examples[0]
    assert (example.question, example.chosen, example.rejected) == ("q?", "a b c d", "a b")


def test_a_policy_of_ones_own_is_among_them_and_one_that_is_not_there_is_said(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def pick(task, may_be_chosen, judged, section):\n    return 'never'\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = preview(make_groups(), policy="mine:pick")
    assert (found.policies[-1].policy, found.policies[-1].count.reasons) == ("mine:pick", {"never": 4})
    with pytest.raises(RecipeError, match="gone"):
        Previewing(PairsSection(policy="gone:pick"))
