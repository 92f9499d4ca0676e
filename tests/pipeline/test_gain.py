"""Image gains: the arithmetic, which responses need one, how a server is asked, and what a stop or a fault leaves."""

import json
import math
import sqlite3
from dataclasses import replace

import httpx2
import pytest
from PIL import Image

from vcot.pipeline.client import DIGEST_HEADER, ChatClient, Scored
from vcot.pipeline.errors import AccountError, BadAnswer
from vcot.pipeline.gain import compare_images, count_gains, key_gain, list_candidates, list_owed, read_gains
from vcot.pipeline.image_gains import GainAsk, measure_gains
from vcot.pipeline.images import ImageStore
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.pairs import Judged, needs_gains
from vcot.pipeline.records import CheckpointRef, ImageGain, Response, SamplingParams, Task, Usage
from vcot.pipeline.sections import PairsSection

pytestmark = pytest.mark.hurried
REF = CheckpointRef(name="base", digest="sha256:aa", kind="base")
SAMPLING = SamplingParams(temperature=0.5, max_tokens=8, n=8, seed=0)
SECTION = PairsSection(policy="image_driven")


def scored(tokens, *logprobs):
    return Scored(tuple(tokens), tuple(logprobs))


def test_a_gain_is_the_difference_of_the_response_alone():
    """The prompt's own tokens, which also stand behind the image, are not the response's."""
    true = scored([1, 2, 3, 4, 5], -1.0, -90.0, -0.5, -0.25)
    blank = scored([1, 2, 3, 4, 5], -1.0, -10.0, -2.0, -1.25)
    found = compare_images([1, 2, 3], true, blank)
    assert (found.logp_true, found.logp_blank, found.num_tokens) == (-0.75, -3.25, 2)


@pytest.mark.parametrize(
    ("prompt", "blank", "fault"),
    [
        ([1, 2], [1, 2, 9], "makes other tokens"),
        ([1, 2], [1, 2, 3, 3], "makes other tokens"),
        ([1, 7], [1, 2, 3], "the prompt's tokens are others"),
        ([1, 2, 3, 4], [1, 2, 3], "the prompt's tokens are others"),
        ([1, 2, 3], [1, 2, 3], "has no tokens"),
    ],
)
def test_what_cannot_be_compared_is_no_gain(prompt, blank, fault):
    with pytest.raises(BadAnswer, match=fault) as caught:
        compare_images(prompt, scored([1, 2, 3], -1.0, -1.0), scored(blank, *[-1.0] * (len(blank) - 1)))
    assert (caught.value.scope, caught.value.reason) == ("item", "not_comparable")


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
def test_a_log_probability_that_is_no_number_is_no_gain(odd):
    with pytest.raises(BadAnswer, match="finite"):
        compare_images([1], scored([1, 2], odd), scored([1, 2], -1.0))


def test_a_gain_has_both_log_probabilities_or_an_error():
    fields = {"key": "k", "response": "r", "checkpoint": "c"}
    assert ImageGain(**fields, logp_true=-1.0, logp_blank=-3.5).value == 2.5
    assert ImageGain(**fields, error="no").value is None
    for wrong in ({}, {"logp_true": 1.0}, {"logp_true": 1.0, "logp_blank": 1.0, "error": "no"},
                  {"logp_blank": 1.0, "error": "no"}):  # fmt: skip
        with pytest.raises(ValueError, match="two log-probabilities or an error"):
            ImageGain(**fields, **wrong)


# Which responses need one


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path)


@pytest.fixture
def task(store):
    image = store.put_png(Image.new("RGB", (4, 4), "red"))
    return Task(id="t", question="q?", choices=("red", "blue"), answer=0, images=(image,), source="nano", split="train")


def judge(index, score, letter, text="", **fields):
    said = f"{text or f'text {index}'} The answer is ({letter})."
    response = Response(
        key=f"{index:064x}", group="g", task="t", index=index, checkpoint=REF, prompt="thought_specific", sampling=SAMPLING,
        text=said, answer=f"The answer is ({letter}).", **fields,
    )  # fmt: skip
    return Judged(response, score, "j/1", f"j{index}")


def indexes(judged):
    return [one.response.index for one in judged]


