"""An evaluation over a ledger: what was asked before is found again, and what is there is scored."""

import itertools
import json
import logging

import httpx2
import pytest

from vcot.eval.evaluate import evaluate, load_questions
from vcot.pipeline.client import DIGEST_HEADER, ChatClient
from vcot.pipeline.errors import DataError, OwedError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.records import CheckpointRef, ImageRef, Response, Task
from vcot.pipeline.sample import sample
from vcot.services.recipes.recipe import load_recipe

BASE = CheckpointRef(name="base", digest="sha256:" + "a" * 64, kind="base")
FIRST = "a933660e1c84ad4e1e2044d90f20960a100f5f73f8abdfb05ea8811b3b8b76e8"
LAST = "a26eb10792a18bc1c64e3200642c96b38548a487f8ea47de33e56d98970bc18a"
FIRST_BLANK = "df3f334ec4ef2969b51ccc2a3272e684a6554ffa2abad38b8b4a340e86a7bd92"
FIRST_RESPONSE = "4713f49ab68fa40a84ec34df13d06ab194ceea16da16e237e6e2caf6d079fd81"
TASKS = "c12141b44601c3e21fc907ea81eb4072530250647eb2d6d73e9f480e3285c6d4.jsonl"


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path)


def load(store, tmp_path, *overrides, split="test", **options):
    section = load_recipe("nano", ["eval.num_tasks=9", *overrides]).eval
    return load_questions(section, split, tmp_path, store, **options)


def test_a_run_that_was_evaluated_before_benchmarks_were_objects_finds_its_answers(store, tmp_path):
    """The keys are those of 0.1's code, literally."""
    questions = load(store, tmp_path, "eval.images=['true', 'blank']")
    assert [path.name for path in (tmp_path / "tasks").iterdir()] == [TASKS]
    requests = questions.requests(BASE, ["true"])
    assert (len(requests), requests[0].key, requests[-1].key) == (36, FIRST, LAST)
    assert requests[0].response_key(0) == FIRST_RESPONSE
    assert questions.requests(BASE)[36].key == FIRST_BLANK


def test_what_is_there_is_scored_and_what_is_not_is_owed(store, tmp_path):
    questions, ledger = load(store, tmp_path), Ledger(tmp_path / "ledger.sqlite")
    with pytest.raises(OwedError, match="no answer of base on test with the true image; run `vcot eval` first"):
        questions.scores([BASE], ledger)
    asked = questions.requests(BASE)
    outcomes = {"text": f"The answer is ({asked[0].task.answer_letter})"}, {"error": "timed out", "reason": "timeout"}
    ledger.put(
        [
            Response(
                key=request.response_key(0), group=request.key, task=request.task.id, index=0, checkpoint=BASE,
                prompt=request.prompt, sampling=request.sampling, **outcome,
            )
            for request, outcome in zip(asked[:2], outcomes, strict=True)
        ]
    )  # fmt: skip
    scores = questions.scores([BASE], ledger)
    assert [(score.value, score.error) for score in scores["true"]] == [("correct", None), (None, "timed out")]
    found = evaluate(scores, [BASE], questions.benchmark, load_recipe("nano").eval, model="nano")
    [row] = found.results
    assert (row.accuracy["Avg"].value, row.num_scored, row.num_failed, found.hint) == (1, 1, 1, "")
    ledger.close()


def test_what_is_asked_about_one_question_comes_together(store, tmp_path):
    questions = load(store, tmp_path, "eval.images=['true', 'blank']")
    requests = questions.requests_by_task(BASE)
    assert sorted(request.key for request in requests) == sorted(request.key for request in questions.requests(BASE))
    runs = [name for name, _ in itertools.groupby(request.task.id for request in requests)]
    assert runs == [task.id for task in questions.tasks]
    assert len(requests) == 2 * 2 * 2 * len(questions.tasks)


