"""Comparing two at a time: both orders, ties, the meta-judge, what a killed run has paid for, and what becomes of faults."""

import json
import math
import re

import httpx2
import pytest

from tests.pipeline.judges.model_api import Table
from vcot.pipeline.errors import AccountError, RecipeError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges.pairwise import PairwiseJudge, count_hanging
from vcot.pipeline.judges.verdict import Unreadable
from vcot.pipeline.records import Usage
from vcot.pipeline.sections import JudgeSection

pytestmark = pytest.mark.hurried
TEXTS = tuple(f"It is worth {worth}. <R> The answer is (A)." for worth in (3, 9, 1, 5))
META = "You are a judge of judgments."


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")


def make_section(**fields):
    return JudgeSection(kind="pairwise", model="gpt-4o-mini", **fields)


def say(better, rationale="since it is"):
    return json.dumps({"rationale": rationale, "better": better})


def read_worths(text):
    return [int(found) for found in re.findall(r"It is worth (\d)", text)]


def prefer_worth(text):
    first, second = read_worths(text)[:2]
    return say("A" if first > second else "B" if second > first else "tie")


def prefer_first(_):
    return say("A")


async def test_each_two_are_compared_in_both_orders_and_the_wins_are_rated(tmp_path):
    table = Table(PairwiseJudge, make_section(), tmp_path, prefer_worth, TEXTS)
    count = await table.judge()
    assert (count.requested, count.ok, len(table.asked)) == (4, 4, 12)
    asked = {tuple(read_worths(text)) for text in table.asked}
    assert asked == {(a, b) for a in (1, 3, 5, 9) for b in (1, 3, 5, 9) if a != b}
    assert sorted(range(4), key=table.scores.__getitem__) == [2, 0, 3, 1]
    best = table.judgments[1]
    assert best.rationale == "won 3, tied 0, lost 0 of 3 comparisons"
    assert best.low < best.score < best.high
    assert sum(table.scores) / 4 == pytest.approx(1000)
    image, _ = table.bodies[0]["messages"][0]["content"]
    assert image["type"] == "image_url"


async def test_a_preference_for_a_place_is_a_tie_and_is_said(tmp_path):
    table = Table(PairwiseJudge, make_section(), tmp_path, prefer_first, TEXTS[:3])
    await table.judge()
    assert table.scores == pytest.approx([1000] * 3)
    assert table.judgments[0].rationale == "won 0, tied 2, lost 0 of 2 comparisons; 2 hung on the order"


async def test_one_order_that_says_tie_is_a_tie(tmp_path):
    def answer(text):
        return say("tie") if read_worths(text)[0] < read_worths(text)[1] else say("A")

    table = Table(PairwiseJudge, make_section(), tmp_path, answer, TEXTS[:2])
    await table.judge()
    assert table.scores == pytest.approx([1000] * 2)


async def test_the_meta_judge_settles_what_hangs_on_the_order_within_its_budget(tmp_path):
    def answer(text):
        if not text.startswith(META):
            return say("A", f"the one worth {read_worths(text)[0]}")
        first_judgment = text.partition("Judgment A:")[2].partition("Judgment B:")[0]
        return say("A" if "the one worth 9" in first_judgment or "the one worth 5" in first_judgment else "B")

    table = Table(PairwiseJudge, make_section(max_meta=3), tmp_path, answer, TEXTS)
    await table.judge()
    metas = [text for text in table.asked if text.startswith(META)]
    assert len(metas) == 2 * 3, "three of six comparisons, in both orders"
    assert "(It calls response 1 A and response 2 B.) the one worth 3 So response 1 is better." in metas[0]
    assert "(It calls response 2 A and response 1 B.) the one worth 9 So response 2 is better." in metas[0]
    assert table.judgments[1].rationale == "won 1, tied 2, lost 0 of 3 comparisons; 3 hung on the order"
    assert table.scores[1] > table.scores[0]


