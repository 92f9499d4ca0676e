"""Prompts of two turns: asked in two, kept at once, never paid for twice, and one response to everyone else."""

import json
import time
from collections import Counter

import httpx2
import pytest
from PIL import Image

from vcot.pipeline.client import DIGEST_HEADER, ChatClient
from vcot.pipeline.concurrency import MAX_ATTEMPTS
from vcot.pipeline.errors import AccountError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.prompts import Prompt, render_prompt, render_second, split_at_last, split_thought
from vcot.pipeline.records import CheckpointRef, Response, SamplingParams, Task
from vcot.pipeline.sample import Plan, sample, show_images, withhold_question

pytestmark = pytest.mark.hurried
DIGEST = "sha256:" + "a" * 64
CHECKPOINT = CheckpointRef(name="base", digest=DIGEST, kind="base")
SAMPLING = SamplingParams(temperature=0.5, max_tokens=8, n=4, seed=0)
BUILT_IN = ["two_stage", "caption_first"]


class Upstream:
    """The four rationales of a task are three texts; `fault(number, body)` may answer instead."""

    def __init__(self, fault=lambda number, body: None):
        self.fault, self.bodies = fault, []

    async def __call__(self, request):
        body = json.loads(request.content)
        self.bodies.append(body)
        if (fault := self.fault(len(self.bodies), body)) is not None:
            return fault
        is_second = self.is_second(body)
        texts = [f"The answer is (A) {i}." if is_second else f" A <image>cat {min(i, 2)}. " for i in range(body["n"])]
        choices = [
            {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            for i, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": 1000 if is_second else 10, "completion_tokens": body["n"]}
        answer = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": choices,
            "usage": usage,
        }
        return httpx2.Response(200, json=answer, headers={DIGEST_HEADER: DIGEST})

    @staticmethod
    def is_second(body):
        return "The answer is" in body["messages"][0]["content"][-1]["text"]


def error(status):
    return httpx2.Response(status, json={"error": {"message": "no"}})


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path)


@pytest.fixture
def task(store):
    image = store.put_png(Image.new("RGB", (4, 4), "red"))
    return Task(id="t", question="q?", choices=("a", "b"), answer=1, images=(image,), source="nano", split="train")


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger.sqlite")


async def draw(upstream, requests, ledger, store):
    transport = httpx2.MockTransport(upstream)
    async with ChatClient("http://fake/v1", "key", max_connections=2, transport=transport) as client:
        count = await sample(requests, client, ledger, store, max_concurrency=2)
    return count, ledger.get(Response, [key for request in requests for key in request.response_keys()])


@pytest.mark.parametrize("prompt", BUILT_IN)
async def test_the_second_turn_is_asked_once_for_each_text_of_the_first(prompt, task, ledger, store):
    upstream = Upstream()
    plan = Plan([task], prompt, CHECKPOINT, SAMPLING)
    count, responses = await draw(upstream, plan, ledger, store)
    assert (count.requested, count.ok) == (4, 4)
    first, *seconds = upstream.bodies
    assert (first["n"], Counter(body["n"] for body in seconds)) == (4, {1: 2, 2: 1})
    assert first["messages"][0]["content"][1]["text"] == render_prompt(prompt, task)
    assert {body["messages"][0]["content"][1]["text"] for body in seconds} == {
        render_second(prompt, task, f"A cat {i}.") for i in range(3)
    }
    assert all(body["messages"][0]["content"][0]["type"] == "image_url" for body in upstream.bodies)
    assert len({body["seed"] for body in upstream.bodies}) == 4
    assert [r.text for r in sorted(responses.values(), key=lambda r: r.index)][3] == (
        "A <image>cat 2.\nAnswer: The answer is (A) 1."
    )
    for response in responses.values():
        assert (response.thought, response.answer) == split_thought(prompt, response.text)
        assert response.thought.startswith("A <image>cat")
        assert response.answer.startswith("The answer is (A)")
        assert not response.is_first_turn


async def test_a_response_took_as_long_as_both_turns(task, ledger, store):
    upstream = Upstream(lambda number, _: time.sleep(0.2) if number == 1 else None)
    _, responses = await draw(upstream, Plan([task], "two_stage", CHECKPOINT, SAMPLING), ledger, store)
    assert min(response.latency_s for response in responses.values()) >= 0.2


async def test_tokens_are_the_sum_and_are_counted_once(task, ledger, store):
    _, responses = await draw(Upstream(), Plan([task], "two_stage", CHECKPOINT, SAMPLING), ledger, store)
    usages = [response.usage for response in responses.values() if response.usage]
    assert sum(usage.prompt_tokens for usage in usages) == 3010
    assert sum(usage.completion_tokens for usage in usages) == 8
    assert ledger.sampled() == sum(usages[1:], usages[0])