def test_only_what_may_be_chosen_is_asked(task):
    judged = [judge(0, 0.5, "A"), judge(1, 1.0, "A"), judge(2, 0.0, "B"), judge(3, 1.0, "B"), judge(4, 0.0, "A"),
              judge(5, 1.0, "A", "text 1")]  # fmt: skip
    assert sorted(indexes(list_candidates(task, judged, SECTION))) == [0, 1], "right, above another, and of twins one"
    open_ended = task.model_copy(update={"choices": (), "answer": None, "gold": "red"})
    assert sorted(indexes(list_candidates(open_ended, judged, SECTION))) == [0, 1, 3], "without an option to be right"
    assert list_candidates(task.model_copy(update={"images": ()}), judged, SECTION) == []
    assert list_candidates(task, [judge(0, 1.0, "A"), judge(1, 1.0, "A")], SECTION) == []
    assert list_candidates(task, [judge(0, 1.0, "A")], SECTION) == []
    cut = [judge(0, 1.0, "A", finish_reason="length"), judge(1, 0.0, "B")]
    assert list_candidates(task, cut, SECTION) == []
    empty = judge(0, 1.0, "A")
    empty = replace(empty, response=empty.response.model_copy(update={"text": " "}))
    assert list_candidates(task, [empty, judge(1, 0.0, "B")], SECTION) == []


