"""Claim by claim: what is asked, what the share is of, and that no answer is paid for twice."""

import json

import httpx2
import pytest

from tests.pipeline.judges.model_api import Table, make_answer, make_choice
from vcot.pipeline.judges.claims import MAX_CLAIMS, ClaimsJudge, read_claims
from vcot.pipeline.judges.verdict import Unreadable
from vcot.pipeline.sections import JudgeSection

pytestmark = pytest.mark.hurried
SECTION = JudgeSection(kind="claims", model="gpt-4o-mini")
CLAIMS = {"good": ["The disc is red.", "The answer is red."], "bad": ["The disc is red.", "The answer is blue."]}
TOO_MANY = [str(number) for number in range(MAX_CLAIMS + 1)]
TRUE = ("The disc is red.", "The answer is red.")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")


def find_claim(text):
    return text.partition("\nClaim: ")[2].partition("\n")[0]


def answer(text):
    if claim := find_claim(text):
        return "Yes." if claim in TRUE else "No."
    said = text.partition("Response:\n")[2].split()[0]
    return json.dumps({"claims": CLAIMS[said]})


async def test_the_score_is_the_share_of_claims_that_hold(tmp_path):
    table = Table(ClaimsJudge, SECTION, tmp_path, answer)
    assert (await table.judge()).ok == 2
    assert table.scores == [1.0, 0.5]
    rationales = [judgment.rationale for judgment in table.judgments]
    assert rationales == ["2 of 2 claims hold", "1 of 2 claims hold; not: The answer is blue."]
    kinds = [[part["type"] for part in body["messages"][0]["content"]] for body in table.bodies]
    assert kinds.count(["text"]) == 2, "claims are listed from the words alone"
    assert kinds.count(["image_url", "text"]) == 3, "and each is checked once, whoever makes it"
    assert table.ledger.spent("claims/1:gpt-4o-mini")[0] == 5


async def test_a_claim_that_cannot_be_checked_leaves_the_response_without_a_score(tmp_path):
    table = Table(ClaimsJudge, SECTION, tmp_path, lambda t: "Perhaps." if "blue." in find_claim(t) else answer(t))
    count = await table.judge()
    assert (count.ok, count.refused, count.reasons) == (1, 1, {"unreadable": 1})
    assert "it is neither yes nor no" in table.judgments[1].error


async def test_a_check_that_failed_is_asked_again_alone(tmp_path):
    broken = True

    def flaky(text):
        return httpx2.Response(500, text="no") if broken and "blue." in find_claim(text) else answer(text)

    table = Table(ClaimsJudge, SECTION, tmp_path, flaky)
    assert (await table.judge()).failed == 1
    broken = False
    table.asked.clear()
    assert (await table.judge()).ok == 1
    assert [find_claim(text) for text in table.asked] == ["The answer is blue."]


async def test_what_a_failed_check_was_billed_stays_on_the_account(tmp_path):
    """A provider bills an answer that it broke off; each of the six attempts of a check takes 110 tokens."""
    broken = True

    def break_off(text):
        is_broken = broken and "blue." in find_claim(text)
        return make_answer(make_choice("No", finish_reason=None)) if is_broken else answer(text)

    table = Table(ClaimsJudge, SECTION, tmp_path, break_off)
    assert (await table.judge()).reasons == {"incomplete": 1}
    broken = False
    assert (await table.judge()).ok == 1
    assert table.ledger.spent("claims/1:gpt-4o-mini")[1] == table.meter.usage
    assert table.meter.usage.num_tokens == 110 * len(table.asked) == 110 * (4 + 6 + 1)


@pytest.mark.parametrize("is_of_claim", [False, True])
async def test_a_reply_that_cannot_be_read_is_asked_for_again_with_another_seed(tmp_path, is_of_claim):
    def hesitate(text):
        is_first = bool(find_claim(text)) == is_of_claim and table.bodies[-1]["seed"] == SECTION.seed
        return "Hm." if is_first else answer(text)

    table = Table(ClaimsJudge, SECTION, tmp_path, hesitate)
    async with table.make() as judge:
        judge.attend(table.ledger, table.meter)
        first = await judge.score(table.task, table.responses[0])
        second = await judge.score(table.task, table.responses[0], num_asked=1)
    assert (first.score, first.reason, first.refused) == (None, "unreadable", True)
    assert second.score == 1.0


async def test_claims_are_listed_as_an_object_where_that_is_offered(tmp_path):
    table = Table(ClaimsJudge, SECTION, tmp_path, answer)
    await table.judge()
    named = [body["response_format"]["json_schema"]["name"] for body in table.bodies if "response_format" in body]
    assert named == ["claims", "claims"]


async def test_a_judge_that_is_shown_the_right_answer_judges_tasks_that_have_one(tmp_path):
    section = SECTION.model_copy(update={"gold": True})
    assert (await Table(ClaimsJudge, section, tmp_path, answer).judge()).ok == 2
    without = Table(ClaimsJudge, section, tmp_path / "without", answer, task_fields={"answer": None})
    assert (await without.judge()).reasons == {"no_gold": 2}


async def test_it_is_tried_on_a_claim_about_a_drawing(tmp_path):
    table = Table(ClaimsJudge, SECTION, tmp_path, lambda _: "Yes.")
    async with table.make() as judge:
        assert (await judge.test()).score == 1.0
    (asked,) = table.asked
    assert find_claim(asked) == "The disc in the middle of the image is red."
    assert "What colour is the disc" in asked


def test_as_many_claims_as_are_checked_are_read():
    assert read_claims(json.dumps({"claims": TOO_MANY[1:]})) == TOO_MANY[1:]


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        ('{"claims": ["a  b", "a b", " "]}', ["a b"]),
        ("{as it is shown} {'claims': ['x']}", ["x"]),
        ('Sure:\n```json\n{"claims": ["x"]}\n```', ["x"]),
        ('<think>hm {"claims": []}</think>{"claims": ["x", "y"]}', ["x", "y"]),
    ],
)
def test_a_list_of_claims_is_read_however_it_is_wrapped(text, claims):
    assert read_claims(text) == claims


@pytest.mark.parametrize(
    "text",
    [
        "none",
        '{claims: ["x"]} {"claims": ["y"]}',
        '{"claims": []}',
        '{"claims": "x"}',
        '{"claims": [1]}',
        json.dumps({"claims": TOO_MANY}),
    ],
)
def test_no_list_or_one_beyond_reason_is_unreadable(text):
    with pytest.raises(Unreadable):
        read_claims(text)


@pytest.mark.parametrize(("text", "score"), [("Yes", 1), ("no.", 0), ("<think>no?</think> Yes, it is.", 1)])
def test_yes_and_no_are_read(tmp_path, text, score):
    assert Table(ClaimsJudge, SECTION, tmp_path, answer).make().read(text).score == score


@pytest.mark.parametrize("text", ["", "Nothing to see", "yes and no"])
def test_what_is_neither_or_both_is_unreadable(tmp_path, text):
    with pytest.raises(Unreadable):
        Table(ClaimsJudge, SECTION, tmp_path, answer).make().read(text)


def test_an_estimate_counts_the_claims_of_a_usual_chain():
    assert ClaimsJudge.count_requests(SECTION, 8) == 64