@pytest.mark.hurried
async def test_a_benchmark_is_asked_in_two_turns_and_scored_by_the_second(store, tmp_path):
    """With the true and the blank image; the letter that the rationale names is not the answer."""
    options = ('eval.prompts=["two_stage"]', "eval.temperatures=[0.4]", 'eval.images=["true", "blank"]')
    questions, ledger = load(store, tmp_path, *options), Ledger(tmp_path / "ledger.sqlite")
    letters = {task.question: task.answer_letter for task in questions.tasks}

    async def answer(request):
        text = json.loads(request.content)["messages"][0]["content"][1]["text"]
        right = next(letter for question, letter in letters.items() if question in text)
        wrong = "B" if right == "A" else "A"
        said = (
            f"The answer is ({right})."
            if "\nSolution: " in text
            else f"It is not the case that the answer is ({wrong})."
        )
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        return httpx2.Response(200, json=body, headers={DIGEST_HEADER: BASE.digest})

    requests = questions.requests(BASE)
    async with ChatClient("http://fake/v1", "key", max_connections=9, transport=httpx2.MockTransport(answer)) as client:
        count = await sample(requests, client, ledger, store)
    assert (count.requested, count.ok) == (18, 18)
    scores = questions.scores([BASE], ledger)
    assert {(shown, score.value) for shown, some in scores.items() for score in some} == {
        ("true", "correct"),
        ("blank", "correct"),
    }
    ledger.close()


def test_a_second_seed_asks_more_and_nothing_again(store, tmp_path):
    options = ("eval.temperatures=[0.4]", 'eval.prompts=["cot"]')
    once, twice = (load(store, tmp_path, *options, f"eval.num_seeds={num}").requests(BASE) for num in (1, 2))
    assert [request.key for request in once] == [request.key for request in twice[:9]]
    assert len({request.key for request in twice}) == 18


def test_what_is_asked_is_said_in_words(store, tmp_path):
    said = "9 nano questions of test, zero_shot, cot at temperatures 0.4, 0.8"
    assert load(store, tmp_path).summary == said
    assert load(store, tmp_path, "eval.images=['true', 'other']").summary == f"{said}, images true, other"


def keep(tmp_path, store, tasks):
    """The nano test questions as if an earlier command had kept these."""
    load(store, tmp_path)
    [kept] = (tmp_path / "tasks").iterdir()
    kept.write_text("".join(task.model_dump_json() + "\n" for task in tasks))


def test_a_question_without_a_gold_answer_is_refused_before_it_is_asked(store, tmp_path):
    image = ImageRef(sha256="ab", path="x.png", width=4, height=4)
    fields = {"question": "?", "images": (image,), "source": "nano", "split": "test"}
    words = Task(id="words", choices=(), answer=None, gold="ten past two", **fields)
    keep(tmp_path, store, [words])
    assert load(store, tmp_path, is_read=True).tasks == [words]
    keep(tmp_path, store, [words, Task(id="secret", choices=("a", "b"), answer=None, **fields)])
    with pytest.raises(DataError, match="task secret of nano has no gold answer"):
        load(store, tmp_path, is_read=True)


def test_all_the_questions_of_a_benchmark_are_compared_with_the_official_ones(store, tmp_path, monkeypatch, caplog):
    from tests.pipeline.sources.test_sources import ScienceQA

    (tmp_path / "data").mkdir()
    data = ScienceQA(tmp_path / "data")
    data.add("9", "test")
    overrides = ["eval.benchmark=scienceqa", f"eval.path={data.write()['path']}"]
    with caplog.at_level(logging.WARNING):
        load(store, tmp_path, *overrides, "eval.num_tasks=1")
        assert "official" not in caplog.text, "a few that were asked for"
        load(store, tmp_path, *overrides, "eval.num_tasks=")
    assert "(NAT 1, SOC 0, LAN 0; official: NAT 1209, SOC 764, LAN 44)" in caplog.text