def test_a_policy_says_that_it_goes_by_gains(tmp_path, monkeypatch):
    assert needs_gains(SECTION)
    assert not needs_gains(PairsSection())
    lines = [
        "from vcot.pipeline.pairs import going_by_gains",
        "pick = lambda *_: 'none'",
        "own = going_by_gains(lambda *_: [])",
    ]
    (tmp_path / "gaining.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    assert needs_gains(PairsSection(policy="gaining:own"))
    assert not needs_gains(PairsSection(policy="gaining:pick"))


# Asking


class Vllm:
    """vLLM's chat endpoint as far as gains use it: a token a word, and an image that makes colours likelier."""

    def __init__(self):
        self.asked = []
        self.faults = {}
        """What to answer instead, by the text that is asked about."""
        self.end = ["</s>"]

    async def __call__(self, request):
        body = json.loads(request.content)
        user, *said = body["messages"]
        image = user["content"][0]["image_url"]["url"]
        words = ["IMAGE", *user["content"][1]["text"].split(), "ASSISTANT:"]
        text = said[0]["content"] if said else ""
        self.asked.append((image[-20:], text))
        if text in self.faults:
            return self.faults[text]
        if said:
            assert body["prompt_logprobs"] == 0
            words += text.split() + ([] if body["continue_final_message"] else self.end)
        tokens = [hash(word) % 10_000 for word in words]
        step = -0.5 if image == self.true else -2.0
        content = {"id": "", "object": "chat.completion", "created": 0, "model": "", "prompt_token_ids": tokens}
        content["choices"] = [{"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}]
        if said:
            content["prompt_logprobs"] = [None, *({str(token): {"logprob": step}} for token in tokens[1:])]
        return httpx2.Response(200, json=content, headers={DIGEST_HEADER: request.headers["x-vcot-expect"]})


def refuse(status, message="no", **fields):
    return httpx2.Response(status, json={"error": {"message": message, **fields}})


@pytest.fixture
def server(store, task):
    from vcot.pipeline.client import user_message

    server = Vllm()
    shown = store.read_all(task.images)
    server.true = user_message("x", shown)["content"][0]["image_url"]["url"]
    return server


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    yield ledger
    ledger.close()


@pytest.fixture
def judged():
    return [judge(0, 1.0, "A"), judge(1, 0.5, "A", "a longer text"), judge(2, 0.0, "B")]


async def ask(server, task, judged, ledger, store, max_concurrency=4):
    """What `vcot pair` does: count, then ask what is owed."""

    def candidates():
        return [(task, list_candidates(task, found, SECTION)) for task, found in read_gains([(task, judged)], ledger)]

    blank = store.put_png(Image.new("RGB", (4, 4), (128, 128, 128)))
    asks = [
        GainAsk(task, (blank,), [one.response for one in owed])
        for task, each in candidates()
        if (owed := list_owed(each))
    ]
    tally = count_gains(each for _, each in candidates())
    async with ChatClient("http://x/v1", "k", max_connections=4, transport=httpx2.MockTransport(server)) as client:
        return await measure_gains(asks, client, ledger, store, tally, max_concurrency=max_concurrency)


def read(ledger, judged):
    found = ledger.get(ImageGain, [key_gain(one.response) for one in judged])
    return [found.get(key_gain(one.response)) for one in judged]


async def test_gains_are_kept_and_asked_once(server, task, judged, ledger, store):
    count = await ask(server, task, judged, ledger, store)
    assert (count.requested, count.ok, count.cached) == (2, 2, 0)
    first, longer, rejected = read(ledger, judged)
    assert (first.num_tokens, first.value) == (6, 6 * 1.5), "the end of the turn does not count"
    assert (longer.num_tokens, longer.value) == (7, 7 * 1.5)
    assert rejected is None
    assert first.usage.completion_tokens == 2
    assert first.checkpoint == REF.digest
    assert len(server.asked) == 1 + 2 * 2, "the prompt once, each text twice"
    count = await ask(server, task, judged, ledger, store)
    assert (count.requested, count.ok, count.cached) == (2, 0, 2)
    assert len(server.asked) == 5


async def test_a_stop_half_way_loses_nothing_that_was_answered(server, task, judged, ledger, store):
    server.faults[judged[1].response.text] = refuse(401)
    with pytest.raises(AccountError):
        await ask(server, task, judged, ledger, store)
    assert [gain is not None for gain in read(ledger, judged)] == [True, False, False]
    server.faults.clear()
    server.asked.clear()
    count = await ask(server, task, judged, ledger, store)
    assert (count.requested, count.ok, count.cached) == (2, 1, 1)
    assert not any(text == judged[0].response.text for _, text in server.asked), "it was not asked again"


async def test_what_the_server_refuses_is_counted_by_reason_and_final(server, task, judged, ledger, store):
    message = "This model's maximum context length is 2048 tokens. However, your request has 4000 input tokens."
    server.faults[judged[1].response.text] = refuse(400, message)
    count = await ask(server, task, judged, ledger, store)
    assert (count.ok, count.refused, count.reasons) == (1, 1, {"too_long": 1})
    server.asked.clear()
    count = await ask(server, task, judged, ledger, store)
    assert (count.cached, count.refused, server.asked) == (1, 1, [])


async def test_what_failed_is_owed_and_asked_again(server, task, judged, ledger, store):
    server.faults[judged[1].response.text] = refuse(500)
    count = await ask(server, task, judged, ledger, store)
    assert (count.ok, count.failed) == (1, 1)
    server.faults.clear()
    count = await ask(server, task, judged, ledger, store)
    assert (count.cached, count.ok, count.failed) == (1, 1, 0)


async def test_a_template_that_rewrites_is_named(server, task, ledger, store):
    rewritten = [judge(2, 1.0, "A"), judge(3, 0.0, "B")]
    content = {"id": "", "object": "chat.completion", "created": 0, "model": "", "prompt_token_ids": [1, 2],
               "prompt_logprobs": [None, {"2": {"logprob": -1.0}}],
               "choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}]}  # fmt: skip
    server.faults[rewritten[0].response.text] = httpx2.Response(200, json=content, headers={DIGEST_HEADER: REF.digest})
    count = await ask(server, task, rewritten, ledger, store)
    assert (count.refused, count.reasons) == (1, {"not_comparable": 1})


async def test_an_answer_of_other_weights_is_no_gain(server, task, judged, ledger, store):
    server.faults[judged[0].response.text] = httpx2.Response(
        200, json={"choices": []}, headers={DIGEST_HEADER: "sha256:bb"}
    )
    with pytest.raises(AccountError, match="sha256:bb"):
        await ask(server, task, judged, ledger, store)
    assert read(ledger, judged) == [None, None, None]


async def test_a_server_without_log_probs_ends_the_stage(server, task, judged, ledger, store):
    content = {"choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}]}
    server.faults[""] = httpx2.Response(200, json=content, headers={DIGEST_HEADER: REF.digest})
    with pytest.raises(AccountError, match="gives no log-prob for each token"):
        await ask(server, task, judged, ledger, store)


# The ledger


def test_a_ledger_of_before_there_were_gains_is_read_as_without_and_takes_them(tmp_path, judged):
    path, gain = (
        tmp_path / "old.sqlite",
        ImageGain(
            key=key_gain(judged[0].response),
            response=judged[0].response.key,
            checkpoint=REF.digest,
            logp_true=-1.0,
            logp_blank=-2.0,
        ),
    )
    Ledger(path).close()
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE image_gains")
    connection.commit()
    connection.close()
    reader = Ledger(path, is_read=True)
    assert reader.get(ImageGain, [gain.key]) == {}
    assert reader.done(ImageGain, [gain.key]) == set()
    assert reader.is_empty()
    assert reader.spent("j/1") == (0, Usage(prompt_tokens=0, completion_tokens=0))
    reader.close()
    ledger = Ledger(path)
    ledger.put([gain])
    ledger.close()
    reader = Ledger(path, is_read=True)
    assert reader.get(ImageGain, [gain.key]) == {gain.key: gain}
    assert not reader.is_empty()
    reader.close()


def test_a_good_gain_is_never_replaced_and_an_error_is(ledger, judged):
    fields = {"key": key_gain(judged[0].response), "response": judged[0].response.key, "checkpoint": REF.digest}
    failed = ImageGain(**fields, error="HTTP 500", reason="server")
    good = ImageGain(**fields, logp_true=-1.0, logp_blank=-2.0, num_tokens=3)
    ledger.put([failed])
    ledger.put([good])
    ledger.put([failed])
    assert ledger.get(ImageGain, [good.key]) == {good.key: good}
