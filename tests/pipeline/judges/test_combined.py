"""Judges that go by other judges: the gold answer first, and the mean of several rankings."""

import json

import pytest

from tests.pipeline.judges.model_api import Table
from vcot.pipeline.errors import RecipeError
from vcot.pipeline.judges import JUDGES, find_judge, list_sections
from vcot.pipeline.judges.combined import find_shares
from vcot.pipeline.judges.ensemble import EnsembleJudge
from vcot.pipeline.judges.gated import GatedJudge
from vcot.pipeline.judges.pointwise import PointwiseJudge
from vcot.pipeline.sections import JudgeSection

pytestmark = pytest.mark.hurried
RIGHT, WRONG = "The answer is (A).", "The answer is (B)."
TEXTS = (f"worth 2 <R> {RIGHT}", f"worth 9 <R> {WRONG}", f"worth 5 <R> {RIGHT}", f"worth 1 <R> {WRONG}")
POINTWISE = JudgeSection(kind="pointwise", model="gpt-4o-mini")
GATED = JudgeSection(kind="gated", members=(POINTWISE,))


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")


def score_worth(text):
    return json.dumps({"rationale": "by worth", "score": int(text.partition("worth ")[2][0])})


async def judge_members_first(tmp_path, kind, section, answer=score_worth, **fields):
    member = Table(PointwiseJudge, POINTWISE, tmp_path, answer, TEXTS, **fields)
    await member.judge()
    table = Table(kind, section, tmp_path, None, TEXTS, **fields)
    return await table.judge(), table


async def test_every_right_answer_scores_above_every_wrong_one_and_the_member_ranks_within(tmp_path):
    count, table = await judge_members_first(tmp_path, GatedJudge, GATED)
    assert count.ok == 4
    assert table.scores == pytest.approx([1 + 1 / 6, 0.5, 1 + 2 / 6, 0.0])
    assert table.judgments[1].rationale == "answer B, gold A; by worth"
    assert table.judgments[0].judge == "gated/1(pointwise/1:gpt-4o-mini)"


async def test_an_answer_that_cannot_be_read_is_not_right(tmp_path):
    member = Table(PointwiseJudge, POINTWISE, tmp_path, score_worth, ("worth 9 <R> who knows", *TEXTS[:1]))
    await member.judge()
    table = Table(GatedJudge, GATED, tmp_path, None, member.texts)
    await table.judge()
    assert table.scores == [0.5, 1.0]


@pytest.mark.parametrize(
    ("kind", "members", "scores"),
    [("gated", (JudgeSection(),), [1.5, 0.0]), ("ensemble", (JudgeSection(), POINTWISE), [0.5, 0.5])],
)
async def test_a_members_score_of_0_is_a_score(tmp_path, kind, members, scores):
    texts = (f"worth 2 <R> {RIGHT}", f"worth 9 <R> {WRONG}")
    section = JudgeSection(kind=kind, members=members)
    for each in list_sections(section):
        table = Table(PointwiseJudge if each.model else JUDGES.resolve(each.kind), each, tmp_path, score_worth, texts)
        await table.judge()
    assert table.scores == scores


async def test_without_a_gold_answer_there_is_no_gate(tmp_path):
    count, table = await judge_members_first(tmp_path, GatedJudge, GATED, task_fields={"answer": None})
    assert (count.refused, count.reasons) == (4, {"no_gold": 4})
    assert "take its member alone" in table.judgments[0].error


async def test_what_a_member_gave_no_verdict_on_has_none_and_the_others_are_compared(tmp_path):
    def answer(text):
        return "no idea" if "worth 9" in text else score_worth(text)

    count, table = await judge_members_first(tmp_path, GatedJudge, GATED, answer)
    assert (count.ok, count.refused, count.reasons) == (3, 1, {"member_without_verdict": 1})
    assert table.scores == [pytest.approx(1.25), None, pytest.approx(1.5), 0.0]


async def test_an_ensemble_averages_ranks_and_says_how_far_its_members_agree(tmp_path):
    members = (POINTWISE, POINTWISE.model_copy(update={"model": "gpt-4o"}))
    for member, answer in zip(
        members, (score_worth, lambda t: score_worth(t.replace("worth 9", "worth 3"))), strict=True
    ):
        await Table(PointwiseJudge, member, tmp_path, answer, TEXTS).judge()
    table = Table(EnsembleJudge, JudgeSection(kind="ensemble", members=members), tmp_path, None, TEXTS)
    assert (await table.judge()).ok == 4
    assert table.scores == pytest.approx([1 / 3, (1 + 2 / 3) / 2, (2 / 3 + 1) / 2, 0])
    said = "pointwise/1:gpt-4o-mini 1.00, pointwise/1:gpt-4o 0.67; the members order 5 of 6 pairs alike"
    assert table.judgments[1].rationale == said
    assert table.judgments[1].judge == "ensemble/1(pointwise/1:gpt-4o-mini+pointwise/1:gpt-4o)"


def test_shares_count_ties_as_half():
    assert find_shares([1, 1, 5]) == [0.25, 0.25, 1.0]
    assert find_shares([3]) == [0.5]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "gated"}, "gated ranks by one member, and judge.members has 0"),
        ({"kind": "gated", "members": (POINTWISE, JudgeSection())}, "judge.members has 2"),
        ({"kind": "ensemble", "members": (POINTWISE, POINTWISE)}, "asks several judges"),
        ({"kind": "gated", "members": (JudgeSection(kind="pointwise"),)}, r"needs judge\.model"),
        ({"kind": "gated", "members": (POINTWISE,), "gold": True}, r"does not go by judge\.gold"),
        ({"kind": "pointwise", "model": "m", "members": (POINTWISE,)}, r"does not go by judge\.members"),
        ({"kind": "verifier", "image": "none"}, r"verifier does not go by judge\.image"),
    ],
)
def test_members_that_do_not_fit_are_a_wrong_recipe(tmp_path, fields, said):
    with pytest.raises(RecipeError, match=said):
        find_judge(JudgeSection(**fields), Table(PointwiseJudge, POINTWISE, tmp_path, None).images)


def test_members_judge_before_what_goes_by_them(tmp_path):
    nested = JudgeSection(kind="ensemble", members=(GATED, JudgeSection()))
    kinds = ["pointwise", "gated", "verifier", "ensemble"]
    assert [section.kind for section in list_sections(nested)] == kinds
    images = Table(PointwiseJudge, POINTWISE, tmp_path, None).images
    judges = list(find_judge(nested, images).walk())
    assert [judge.name.partition("/")[0] for judge in judges] == kinds
    assert all(judge.images is images for judge in judges), "each is shown the run's images"