@pytest.mark.parametrize("texts", [TEXTS[:2], TEXTS[1::-1]])
async def test_the_more_accurate_judgment_counts_whichever_came_first(tmp_path, texts):
    def answer(text):
        if not text.startswith(META):
            return say("A", f"the one worth {read_worths(text)[0]}")
        return say("A" if "the one worth 9" in text.partition("Judgment B:")[0] else "B")

    table = Table(PairwiseJudge, make_section(max_meta=1), tmp_path, answer, texts)
    await table.judge()
    best = max(range(2), key=table.scores.__getitem__)
    assert (texts[best], table.judgments[best].rationale) == (
        TEXTS[1],
        "won 1, tied 0, lost 0 of 1 comparisons; 1 hung on the order",
    )
    assert all(read_worths(text) == read_worths(" ".join(texts)) for text in table.asked if text.startswith(META))


async def test_a_meta_judge_that_favours_a_place_settles_nothing(tmp_path):
    table = Table(PairwiseJudge, make_section(max_meta=1), tmp_path, prefer_first, TEXTS[:2])
    await table.judge()
    assert (len(table.asked), table.scores) == (4, pytest.approx([1000] * 2))


async def test_a_meta_judge_that_cannot_be_read_leaves_the_tie(tmp_path):
    table = Table(
        PairwiseJudge, make_section(max_meta=1), tmp_path, lambda t: "?" if t.startswith(META) else say("A"), TEXTS[:2]
    )
    assert (await table.judge()).ok == 2
    assert table.scores == pytest.approx([1000] * 2)


async def test_a_meta_judge_that_finds_both_judgments_as_good_leaves_the_tie(tmp_path):
    table = Table(
        PairwiseJudge,
        make_section(max_meta=1),
        tmp_path,
        lambda text: say("tie" if text.startswith(META) else "A"),
        TEXTS[:2],
    )
    await table.judge()
    assert (len(table.asked), table.scores) == (4, pytest.approx([1000] * 2))


async def test_a_meta_judge_that_fails_leaves_the_task_owed_and_what_was_compared_paid(tmp_path):
    is_busy = True

    def answer(text):
        if not text.startswith(META):
            return say("A")
        return httpx2.Response(503, text="busy") if is_busy else say("tie")

    table = Table(PairwiseJudge, make_section(max_meta=1), tmp_path, answer, TEXTS[:2])
    assert (await table.judge()).failed == 2
    is_busy = False
    table.asked.clear()
    assert (await table.judge()).ok == 2
    assert all(text.startswith(META) for text in table.asked)


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ("B", "B", ("response 2 is better", "response 1 is better")),
        ("A", "tie", ("response 1 is better", "equally good")),
    ],
)
async def test_the_meta_judge_is_told_both_judgments_in_words(tmp_path, first, second, told):
    def answer(text):
        if text.startswith(META):
            return say("tie")
        return say(first if read_worths(text)[0] == 3 else second)

    table = Table(PairwiseJudge, make_section(max_meta=1), tmp_path, answer, TEXTS[:2])
    await table.judge()
    meta = next(text for text in table.asked if text.startswith(META))
    judgments = re.findall(r"\(It calls response .*", meta)
    assert len(judgments) == 2
    for said in told:
        assert any(f"{said}." in judgment for judgment in judgments)


async def test_the_meta_judges_budget_is_for_all_rounds_of_a_schedule(tmp_path):
    table = Table(PairwiseJudge, make_section(schedule="swiss", max_meta=1), tmp_path, prefer_first, TEXTS)
    await table.judge()
    assert sum(text.startswith(META) for text in table.asked) == 2
    assert PairwiseJudge.count_requests(table.section, 4) == len(table.asked)


async def test_a_swiss_schedule_asks_less_and_finds_the_best(tmp_path):
    texts = tuple(f"It is worth {worth}. <R> The answer is (A)." for worth in (3, 9, 1, 5, 2, 8, 4, 7))
    table = Table(PairwiseJudge, make_section(schedule="swiss"), tmp_path, prefer_worth, texts)
    assert (await table.judge()).ok == 8
    assert PairwiseJudge.count_requests(table.section, 8) == 2 * 4 * 4 >= len(table.asked)
    assert PairwiseJudge.count_requests(make_section(), 8) == 56
    assert PairwiseJudge.count_requests(make_section(max_meta=100), 8) == 112
    assert max(range(8), key=table.scores.__getitem__) == 1


