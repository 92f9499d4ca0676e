"""The built-in pair policies: what each takes for a pair, in which order, and why there is none."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcot.pipeline.open_lists import PAIR_POLICY_NAMES
from vcot.pipeline.pairs import Judged, build_pairs
from vcot.pipeline.records import CheckpointRef, ImageGain, ImageRef, Response, SamplingParams, Task
from vcot.pipeline.sections import PairsSection

CHECKPOINT = CheckpointRef(name="base", digest="sha256:aa", kind="base")
SAMPLING = SamplingParams(temperature=0.5, max_tokens=8, n=8, seed=0)
IMAGE = ImageRef(sha256="i", path="i.png", width=4, height=4)
TASK = Task(id="t", question="q?", choices=("red", "blue"), answer=0, images=(IMAGE,), source="nano", split="train")


def judge(index, score, text="", letter=None, interval=(None, None), **fields):
    """A response with its score; `letter` is its final answer."""
    response = Response(
        key=f"r{index}", group="g", task="t", index=index, checkpoint=CHECKPOINT, prompt="thought_specific",
        sampling=SAMPLING, text=text or f"text {index}", answer=letter and f"The answer is ({letter}).", **fields,
    )  # fmt: skip
    return Judged(response, score, "j/1", f"j{index}", *interval)


def pick(policy, judged, task=TASK, **settings):
    """The pairs by index, or the reason why there are none."""
    found = build_pairs([(task, judged)], PairsSection(policy=policy, **settings))
    assert found.count.requested == found.count.ok + found.count.refused + found.count.failed == 1
    pairs = [(int(pair.chosen_key[1:]), int(pair.rejected_key[1:])) for pair in found.pairs]
    return pairs or next(iter(found.count.reasons))


def test_a_margin_takes_what_lies_further_apart_the_widest_gap_first():
    judged = [judge(0, 1.0), judge(1, 0.75), judge(2, 0.0)]
    assert pick("margin", judged, margin=0.25, max_per_task=9) == [(0, 2), (1, 2)]
    assert pick("margin", judged, margin=0.2, max_per_task=9) == [(0, 2), (1, 2), (0, 1)]
    assert pick("margin", judged, margin=0.2, max_per_task=2) == [(0, 2), (1, 2)]
    assert pick("margin", judged, margin=0.2) == [(0, 2)]
    assert pick("margin", judged, margin=1.0) == "below_margin"
    assert pick("margin", [judge(0, 1.0), judge(1, 1.0)]) == "tie"


def test_of_responses_that_say_the_same_one_makes_pairs():
    judged = [judge(0, 0.5, "same"), judge(1, 1.0, " same"), judge(2, 0.0, "other"), judge(3, 0.0, "other")]
    assert pick("margin", judged, max_per_task=9) == [(1, 2)]


def test_all_right_are_set_against_all_wrong_and_what_cannot_be_read_is_neither():
    judged = [judge(0, 0.9, letter="A"), judge(1, 0.8, letter="A"), judge(2, 0.1, letter="B"), judge(3, 0.3, letter="B"),
              judge(4, 0.0, letter=None)]  # fmt: skip
    assert pick("right_wrong", judged, max_per_task=9) == [(0, 2), (1, 2), (0, 3), (1, 3)]
    assert pick("right_wrong", judged, max_per_task=3) == [(0, 2), (1, 2), (0, 3)]
    assert pick("right_wrong", judged) == [(0, 2)]
    cut = [judge(0, 0.9, letter="A", finish_reason="length"), judge(1, 0.0, letter="B")]
    assert pick("right_wrong", cut, choose_cut=True) == "none_right"
    cut = [judge(0, 0.9, letter="A"), judge(1, 0.0, letter="B", finish_reason="length")]
    assert pick("right_wrong", cut) == "none_wrong"


@pytest.mark.parametrize("policy", ["right_wrong", "gold_aware"])
def test_why_gold_gives_no_pair(policy):
    right, wrong = [judge(i, 0.5, letter="A") for i in (0, 1)], [judge(i, 0.5, letter="B") for i in (2, 3)]
    assert pick(policy, right) == "none_wrong"
    assert pick(policy, wrong) == "none_right"
    assert pick(policy, right + wrong) == "right_not_above_wrong"
    assert pick(policy, right + wrong, TASK.model_copy(update={"answer": None})) == "no_gold"


def test_gold_aware_is_one_pair_within_right_and_wrong():
    judged = [
        judge(0, 1.0, letter="B"),
        judge(1, 0.9, letter="A"),
        judge(2, 0.2, letter="B"),
        judge(3, 0.1, letter="A"),
    ]
    assert pick("gold_aware", judged, max_per_task=9) == [(1, 2)], "the best of all is wrong, the worst of all is right"
    assert pick("best_worst", judged) == [(0, 3)]


def test_the_partner_is_the_one_whose_length_is_nearest_within_the_ratio():
    judged = [judge(0, 1.0, "a b c d e f g h"), judge(1, 0.0, "a"), judge(2, 0.5, "a b c d e f g"),
              judge(3, 0.2, "a b c d e f g h i")]  # fmt: skip
    assert pick("length_matched", judged) == [(0, 3)], "9 to 8 is nearer than 8 to 7"
    assert pick("length_matched", judged[:3]) == [(0, 2)]
    assert pick("length_matched", judged[:3], max_length_ratio=1.1) == "no_length_match"
    assert pick("length_matched", judged[:2], max_length_ratio=8) == [(0, 1)]
    assert pick("length_matched", [judge(0, 1.0), judge(1, 1.0)]) == "tie"


def test_length_is_taken_off_the_score_in_standard_deviations():
    judged = [judge(0, 9.0, "w " * 20), judge(1, 8.9, "w w w w w"), judge(2, 2.0, "v " * 10), judge(3, 2.1, "v " * 30)]
    assert pick("length_penalised", judged, rho=0.0) == pick("best_worst", judged) == [(0, 2)]
    assert pick("length_penalised", judged, rho=0.5) == [(1, 3)]

    def penalised(index, rho=0.5):
        lengths, scores = (20, 5, 10, 30), (9.0, 8.9, 2.0, 2.1)
        return standardised(scores)[index] - rho * standardised(lengths)[index]

    assert max(range(4), key=penalised) == 1
    assert min(range(4), key=penalised) == 3


def gained(judged, value):
    """The response with its image gain; None is one that could not be asked for good."""
    said = {"error": "no", "refused": True} if value is None else {"logp_true": value - 9.0, "logp_blank": -9.0}
    fields = {"key": f"g{judged.response.key}", "response": judged.response.key, "checkpoint": CHECKPOINT.digest}
    return replace(judged, gain=ImageGain(**fields, **said))


def test_the_chosen_response_is_the_best_that_the_image_makes_likelier():
    judged = [
        gained(judge(0, 1.0, letter="A"), 0.5),
        gained(judge(1, 0.9, letter="A"), 3.0),
        gained(judge(2, 0.8, letter="A"), 9.0),
        gained(judge(3, 1.0, letter="B"), 9.0),
        judge(4, 0.0, letter="B"),
    ]
    assert pick("image_driven", judged) == [(1, 4)], "the best without its image, too; a wrong one is never chosen"
    assert pick("image_driven", judged, max_per_task=9) == [(1, 4), (2, 4), (1, 2)]
    assert pick("image_driven", judged, image_margin=0.4) == [(0, 4)]
    assert pick("image_driven", judged, image_margin=0.5) == [(1, 4)], "above, not at"
    assert pick("image_driven", judged, image_margin=3.0) == [(2, 4)]
    open_ended = TASK.model_copy(update={"choices": (), "answer": None})
    assert pick("image_driven", judged, open_ended) == [(3, 4)], "without a gold option the score decides"


def test_why_the_image_drives_no_pair():
    right, wrong = gained(judge(0, 1.0, letter="A"), 0.5), judge(1, 0.0, letter="B")
    assert pick("image_driven", [right, wrong]) == "below_image_margin"
    assert pick("image_driven", [gained(right, -5.0), wrong]) == "below_image_margin"
    assert pick("image_driven", [gained(right, None), wrong]) == "no_gain"
    assert pick("image_driven", [replace(right, gain=None), wrong]) == "no_gain"
    assert pick("image_driven", [right, wrong], TASK.model_copy(update={"images": ()})) == "no_image"
    assert pick("image_driven", [gained(judge(0, 1.0, letter="B"), 9.0), wrong]) == "none_right"
    assert pick("image_driven", [right, judge(1, 1.0, letter="B")]) == "tie"


def standardised(values):
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return [(value - mean) / deviation for value in values]


@pytest.mark.parametrize("seed", range(30))
def test_the_penalised_score_is_that_of_the_paper(seed):
    rng = random.Random(seed)
    scores, lengths = [rng.uniform(1, 10) for _ in range(6)], [rng.randint(1, 60) for _ in range(6)]
    judged = [judge(i, score, f"t{i} " * length) for i, (score, length) in enumerate(zip(scores, lengths, strict=True))]
    z = [s - 0.4 * w for s, w in zip(standardised(scores), standardised(lengths), strict=True)]
    best, worst = z.index(max(z)), z.index(min(z))
    expected = [(best, worst)] if scores[best] > scores[worst] else "length_decides"
    assert pick("length_penalised", judged, rho=0.4) == expected


def test_length_alone_makes_no_pair():
    even = [judge(0, 0.5, "a b c"), judge(1, 0.5, "a")]
    assert pick("length_penalised", even, rho=0.5) == "length_decides"
    assert pick("length_penalised", [judge(0, 0.5, "a"), judge(1, 0.5, "b")], rho=0.5) == "tie"


def test_ratings_make_a_pair_where_their_intervals_do_not_overlap():
    intervals = [(1050, 1150), (940, 1060), (860, 940)]
    judged = [judge(i, sum(interval) / 2, interval=interval) for i, interval in enumerate(intervals)]
    assert pick("rating", judged, max_per_task=9) == [(0, 2)], "an interval that ends where the other begins overlaps"
    apart = [*judged, judge(3, 850, interval=(830, 870))]
    assert pick("rating", apart, max_per_task=9) == [(0, 3), (0, 2), (1, 3)]
    assert pick("rating", judged[:2]) == "intervals_overlap"
    assert pick("rating", [judged[0], judge(1, 0.0)]) == "no_interval"
    assert pick("rating", [judge(0, 1.0, interval=(1.0, 1.0)), judge(1, 1.0, interval=(1.0, 1.0))]) == "tie"


JUDGED = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(["a", "b b", "c c c"]), st.sampled_from(["A", "B", None])),
    min_size=2, max_size=6,
)  # fmt: skip


@pytest.mark.parametrize("policy", PAIR_POLICY_NAMES.built_ins)
@given(drawn=JUDGED)
def test_every_policy_gives_pairs_or_a_reason_and_always_the_same(policy, drawn):
    """That each pair is one, `build_pairs` sees to."""
    judged = [
        judge(i, score, text, letter, (score - 0.1, score + 0.1)) for i, (score, text, letter) in enumerate(drawn)
    ]
    found = pick(policy, judged, max_per_task=3)
    assert found == pick(policy, judged, max_per_task=3)
    assert isinstance(found, str) or 1 <= len(found) <= 3
