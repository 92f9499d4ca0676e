"""What a report card says of judges that are known: perfect, blind, a coin, fond of length, unsteady."""

import random

import numpy as np
import pytest
from scipy.stats import linregress

from vcot.eval.report_card import Duel, build_card, estimate_alpha, list_figures, render_card, render_markdown
from vcot.eval.statistics import estimate_slope

NUM = 200


def make_duels(score, seed=0, num=NUM):
    """`score(rng, is_right)` for each of two responses to `num` tasks."""
    rng = random.Random(seed)
    return [Duel(f"t{task}", f"i{task}", score(rng, True), score(rng, False)) for task in range(num)]


def make_lengths(duels, longer=lambda task: 1):
    return {duel.task: (10 * longer(duel.task), 10) for duel in duels}


def card(own, *, lengths=None, num_unjudged=0, **others):
    known = {
        name: others.pop(name)
        for name in ("compared", "rankings", "knows_gold", "both_right", "why_no_self")
        if name in others
    }
    return build_card(
        "j/1", {"own": own, **others}, num_unjudged=num_unjudged, lengths=lengths or make_lengths(own), **known
    )


def knows(rng, is_right):
    return 8 + rng.random() if is_right else 2 + rng.random()


def guesses(rng, is_right):
    return rng.random()


def test_a_judge_that_knows_ranks_well_and_looks():
    found = card(make_duels(knows), again=make_duels(knows), none=make_duels(guesses, 1), blank=make_duels(guesses, 2))
    assert (found.auc.value, found.ties.value, found.stability.value) == (1.0, 0.0, 1.0)
    assert found.verdicts == [
        "This judge ranks well: a right response scores above a wrong one in 100% (98% to 100%) of tasks.",
        "It looks at the image: without it, or with a wrong one, it ranks worse.",
    ]
    none = found.controls[0]
    assert none.lost.value == pytest.approx(1 - none.auc.value)
    assert none.p_value < 0.001


def test_a_coin_is_called_one():
    found = card(make_duels(guesses))
    assert found.verdicts[0].startswith("This judge ranks no better than chance can explain: a right response scores")
    assert found.controls == ()
    assert found.stability is None


def test_a_judge_that_likes_what_is_wrong_is_worse_than_chance():
    assert (
        card(make_duels(lambda rng, is_right: knows(rng, not is_right)))
        .verdicts[0]
        .startswith("This judge ranks worse than chance: ")
    )


def test_one_that_ranks_better_than_chance_but_not_well():
    found = card(make_duels(lambda rng, is_right: rng.gauss(0.5 * is_right, 1)))
    assert found.verdicts[0].startswith("This judge ranks better than chance: ")


def test_a_blind_judge_is_called_blind_with_the_controls_that_show_it():
    own = make_duels(knows)
    found = card(own, none=own, blank=own, other=make_duels(guesses, 1))
    said = "Nothing shows that it looks at the image: with {} it keeps its order in 100% of tasks."
    assert found.verdicts[1:3] == [said.format("no image"), said.format("a blank image")]


def test_one_whose_order_changes_without_being_clearly_worse_is_not_called_blind():
    found = card(make_duels(guesses, 1), none=make_duels(guesses, 2))
    assert found.verdicts[1].startswith("With no image it changes its order in ")
    assert "but not clearly to the worse: it loses" in found.verdicts[1]
    assert "Nothing shows" not in " ".join(found.verdicts)


def test_a_judge_that_follows_length_is_found_out_whatever_being_right_adds():
    rng = random.Random(0)
    longer = {f"t{task}": rng.choice([1, 2, 4]) for task in range(NUM)}
    duels = [Duel(task, task, 5 + 2 * np.log2(times) + 1 + rng.gauss(0, 0.1), 5.0) for task, times in longer.items()]
    found = card(duels, lengths={task: (10 * times, 10) for task, times in longer.items()})
    spread = np.std([score for duel in duels for score in (duel.right, duel.wrong)])
    assert found.length.value == pytest.approx(2 / spread, rel=0.02)
    assert "Its score follows length: it likes longer responses, right or wrong." in found.verdicts
    honest = card(make_duels(knows), lengths={task: (10 * times, 10) for task, times in longer.items()})
    assert not any("length" in sentence for sentence in honest.verdicts)
    assert card(make_duels(knows)).length is None, "lengths that do not differ show nothing"


def test_what_is_unsteady_tied_or_hanging_is_said():
    own = make_duels(lambda rng, _: rng.choice([1, 2]))
    found = card(own, again=make_duels(guesses, 5), compared=(100, 40), num_unjudged=7)
    said = " ".join(found.verdicts)
    assert "It is unsteady: asked again, it keeps the order in" in said
    assert "The order in which it reads two responses decides 40% of its comparisons." in said
    assert "It cannot tell the two apart in" in said
    rows = {what: figure for what, figure, _ in list_figures(found)}
    assert (rows["tasks without both scores"], rows["comparisons that hang on the order"]) == ("7", "40 of 100")