async def test_responses_that_say_the_same_share_a_rating_and_are_not_compared(tmp_path):
    table = Table(PairwiseJudge, make_section(), tmp_path, prefer_worth, (TEXTS[0], TEXTS[1], TEXTS[0]))
    assert (await table.judge()).ok == 3
    assert len(table.asked) == 2
    assert table.scores[0] == table.scores[2] < table.scores[1]


async def test_one_text_alone_is_rated_as_the_mean(tmp_path):
    table = Table(PairwiseJudge, make_section(), tmp_path, prefer_worth, (TEXTS[0], TEXTS[0]))
    assert (await table.judge()).ok == 2
    assert (table.asked, table.scores) == ([], [1000.0, 1000.0])


async def test_what_was_answered_before_a_stop_is_not_paid_for_again(tmp_path):
    broken = True

    def answer(text):
        if broken and read_worths(text) == [1, 5]:
            return httpx2.Response(401, json={"error": {"message": "key revoked", "code": "invalid_api_key"}})
        return prefer_worth(text)

    table = Table(PairwiseJudge, make_section(max_concurrency=1), tmp_path, answer, TEXTS)
    with pytest.raises(AccountError, match="key revoked"):
        await table.judge()
    assert table.scores == [None] * 4
    paid, broken = set(table.asked), False
    table.asked.clear()
    assert (await table.judge()).ok == 4
    assert not paid & set(table.asked) - {text for text in paid if read_worths(text) == [1, 5]}
    assert len(paid | set(table.asked)) == 12
    again = (len(table.asked), await table.judge())
    assert (again[1].cached, len(table.asked)) == (4, again[0])


async def test_each_request_is_billed_once_and_counts_for_the_cap(tmp_path):
    table = Table(PairwiseJudge, make_section(), tmp_path, prefer_worth, TEXTS)
    await table.judge()
    billed = Usage(prompt_tokens=1200, completion_tokens=120)
    assert table.ledger.spent("pairwise/1:gpt-4o-mini") == (12, billed)
    assert (table.meter.num_requests, table.meter.usage) == (12, billed)
    assert [judgment.usage for judgment in table.judgments] == [None] * 4


async def test_a_comparison_that_cannot_be_read_is_left_out_as_long_as_the_others_connect(tmp_path):
    def answer(text):
        return "hard to say" if sorted(read_worths(text)) == [1, 5] else prefer_worth(text)

    table = Table(PairwiseJudge, make_section(), tmp_path, answer, TEXTS)
    assert (await table.judge()).ok == 4
    assert table.judgments[2].rationale == "won 0, tied 0, lost 2 of 2 comparisons"
    two = Table(PairwiseJudge, make_section(), tmp_path / "two", lambda _: "hard to say", TEXTS[:2])
    count = await two.judge()
    assert (count.refused, count.reasons) == (2, {"unreadable": 2})
    assert "do not connect all 2" in two.judgments[0].error


async def test_a_swiss_schedule_goes_on_from_a_comparison_that_cannot_be_read(tmp_path):
    """As from a tie, and makes it no second time."""

    def answer(text):
        return "hard to say" if sorted(read_worths(text)) == [3, 9] else prefer_worth(text)

    table = Table(PairwiseJudge, make_section(schedule="swiss"), tmp_path, answer, TEXTS)
    await table.judge()
    asked = [tuple(read_worths(text)) for text in table.asked]
    assert len(asked) == len(set(asked)) == 12, "three rounds of four are all comparisons, each once"


async def test_a_reply_that_cannot_be_read_is_not_asked_for_again_unless_that_is_said(tmp_path):
    table = Table(PairwiseJudge, make_section(), tmp_path, lambda _: "hard to say", TEXTS[:2])
    async with table.make() as judge:
        judge.attend(table.ledger, table.meter)
        assert all(verdict.refused for verdict in await judge.judge(table.task, table.responses))
    assert len(table.asked) == 2


async def test_unreadable_comparisons_alone_are_asked_again_with_another_seed(tmp_path):
    seeds = []

    def answer(text):
        seeds.append(table.bodies[-1]["seed"])
        return "hard to say" if seeds[-1] == 0 and read_worths(text) == [3, 9] else prefer_worth(text)

    table = Table(PairwiseJudge, make_section(max_asks=2), tmp_path, answer, TEXTS[:2])
    assert (await table.judge()).refused == 2
    assert seeds == [0, 0]
    assert (await table.judge()).ok == 2
    assert seeds == [0, 0, 1], "the readable one is not asked again"


