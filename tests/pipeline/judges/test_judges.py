import asyncio
import base64
import io
import json

import httpx2
import pytest
from PIL import Image, ImageChops

from vcot.pipeline.errors import MachineError, RecipeError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges import GroupJudge, Judge, find_judge, judgment_keys
from vcot.pipeline.judges.model import await_all
from vcot.pipeline.judges.pointwise import PointwiseJudge
from vcot.pipeline.judges.verifier import verify
from vcot.pipeline.judging import find_standing, judge_responses
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.records import CheckpointRef, Judgment, Response, SamplingParams, Task, Verdict
from vcot.pipeline.sample import Group
from vcot.pipeline.sections import JudgeSection

pytestmark = pytest.mark.hurried
CHECKPOINT = CheckpointRef(name="base", digest="sha256:aa", kind="base")
SAMPLING = SamplingParams(temperature=0.5, max_tokens=8, n=8, seed=0)
FACTS = ("The circle is red.", "There are two shapes.")
SECTION = JudgeSection(kind="pointwise", model="gpt-4o-mini", api_key_env="VCOT_TEST_KEY")


def make_task(**changes):
    fields = {
        "id": "t",
        "question": "q?",
        "choices": ("red", "blue"),
        "answer": 0,
        "facts": FACTS,
        "source": "nano",
        "split": "train",
    }
    return Task(**(fields | changes))


def make_response(thought="The circle is red.", answer="The answer is (A).", key="r", **changes):
    fields = {"text": f"{thought} <R> {answer}", "thought": thought, "answer": answer}
    return Response(
        key=key,
        group="g",
        task="t",
        index=0,
        checkpoint=CHECKPOINT,
        prompt="thought_specific",
        sampling=SAMPLING,
        **(fields | changes),
    )


def make_verifier(folder):
    return find_judge(JudgeSection(), ImageStore(folder))


@pytest.mark.parametrize(
    ("thought", "answer", "score"),
    [
        ("The circle is red. There are two shapes.", "The answer is (A).", 1.0),
        ("the circle  is RED .", "The answer is (A).", 1.0),
        ("The circle is red. The circle is blue.", "The answer is (A).", 0.75),
        ("The circle is red. The circle is red. The circle is red. The circle is blue.", "The answer is (A).", 0.75),
        ("The circle is red.", "The answer is (B).", 0.5),
        ("", "The answer is (A).", 0.5),
        ("The circle is red.", "no idea", 0.5),
        ("The circle is blue.", "The answer is (B).", 0.0),
    ],
)
def test_the_verifier_checks_statements_and_answer(thought, answer, score):
    assert verify(make_task(), make_response(thought, answer))[0] == score


def test_a_broken_format_scores_nothing_and_says_so():
    assert verify(make_task(), make_response(thought=None, answer=None, text="The answer is (A).")) == (
        0.0,
        "format not kept",
    )


@pytest.mark.parametrize("missing", ["thought", "answer"])
def test_half_a_format_is_none(missing):
    assert verify(make_task(), make_response(**{missing: None})) == (0.0, "format not kept")


def test_the_verifier_says_where_a_score_comes_from_and_names_the_first_false_statement():
    assert verify(make_task(), make_response())[1] == "answer right; 1 of 1 statements true"
    thought = "The circle is red. The circle is blue. All is green."
    said = "answer B, gold A; 1 of 3 statements true; false: the circle is blue"
    assert verify(make_task(), make_response(thought, "The answer is (B)."))[1] == said


def test_without_facts_the_answer_alone_decides():
    assert verify(make_task(facts=()), make_response("Anything at all."))[0] == 1.0


async def test_a_task_without_gold_is_refused_not_scored(tmp_path):
    judgment = await make_verifier(tmp_path).score(make_task(answer=None), make_response())
    assert (judgment.refused, judgment.reason, judgment.score) == (True, "no_gold", None)
    assert "no gold answer" in judgment.error


def test_a_judgments_key_depends_on_judge_prompt_response_and_gold(tmp_path):
    images = ImageStore(tmp_path)
    task, response = make_task(), make_response()
    low = PointwiseJudge(SECTION, images)
    high = PointwiseJudge(SECTION.model_copy(update={"image_detail": "high"}), images)
    other = PointwiseJudge(SECTION.model_copy(update={"model": "gpt-4o"}), images)
    short = PointwiseJudge(SECTION.model_copy(update={"max_tokens": 9}), images)
    keys = [judgment_keys(judge, task, [response])[0] for judge in (low, high, other, short, make_verifier(tmp_path))]
    keys.append(judgment_keys(low, task, [make_response(key="s")])[0])
    others = ({"answer": 1}, {"question": "r?"}, {"choices": ("red", "green")}, {"facts": ()})
    keys += [judgment_keys(low, make_task(**changes), [response])[0] for changes in others]
    assert len(set(keys)) == len(keys) == 10