async def test_a_failed_second_turn_is_owed_and_the_first_and_the_other_texts_are_kept(task, ledger, store):
    def fault(number, body):
        return error(503) if Upstream.is_second(body) and "cat 2" in str(body["messages"]) else None

    plan = Plan([task], "two_stage", CHECKPOINT, SAMPLING)
    broken = Upstream(fault)
    count, responses = await draw(broken, plan, ledger, store)
    assert (count.ok, count.failed, len(broken.bodies)) == (2, 2, 3 + MAX_ATTEMPTS)
    assert {r.index for r in responses.values() if r.error} == {2, 3}
    again = Upstream()
    count, responses = await draw(again, plan, ledger, store)
    assert (count.cached, count.ok, count.requested) == (2, 2, 4)
    assert [body["n"] for body in again.bodies] == [2], "one second turn, and no first"
    assert all(response.error is None for response in responses.values())
    last = Upstream()
    count, _ = await draw(last, plan, ledger, store)
    assert (count.cached, last.bodies) == (4, [])


async def test_a_second_turn_that_is_refused_is_told_from_one_that_failed(task, ledger, store):
    def fault(number, body):
        return error(400) if Upstream.is_second(body) and "cat 2" in str(body["messages"]) else None

    count, _ = await draw(Upstream(fault), Plan([task], "two_stage", CHECKPOINT, SAMPLING), ledger, store)
    assert (count.ok, count.refused) == (2, 2)


async def test_a_failed_first_turn_fails_the_group_and_is_asked_again(task, ledger, store):
    plan = Plan([task], "two_stage", CHECKPOINT, SAMPLING)
    count, _ = await draw(Upstream(lambda number, body: error(503)), plan, ledger, store)
    assert (count.failed, count.ok) == (4, 0)
    count, _ = await draw(Upstream(), plan, ledger, store)
    assert (count.ok, count.cached) == (4, 0)


async def test_what_ends_between_the_turns_pays_for_no_first_turn_twice(task, ledger, store):
    plan = Plan([task], "two_stage", CHECKPOINT, SAMPLING)
    with pytest.raises(AccountError):
        await draw(Upstream(lambda number, body: error(401) if Upstream.is_second(body) else None), plan, ledger, store)
    again = Upstream()
    count, _ = await draw(again, plan, ledger, store)
    assert count.ok == 4
    assert all(Upstream.is_second(body) for body in again.bodies)


async def test_another_image_is_asked_about_anew_with_the_same_seed(task, ledger, store):
    other = store.put_png(Image.new("RGB", (4, 4), "blue"))
    (request,) = Plan([task], "two_stage", CHECKPOINT, SAMPLING)
    await draw(Upstream(), [request], ledger, store)
    upstream = Upstream()
    count, _ = await draw(upstream, [show_images(request, (other,))], ledger, store)
    assert (count.ok, len(upstream.bodies), upstream.bodies[0]["seed"]) == (4, 4, request.sampling.seed)


def test_the_keys_say_both_turns(task):
    keys = {}
    for prompt in BUILT_IN:
        for change in ({}, {"temperature": 0.6}, {"n": 3}, {"seed": 1}):
            (request,) = Plan([task], prompt, CHECKPOINT, SAMPLING.model_copy(update=change))
            keys[request.key] = keys[request.first_key] = prompt
    assert len(keys) == 16


@pytest.mark.parametrize(("prompt", "num_keys"), [("two_stage", 4), ("cot", 2)])
def test_a_request_without_its_question_has_keys_of_its_own_for_each_turn(task, prompt, num_keys):
    tasks = (task, task.model_copy(update={"question": "why?"}))
    found = [withhold_question(request) for request in Plan(tasks, prompt, CHECKPOINT, SAMPLING)]
    keys = {key for request in found for key in (request.key, request.first_key) if key}
    assert len(keys) == num_keys, "what was asked under the one is not found under the other"
    assert {(request.task.images, request.task.question) for request in found} == {((), "")}
    assert found[0].text == found[1].text == render_prompt(prompt, found[0].task)


@pytest.mark.parametrize(("template", "then"), [("<question>", "Go on."), ("<question> <first>", "<first>")])
def test_a_second_turn_without_the_first_is_no_prompt(template, then):
    with pytest.raises(ValueError, match="write <first> in `then`"):
        Prompt(template, split_at_last("\nAnswer: "), then=then)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a\nAnswer: b", ("a", "b")),
        ("a\nAnswer: b\nAnswer: c", ("a\nAnswer: b", "c")),
        ("a", (None, None)),
        ("a\nAnswer: ", (None, None)),
    ],
)
def test_the_final_answer_stands_after_the_last_separator(text, parts):
    assert split_at_last("\nAnswer: ")(text) == parts