async def test_a_server_that_fails_leaves_all_of_the_task_owed(tmp_path):
    def answer(text):
        return httpx2.Response(503, text="busy") if read_worths(text) == [1, 5] else prefer_worth(text)

    table = Table(PairwiseJudge, make_section(), tmp_path, answer, TEXTS)
    count = await table.judge()
    assert (count.failed, count.ok) == (4, 0)
    assert {judgment.reason for judgment in table.judgments} == {"overloaded"}


async def test_a_rating_is_of_the_responses_that_were_compared(tmp_path):
    table = Table(PairwiseJudge, make_section(), tmp_path, prefer_worth, TEXTS[:2])
    await table.judge()
    table.responses += Table(PairwiseJudge, make_section(), tmp_path / "x", prefer_worth, TEXTS).responses[2:]
    assert table.scores == [None] * 4, "with others in the task, it is another rating"
    assert (await table.judge()).ok == 4
    assert len(table.asked) == 12, "and the comparison that was made is not made again"


async def test_a_judge_that_is_told_the_right_answer_rates_only_tasks_that_have_one(tmp_path):
    section = make_section(gold=True)
    table = Table(PairwiseJudge, section, tmp_path, prefer_worth, TEXTS[:2], task_fields={"answer": None})
    count = await table.judge()
    assert (count.refused, count.reasons, table.asked) == (2, {"no_gold": 2}, [])


def test_how_many_comparisons_hung_on_the_order_is_read_from_a_rationale():
    assert count_hanging("won 0, tied 2, lost 0 of 2 comparisons; 1 hung on the order") == (1, 2)
    assert count_hanging("won 3, tied 0, lost 0 of 3 comparisons") == (0, 3)
    assert count_hanging("it is fine") == (0, 0)


def test_ratings_by_another_schedule_or_budget_are_others(tmp_path):
    changes = ({}, {"schedule": "swiss"}, {"max_meta": 1})
    judges = [PairwiseJudge(make_section(**change), ImageStore(tmp_path)) for change in changes]
    assert len({judge.fingerprint for judge in judges}) == 3


@pytest.mark.parametrize(("better", "score"), [("A", 1.0), (" b ", 0.0), ("TIE", 0.5)])
def test_who_is_better_is_read_however_it_is_written(tmp_path, better, score):
    verdict = PairwiseJudge(make_section(), ImageStore(tmp_path)).read(say(better, "for that"))
    assert (verdict.score, verdict.rationale) == (score, "for that")


@pytest.mark.parametrize(
    "text",
    [
        say("both"),
        say(1),
        '{"better": "A"}',
        '{better: B}, or rather {"rationale": "x", "better": "A"}',
        '{rationale: B}, or rather {"rationale": "x", "better": "A"}',
    ],
)
def test_what_does_not_say_who_is_better_is_unreadable(tmp_path, text):
    with pytest.raises(Unreadable):
        PairwiseJudge(make_section(), ImageStore(tmp_path)).read(text)


def test_a_setting_that_a_judge_does_not_go_by_is_refused(tmp_path):
    for fields in ({"num_samples": 2, "temperature": 0.7}, {"members": (JudgeSection(),)}):
        (field, *_) = fields
        with pytest.raises(RecipeError, match=rf"judge.kind = pairwise does not go by judge\.{field}"):
            Table(PairwiseJudge, make_section(**fields), tmp_path, prefer_worth).make()


async def test_the_test_question_compares_a_right_answer_with_a_wrong_one(tmp_path):
    table = Table(PairwiseJudge, make_section(), tmp_path, lambda _: say("A"))
    async with table.make() as judge:
        assert (await judge.test()).score == 1.0
    (text,) = table.asked
    assert "Response A:\nThe image shows a single disc" in text
    assert "The answer is (A) red." in text
    assert "The answer is (B) blue." in text
    assert not math.isnan(table.meter.usage.prompt_tokens)