def test_an_account_of_what_stands_says_what_was_refused_failed_or_never_asked(tmp_path):
    ledger, tasks, judge = Ledger(tmp_path / "l.sqlite"), {"t": make_task()}, make_verifier(tmp_path)
    responses = [make_response(key=key) for key in ("good", "refused", "failed", "new")]
    good, refused, failed, _ = judgment_keys(judge, tasks["t"], responses)
    fields = {"response": "r", "task": "t", "judge": judge.name}
    ledger.put(
        [
            Judgment(key=good, score=1.0, **fields),
            Judgment(key=refused, error="no", reason="refusal", refused=True, num_asked=1, **fields),
            Judgment(key=failed, error="503", reason="overloaded", **fields),
        ]
    )
    standing = find_standing(judge, [Group(tasks["t"], responses)], ledger, JudgeSection(max_unjudged=0.25))
    count = standing.count()
    assert (count.stage, count.requested, count.ok, count.refused, count.failed) == ("judge", 4, 1, 1, 2)
    assert count.reasons == {"refusal": 1, "overloaded": 1, "not_asked": 1}


class Alone(Judge):
    name = "alone/1"

    async def score(self, task, response, *, num_asked=0):
        return Verdict(score=num_asked, rationale=f"{task.id} {response.key}")


class Together(GroupJudge):
    name = "together/1"

    async def judge(self, task, responses, *, num_asked=0):
        return [Verdict(score=num_asked, rationale=f"{task.id} {response.key}") for response in responses]


@pytest.mark.parametrize("num_asked", [{}, {"num_asked": 3}])
async def test_a_judge_of_one_judges_several_and_one_of_several_a_single_one(tmp_path, num_asked):
    alone, together = Alone(JudgeSection(), ImageStore(tmp_path)), Together(JudgeSection(), ImageStore(tmp_path))
    first, second = (
        Verdict(score=len(num_asked) * 3, rationale="t r"),
        Verdict(score=len(num_asked) * 3, rationale="t s"),
    )
    responses = [make_response(), make_response(key="s")]
    assert await alone.judge(make_task(), responses, **num_asked) == [first, second]
    assert await together.score(make_task(), responses[0], **num_asked) == first


def answer(content, finish_reason="stop"):
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": content}}
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return httpx2.Response(200, json=body)


async def ask(monkeypatch, tmp_path, reply):
    monkeypatch.setenv("VCOT_TEST_KEY", "sk-test")
    seen = []

    def upstream(request):
        seen.append((json.loads(request.content), request.headers["authorization"]))
        return reply

    store = ImageStore(tmp_path)
    task = make_task(images=(store.put_png(Image.new("RGB", (4, 4))),))
    async with PointwiseJudge(SECTION, store, transport=httpx2.MockTransport(upstream)) as judge:
        return await judge.score(task, make_response()), seen


async def test_the_pointwise_judge_sees_image_question_and_chain_but_not_gold(monkeypatch, tmp_path):
    judgment, seen = await ask(monkeypatch, tmp_path, answer('{"rationale": "fine", "score": 7}'))
    assert (judgment.score, judgment.rationale, judgment.usage.prompt_tokens) == (7.0, "fine", 100)
    body, authorization = seen[0]
    image, text = body["messages"][0]["content"]
    assert image["image_url"]["detail"] == "low"
    assert "Question: q?\nOptions: (A) red (B) blue" in text["text"]
    assert "The circle is red. <R> The answer is (A)." in text["text"]
    assert "gold" not in text["text"].lower()
    assert (body["model"], body["seed"], authorization) == ("gpt-4o-mini", 0, "Bearer sk-test")


async def test_a_response_that_says_nothing_about_no_image_is_shown_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("VCOT_TEST_KEY", "sk-test")
    seen = []

    def upstream(request):
        seen.append(json.loads(request.content)["messages"][0]["content"])
        return answer(json.dumps({"rationale": "empty", "score": 1}))

    async with PointwiseJudge(SECTION, ImageStore(tmp_path), transport=httpx2.MockTransport(upstream)) as judge:
        judgment = await judge.score(make_task(), make_response(text=""))
    ((text,),) = seen
    assert judgment.score == 1.0
    assert (text["type"], text["text"].rpartition("Response:")[2].strip()) == ("text", "")


