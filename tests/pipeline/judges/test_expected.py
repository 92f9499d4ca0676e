"""The mean over the scores' probabilities, and what is no score."""

import math

import pytest

from tests.pipeline.judges.model_api import Table, make_choice
from vcot.pipeline.errors import AccountError
from vcot.pipeline.judges.expected import ExpectedJudge, read_shares
from vcot.pipeline.sections import JudgeSection

pytestmark = pytest.mark.hurried
SECTION = JudgeSection(kind="expected", model="gpt-4o-mini")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")


def logs(**shares):
    return {token.removeprefix("_"): math.log(share) for token, share in shares.items()}


async def judge(tmp_path, *steps, text="8"):
    table = Table(ExpectedJudge, SECTION, tmp_path, lambda _: [make_choice(text, steps or None)])
    return await table.judge(), table


async def test_the_score_is_the_mean_and_tells_apart_what_has_the_same_likeliest_score(tmp_path):
    _, table = await judge(tmp_path, logs(_8=0.6, _7=0.3, _9=0.1))
    assert table.scores[0] == pytest.approx(7.8)
    assert table.judgments[0].rationale == "no words; 8 with 60%, 7 with 30%, 9 with 10%"
    body = table.bodies[0]
    assert (body["logprobs"], body["top_logprobs"]) == (True, 20)


async def test_tokens_with_and_without_a_space_are_one_score_and_others_are_left_out(tmp_path):
    step = {" 8": math.log(0.5), "8": math.log(0.2), "2": math.log(0.1), "The": math.log(0.2)}
    _, table = await judge(tmp_path, step)
    assert table.scores[0] == pytest.approx((0.7 * 8 + 0.1 * 2) / 0.8)


async def test_half_of_the_probability_is_enough_for_a_score(tmp_path):
    _, table = await judge(tmp_path, logs(_8=0.5, The=0.5))
    assert table.scores[0] == pytest.approx(8.0)


async def test_the_score_is_read_where_it_stands_in_structured_output(tmp_path):
    steps = ({'{"score": ': 0.0, "8": -9.0}, logs(_3=0.8, _4=0.2), {"}": 0.0})
    _, table = await judge(tmp_path, *steps, text='{"score": 3}')
    assert table.scores[0] == pytest.approx(3.2)
    assert table.bodies[0]["response_format"]["json_schema"]["schema"]["properties"]["score"]["enum"] == [*range(1, 10)]


@pytest.mark.parametrize(
    ("text", "step", "said"),
    [
        ("8", logs(_8=0.3, _7=0.1, The=0.2), "have only 40% of the probability"),
        ("8", logs(eight=1.0), "have only 0% of the probability"),
        ("The", logs(The=0.9, _8=0.1), "it has 0 scores"),
        ("10", logs(_10=1.0), "it has 0 scores"),
        ("0", logs(_0=1.0), "it has 0 scores"),
        ("8 or 9", logs(_8=1.0), "it has 2 scores"),
    ],
)
async def test_what_is_hardly_a_score_is_unreadable(tmp_path, text, step, said):
    count, table = await judge(tmp_path, step, text=text)
    assert (count.refused, table.scores) == (2, [None, None])
    assert said in table.judgments[0].error


async def test_an_api_without_log_probs_ends_the_stage_at_once(tmp_path):
    with pytest.raises(AccountError, match=r"tells no log-probs, which judge.kind = expected goes by; take pointwise"):
        await judge(tmp_path)


def test_shares_are_of_digits_only():
    assert read_shares({"8": 0.0, "9": -math.inf, "x": -1.0, "10": 0.0, "": 0.0}) == {"8": 1.0, "9": 0.0}
