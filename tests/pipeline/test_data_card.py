"""What the data card says beside the header that the hub reads (test_pairs.py has that)."""

import re
from html import unescape

import pytest
from huggingface_hub import DatasetCard

from tests.pipeline.test_pairs import make_card, make_pair, make_task
from vcot.pipeline.contamination import KINDS, Contamination
from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges import find_judge
from vcot.pipeline.judges.cost import Cost
from vcot.pipeline.publish import SplitSize
from vcot.pipeline.records import Usage
from vcot.pipeline.sections import JudgeSection
from vcot.services.recipes.recipe import load_recipe

PAIRS = [
    make_pair(make_task(f"t{i}")).model_copy(update={"chosen_score": 4.0 + i, "rejected_score": 0.0}) for i in range(5)
]


def blocks(card):
    """The card's blocks of plain text."""
    return re.findall(r"^(`{3,})text\n(.*?)\n\1$", card, re.DOTALL | re.MULTILINE)


def test_scores_and_lengths_are_counted_in_equal_steps():
    sizes = {
        "train": SplitSize(4, 1, 1, [10, 20, 30, 50], [10, 10, 10, 10]),
        "validation": SplitSize(1, 1, 1, [50], [12]),
    }
    scores, words = [text.splitlines() for _, text in blocks(make_card(PAIRS[:4], PAIRS[4:], sizes=sizes))[:2]]
    assert scores[0].split() == ["score", "chosen", "rejected"]
    assert [line.split()[-2:] for line in scores[1:]] == [
        ["0", "5"], *[["0", "0"]] * 3, ["1", "0"], ["1", "0"], ["1", "0"], ["2", "0"]
    ]  # fmt: skip
    assert scores[1].split()[:3] == ["0", "to", "1"]
    assert scores[-1].split()[:3] == ["7", "to", "8"]
    assert words[1].split() == ["10", "to", "15", "1", "5"]
    assert words[-1].split() == ["45", "to", "50", "2", "0"]


def test_what_is_all_the_same_is_one_line():
    sizes = {"train": SplitSize(1, 1, 1, [7], [7]), "validation": SplitSize(0, 1, 1)}
    words = blocks(make_card(PAIRS[:1], [], sizes=sizes))[1][1].splitlines()
    assert [line.split() for line in words[1:]] == [["7", "to", "7", "1", "1"]]


def test_the_card_says_what_was_paid_what_overlaps_and_which_rows_it_is_of():
    found = Contamination(
        num_trained=600, num_asked=900, is_drawn=False, touched=dict.fromkeys(KINDS, 0) | {"alike picture": 2}
    )
    cost = Cost(num_requests=47, usage=Usage(prompt_tokens=9000, completion_tokens=100), usd=0.5)
    card = unescape(make_card(PAIRS, [], contamination=found, cost=cost, digest="cd" * 32))
    assert "| judging took | 47 requests: 9.1 k tokens, $0.5 |" in card
    assert "| held out | of 900 evaluation questions, by match with one of 600 for training: 2 alike picture |" in card
    assert f"| SHA-256 of the rows | {'cd' * 32} |" in card
    assert "| licence of questions and images | apache-2.0 |" in card
    bare = make_card(PAIRS, [])
    assert "| judging took | nothing that is billed |" in bare
    assert "| held out | it was not compared with an evaluation set |" in bare
    paper = make_card(PAIRS, [], recipe=load_recipe("paper"))
    assert "| other, as-a-okvqa-and-coco, https://github.com/allenai/aokvqa |" in paper


def test_the_judges_report_card_has_its_place():
    assert "## The judge's report card" not in make_card(PAIRS, [])
    assert "\n## The judge's report card\n\nIt is **blind**.\n" in make_card(
        PAIRS, [], judge_report="It is **blind**.\n"
    )


@pytest.mark.parametrize(
    "text", ["a <question> b\n\n- c", "```\n## Heading\n```` x", "---\nlicense: mit\n---", "\u202ea\u2028b\x1b"]
)
def test_prompts_are_word_for_word_and_nothing_more(text):
    card = make_card(PAIRS, [], prompts={"Asked": text, "Again": "x"})
    unseen = {"\u202ea\u2028b\x1b": "\\u202ea\\u2028b\\x1b"}
    assert [block for _, block in blocks(card)[2:]] == [unseen.get(text, text), "x"]
    assert DatasetCard(card).data.to_dict() == DatasetCard(make_card(PAIRS, [])).data.to_dict()
    assert len(card.splitlines()) == len(card.split("\n")) - 1


@pytest.mark.parametrize(
    ("kind", "num"), [("verifier", 0), ("pointwise", 1), ("expected", 1), ("claims", 2), ("pairwise", 2)]
)
def test_every_judge_says_what_it_asks(tmp_path, kind, num):
    judge = find_judge(JudgeSection(kind=kind, model="m" if num else None), ImageStore(tmp_path))
    templates = judge.list_templates()
    assert len(templates) == len(set(templates)) == num
    assert all("<" in template for template in templates)