@pytest.mark.parametrize(
    ("lead", "said"),
    [
        (
            0.4,
            "It favours its own responses, or their style: of two right responses that of its own model scores higher in",
        ),
        (-0.4, "It favours the other model's responses, or their style: of two right responses"),
        (0.0, "Nothing shows that it favours its own responses: of two right responses"),
    ],
)
def test_whether_it_favours_its_own_is_told_of_two_right_responses(lead, said):
    rng = random.Random(3)
    both = [Duel(f"t{task}", f"i{task}", rng.random() + lead, rng.random()) for task in range(NUM)]
    found = card(make_duels(knows), both_right=both, why_no_self="this is not said")
    assert found.self_preference.value == sum(duel.won for duel in both) / NUM
    assert said in found.verdicts[-1]
    assert "of 200 tasks or images, where 50% is even" in found.verdicts[-1]
    assert not any("not be measured" in sentence or "this is not said" in sentence for sentence in found.verdicts)
    assert any("its own right response above another model's" in row for row in list_figures(found))
    assert "its own right response above another model's" in render_markdown(found)


def test_ties_between_its_own_and_another_are_even():
    both = [Duel(f"t{task}", f"i{task}", 7.0, 7.0) for task in range(NUM)]
    assert card(make_duels(knows), both_right=both).self_preference.value == 0.5


def test_why_self_preference_is_not_measured_is_said_in_words():
    found = card(make_duels(knows), why_no_self="only one model's responses, its own, are in the run")
    said = (
        "Whether it favours its own responses cannot be measured here, because only one model's responses, its own, are"
    )
    assert said in found.verdicts[-1]
    assert not any("favours" in sentence for sentence in card(make_duels(knows)).verdicts), "a program has none"
    former = type(found).model_validate(card(make_duels(knows)).model_dump() | {"is_own_model": True})
    assert "audited by an earlier version" in former.verdicts[-1]


def test_a_judge_that_mostly_says_nothing_readable_is_told_so_first():
    found = card(make_duels(knows, num=20), num_unjudged=30)
    assert found.verdicts[0] == "It gave no verdict that can be read in 30 of 50 tasks, so the rest says little."
    assert "no verdict" not in card(make_duels(knows, num=20), num_unjudged=2).verdicts[0]


def test_one_that_goes_by_the_gold_answer_is_not_praised_for_it():
    said = "It goes by the gold answer, so its AUC proves nothing"
    assert any(said in sentence for sentence in card(make_duels(knows), knows_gold=True).verdicts)
    assert not any(said in sentence for sentence in card(make_duels(knows)).verdicts)


def test_tasks_of_which_a_control_has_no_score_are_left_out_of_its_comparison():
    own = make_duels(knows)
    found = card(own, none=own[:50])
    assert found.controls[0].auc.n == 50


def test_ways_of_asking_that_share_no_scored_task_with_the_judges_own_are_left_out():
    own = make_duels(knows)
    found = card(own[:100], again=own[100:], none=own[100:], blank=own[50:150])
    assert found.stability is None
    assert [control.shown for control in found.controls] == ["blank"]


def test_alpha_is_krippendorffs():
    assert estimate_alpha([[0, 1, 0, 1], [0, 1, 0, 1]]) == 1.0
    assert estimate_alpha([[0, 1, 0, 1], [1, 0, 1, 0]]) < 0
    assert estimate_alpha([[1, 1], [1, 1]]) is None
    found = card(make_duels(knows), rankings=[[0, 1, 0.5, 1], [0, 1, 1, 1]])
    assert f"{found.alpha:.2f}" in {what: figure for what, figure, _ in list_figures(found)}.values()


def test_the_slope_is_least_squares_and_its_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    y = 1 + 0.5 * x + rng.normal(size=60)
    found = estimate_slope(x, y, range(60))
    assert found.value == pytest.approx(linregress(x, y).slope)
    covered = 0
    for _ in range(400):
        y = 0.5 * x + rng.normal(size=60)
        covered += (i := estimate_slope(x, y, range(60))).low <= 0.5 <= i.high
    assert 0.92 <= covered / 400 <= 0.98
    with pytest.raises(ValueError, match="differ"):
        estimate_slope([1, 1], [1, 2], [0, 1])


def test_the_card_is_told_in_a_terminal_and_as_markdown():
    found = card(make_duels(knows), none=make_duels(guesses, 1))
    table, text = render_card(found)
    assert (table.row_count, found.verdicts[0] in text.plain) == (len(list_figures(found)), True)
    markdown = render_markdown(found)
    assert "- This judge ranks well" in markdown
    assert "| AUC with no image |" in markdown