@pytest.mark.parametrize(
    ("content", "finish_reason", "said", "reason"),
    [
        ('{"rationale": "fi', "length", "was cut off at judge.max_tokens", "cut_by_length"),
        ("Eight.", "stop", "cannot be read: it holds 0 JSON objects", "unreadable"),
    ],
)
async def test_what_is_wrong_with_a_verdict_is_told(monkeypatch, tmp_path, content, finish_reason, said, reason):
    judgment, _ = await ask(monkeypatch, tmp_path, answer(content, finish_reason=finish_reason))
    assert (judgment.score, judgment.refused, judgment.reason) == (None, True, reason)
    assert f"verdict {content!r} {said}" in judgment.error


async def test_a_missing_key_is_named_before_anything_is_asked(monkeypatch, tmp_path):
    monkeypatch.delenv("VCOT_TEST_KEY", raising=False)
    with pytest.raises(MachineError, match="set VCOT_TEST_KEY in the environment"):
        async with PointwiseJudge(SECTION, ImageStore(tmp_path)):
            pass


async def test_a_server_of_ones_own_needs_no_key(monkeypatch, tmp_path):
    monkeypatch.delenv("VCOT_TEST_KEY", raising=False)
    section = SECTION.model_copy(update={"base_url": "http://judge:8000/v1"})
    seen = []

    def upstream(request):
        seen.append((str(request.url), request.headers["authorization"]))
        return answer(json.dumps({"rationale": "fine", "score": 7}))

    async with PointwiseJudge(section, ImageStore(tmp_path), transport=httpx2.MockTransport(upstream)) as judge:
        assert (await judge.score(make_task(), make_response())).score == 7.0
    assert seen == [("http://judge:8000/v1/chat/completions", "Bearer none")]


async def test_a_judge_is_tried_on_a_red_disc_in_the_middle_of_a_photo_s_size(monkeypatch, tmp_path):
    monkeypatch.setenv("VCOT_TEST_KEY", "sk-test")
    bodies = []

    def upstream(request):
        bodies.append(json.loads(request.content))
        return answer(json.dumps({"rationale": "red", "score": 10}))

    async with PointwiseJudge(SECTION, ImageStore(tmp_path), transport=httpx2.MockTransport(upstream)) as judge:
        judgment = await judge.test()
    assert (judgment.score, judgment.rationale) == (10.0, "red")
    (body,) = bodies
    shown, text = body["messages"][0]["content"]
    assert (body["seed"], shown["image_url"]["detail"]) == (0, "low")
    said = text["text"]
    assert "Question: What colour is the disc" in said
    assert "Options: (A) red (B) blue (C) green (D) yellow" in said
    assert said.endswith("<R> The disc is red. The answer is (A) red.")
    kind, _, data = shown["image_url"]["url"].partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (kind, image.format, image.size) == ("data:image/png", "PNG", (640, 480))
    assert (image.getpixel((320, 240)), image.getpixel((0, 0))) == ((255, 0, 0), (255, 255, 255))
    left, top, right, bottom = ImageChops.invert(image).getbbox()
    assert right - left == bottom - top, "it is round"
    assert (left + right - 1, top + bottom - 1) == image.size, "and in the middle"


async def test_what_was_asked_with_a_question_that_fails_is_waited_for_since_it_is_paid_for():
    answered = []

    async def fail():
        raise RecipeError("no")

    async def answer():
        await asyncio.sleep(0.01)
        answered.append(True)

    with pytest.raises(RecipeError):
        await await_all([fail(), answer()])
    assert answered


def test_a_pointwise_judge_without_a_model_is_a_wrong_recipe(tmp_path):
    with pytest.raises(RecipeError, match=r"needs judge\.model"):
        PointwiseJudge(JudgeSection(kind="pointwise"), ImageStore(tmp_path))


async def test_a_judged_response_is_not_judged_again_and_a_failed_one_not_at_all(tmp_path):
    ledger, verifier = Ledger(tmp_path / "l.sqlite"), make_verifier(tmp_path)
    good = make_response()
    failed = make_response(key="f", text=None, thought=None, answer=None, error="reset")
    tasks = {"t": make_task()}

    async def judge():
        groups, section = [Group(tasks["t"], [good, failed])], JudgeSection()
        return await judge_responses(verifier, groups, ledger, section)

    first, second = await judge(), await judge()
    assert (first.stage, first.requested, first.ok) == ("judge", 1, 1)
    assert (second.requested, second.cached) == (1, 1)
    (key,) = judgment_keys(verifier, tasks["t"], [good])
    assert ledger.get(Judgment, [key])[key].score == 1.0
