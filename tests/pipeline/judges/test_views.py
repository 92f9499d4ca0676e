"""What a model judge is shown: image or none, chain or answer, with or without gold; and several verdicts of one."""

import json

import pytest

from tests.pipeline.judges.model_api import Table, make_choice
from vcot.pipeline.errors import RequestError
from vcot.pipeline.judges import judgment_keys
from vcot.pipeline.judges.pointwise import PointwiseJudge
from vcot.pipeline.judges.verdict import Unreadable
from vcot.pipeline.sections import JudgeSection

pytestmark = pytest.mark.hurried
LIKED = json.dumps({"rationale": "fine", "score": 7})


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")


def make_table(
    folder, answer=lambda _: LIKED, texts=("A thought. <R> The answer is (A).",), task_fields=None, **fields
):
    section = JudgeSection(kind="pointwise", model="gpt-4o-mini", **fields)
    return Table(PointwiseJudge, section, folder, answer, texts, task_fields or {})


def find_key(table):
    return judgment_keys(table.make(), table.task, table.responses)[0]


async def test_without_the_image_the_words_alone_are_judged(tmp_path):
    table = make_table(tmp_path, image="none")
    await table.judge()
    assert [part["type"] for part in table.bodies[0]["messages"][0]["content"]] == ["text"]


async def test_a_judge_that_sees_no_image_is_tried_without_one(tmp_path):
    for folder, image, kinds in (("none", "none", ["text"]), ("own", "own", ["image_url", "text"])):
        table = make_table(tmp_path / folder, image=image)
        async with table.make() as judge:
            assert (await judge.test()).score == 7
        assert [part["type"] for part in table.bodies[0]["messages"][0]["content"]] == kinds


async def test_questions_go_by_another_client_as_long_as_they_are_to(tmp_path):
    class Closed:
        async def complete(self, *_, **__):
            raise RequestError("nobody is there", scope="item", reason="closed")

    table = make_table(tmp_path)
    async with table.make() as judge:
        with judge.asking_by(Closed()):
            assert (await judge.score(table.task, table.responses[0])).reason == "closed"
        assert (await judge.score(table.task, table.responses[0])).score == 7


async def test_one_of_several_questions_is_asked_once_unless_more_is_said(tmp_path):
    def find_nothing(_):
        raise Unreadable("it says nothing")

    table = make_table(tmp_path)
    async with table.make() as judge:
        judge.attend(table.ledger, table.meter)
        for num_asked, num_bodies in ({}, 1), ({"num_asked": 1}, 2), ({"num_asked": 1}, 2):
            assert (await judge.ask_kept("Well?", [], find_nothing, **num_asked)).refused
            assert len(table.bodies) == num_bodies


async def test_a_later_ask_counts_on_from_the_recipes_seed(tmp_path):
    table = make_table(tmp_path, seed=5)
    async with table.make() as judge:
        for num_asked in (0, 1, 2):
            await judge.score(table.task, table.responses[0], num_asked=num_asked)
    assert [body["seed"] for body in table.bodies] == [5, 6, 7]


async def test_the_answer_alone_is_shown_and_is_judged_once_whatever_led_to_it(tmp_path):
    texts = ("A thought. <R> The answer is (A).", "Another. <R> The answer is (A).", "No format.")
    table = make_table(tmp_path, texts=texts, sees="answer")
    assert (await table.judge()).ok == 3
    shown = [text.partition("Response:\n")[2] for text in table.asked]
    assert sorted(shown) == ["(It gives no final answer.)", "The answer is (A)."]


async def test_the_right_answer_is_told_where_the_recipe_says_so(tmp_path):
    table = make_table(tmp_path, gold=True)
    await table.judge()
    said = "Question: What is it?\nRight answer, which the author did not see: (A) red\nOptions: (A) red (B) blue"
    assert said in table.asked[0]
    secret = make_table(tmp_path / "secret", gold=True, task_fields={"answer": None})
    assert (await secret.judge()).reasons == {"no_gold": 1}


async def test_a_question_without_options_has_no_such_line(tmp_path):
    table = make_table(tmp_path, task_fields={"choices": (), "answer": None, "gold": "a disc"}, gold=True)
    await table.judge()
    assert "Question: What is it?\nRight answer, which the author did not see: a disc\n\nResponse:" in table.asked[0]


def test_each_view_has_keys_of_its_own_and_the_usual_one_those_it_had(tmp_path):
    views = ({}, {"image": "none"}, {"image": "blank"}, {"image": "other"}, {"sees": "answer"}, {"gold": True},
             {"temperature": 0.7}, {"temperature": 0.7, "num_samples": 3})  # fmt: skip
    keys = [find_key(make_table(tmp_path, **view)) for view in views]
    assert len(set(keys)) == len(keys)
    explicit = find_key(make_table(tmp_path, image="own", sees="whole", gold=False, num_samples=1, temperature=0.0))
    assert explicit == keys[0]


def test_another_image_makes_another_judgment_only_where_it_is_not_the_tasks_own(tmp_path):
    """The response's key says which image it was sampled with; a control's image is said beside it."""
    table, other = make_table(tmp_path, image="other"), make_table(tmp_path, image="other")
    other.task = other.task.model_copy(update={"images": (other.image.model_copy(update={"sha256": "ff"}),)})
    assert find_key(table) != find_key(other)


async def test_the_score_of_several_samples_is_their_mean(tmp_path):
    said = [json.dumps({"rationale": f"no {number}", "score": number}) for number in (4, 9)]
    table = make_table(
        tmp_path, lambda _: [make_choice(text) for text in (*said, "prose")], num_samples=3, temperature=0.7
    )
    assert (await table.judge()).ok == 1
    assert (table.scores, table.judgments[0].rationale) == ([6.5], "no 4")
    assert (table.bodies[0]["n"], table.bodies[0]["temperature"]) == (3, 0.7)


async def test_samples_that_mostly_cannot_be_read_are_no_verdict(tmp_path):
    table = make_table(tmp_path, lambda _: [make_choice(LIKED), make_choice("prose")], num_samples=2, temperature=0.7)
    assert (await table.judge()).reasons == {"unreadable": 1}
