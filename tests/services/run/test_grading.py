"""`eval.judge`: answers in words are scored by a judge, which is audited on them first."""

import json

import httpx2
import pytest

from tests.services.fake_vllm import write_checkpoint
from tests.services.run.simulated_judge import KIND, TRANSPORTS
from vcot.pipeline.errors import RecipeError, StageError
from vcot.pipeline.records import Response
from vcot.services.cli import commands
from vcot.services.cli.terminal import Terminal
from vcot.services.recipes.recipe import load_recipe, render_recipe
from vcot.services.run.directory import open_run
from vcot.services.run.session import Session
from vcot.services.run.steps import load_scores

pytestmark = pytest.mark.hurried
ANSWERS = {"a cab": 10, "a taxi, I think": 7, "A boat.": 1}
"""What is answered to each question, and what the judge says of it. The gold answer is the first."""
TABLE = '{question = "q", image = "", choices = "", answer = "a"}'


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("COLUMNS", "200")
    bodies = []

    def answer(request):
        body = json.loads(request.content)
        bodies.append(body)
        text = json.dumps(body["messages"])
        score = next((score for said, score in ANSWERS.items() if said in text.rpartition("Response:")[2]), 5)
        message = {"role": "assistant", "content": json.dumps({"rationale": "seen", "score": score})}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        answered = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": usage}
        return httpx2.Response(
            200, json=answered | {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
        )

    TRANSPORTS.append(httpx2.MockTransport(answer))
    yield bodies
    TRANSPORTS.clear()


@pytest.fixture
def opened(tmp_path):
    """Opens the run of a table of three questions, each with the same three answers of the base."""
    rows = [{"q": f"What is it, number {number}?", "a": "cab"} for number in range(3)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    base = write_checkpoint(tmp_path / "base", "base", 1.0, kind="base")
    settings = (
        *(f"model.source={base}", "tasks.num_tasks=4", "sample.k=2", "eval.benchmark=table", "eval.num_tasks="),
        *(f"eval.path={tmp_path / 'mine.jsonl'}", f"eval.columns={TABLE}", 'eval.prompts=["short_answer"]'),
        *("eval.temperatures=[0.4]", "eval.num_samples=3"),
    )

    def start(*more):
        return open_run(tmp_path / "run", "nano", [*settings, *more], access="alone")

    return start


def judged_by(**fields):
    told = {"kind": KIND, "model": "gpt-4o-mini", "image": "none", "gold": True} | fields
    text = ", ".join(f"{name} = {json.dumps(value)}" for name, value in told.items())
    return f"eval.judge={{{text}}}"


def answer_all(session, texts=tuple(ANSWERS), **fields):
    for request in session.questions("test").requests(session.base.ref):
        session.run.ledger.put(
            [
                Response(
                    key=request.response_key(index), group=request.key, task=request.task.id, index=index,
                    checkpoint=request.checkpoint, prompt=request.prompt, sampling=request.sampling,
                    text=text, answer=text, finish_reason=fields.get(text, "stop"),
                )
                for index, text in enumerate(texts)
            ]
        )  # fmt: skip


async def test_words_count_as_right_where_they_are_the_gold_ones(opened):
    with opened() as run:
        async with Session(run, Terminal()) as session:
            answer_all(session)
            scores = load_scores(session, [session.base], "test")["true"]
    assert [score.value for score in scores] == ["correct", "incorrect", "incorrect"] * 3
    assert {score.target for score in scores} == {"cab"}


async def test_a_judge_scores_them_after_its_audit_and_is_asked_once(opened, asked, capsys):
    with opened(judged_by()) as run:
        async with Session(run, Terminal()) as session:
            answer_all(session)
            await commands.evaluate(session, ["base"])
            scores = load_scores(session, [session.base], "test")["true"]
    assert [round(score.earned, 3) for score in scores] == [1.0, 0.667, 0.0] * 3
    assert [score.value for score in scores] == ["correct", "correct", "incorrect"] * 3
    said = " ".join(capsys.readouterr().out.split())
    assert "Answers are scored by the judge" in said
    assert "from 1 to 10; figures are shares of that scale" in said
    assert "Its report card, on 3 questions with known answers: This judge" in said
    assert (num := len(asked)) > 9
    with opened(judged_by()) as run:
        async with Session(run, Terminal()) as session:
            await commands.evaluate(session, ["base"])
    assert len(asked) == num


async def test_an_answer_that_was_cut_off_is_not_judged_and_has_no_figure_of_the_judge(opened, asked):
    with opened(judged_by()) as run:
        async with Session(run, Terminal()) as session:
            answer_all(session, **{"a taxi, I think": "length"})
            await commands.evaluate(session, ["base"])
            scores = load_scores(session, [session.base], "test")["true"]
    assert [score.value for score in scores] == ["correct", "no_answer", "incorrect"] * 3
    assert [score.is_cut for score in scores] == [False, True, False] * 3
    assert not any("a taxi" in json.dumps(body) for body in asked)


async def test_what_is_not_judged_yet_is_in_no_figure(opened):
    with opened(judged_by()) as run:
        async with Session(run, Terminal()) as session:
            answer_all(session)
            scores = load_scores(session, [session.base], "test")["true"]
    assert {score.error for score in scores} == {"not judged yet"}


async def test_a_judge_of_which_too_little_is_known_stops_before_it_is_paid(opened, asked, monkeypatch):
    monkeypatch.setitem(ANSWERS, "a cab", 1)
    monkeypatch.setitem(ANSWERS, "A boat.", 10)
    with opened(judged_by(min_auc=0.7)) as run:
        async with Session(run, Terminal()) as session:
            answer_all(session)
            with pytest.raises(StageError, match=r"AUC of 0\.00 .* less than judge\.min_auc = 0\.7"):
                await commands.evaluate(session, ["base"])


async def test_a_judge_that_compares_is_refused(opened):
    with opened(judged_by(kind="pairwise")) as run:
        async with Session(run, Terminal()) as session:
            with pytest.raises(RecipeError, match=r"eval\.judge\.kind = pairwise scores an answer by the others"):
                _ = session.questions("test").judge


def test_a_published_recipe_does_not_say_where_that_judge_is():
    recipe = load_recipe("nano", [judged_by(base_url="http://10.0.0.7:8000/v1", api_key_env="MY_SECRET_KEY")])
    public = render_recipe(recipe, public=True)
    assert "gpt-4o-mini" in public
    assert "10.0.0.7" not in public
    assert "MY_SECRET_KEY" not in public
