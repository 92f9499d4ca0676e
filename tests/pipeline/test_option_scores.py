"""Options' log-probabilities: the arithmetic, how a server is asked, and what a stop or a fault leaves."""

import json
import math
import sqlite3

import httpx2
import pytest
from PIL import Image

from vcot.pipeline.client import DIGEST_HEADER, ChatClient, Scored
from vcot.pipeline.errors import AccountError, BadAnswer
from vcot.pipeline.images import ImageStore
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.odds import OptionScores
from vcot.pipeline.option_scores import (
    NOT_DRAWN,
    OPTION_PROMPT,
    compare_options,
    key_options,
    list_owed_options,
    score_options,
)
from vcot.pipeline.records import CheckpointRef, ImageGain, Task
from vcot.pipeline.sample import Plan, show_images

pytestmark = pytest.mark.hurried
REF = CheckpointRef(name="base", digest="sha256:aa", kind="base")


def scored(tokens, *logprobs):
    return Scored(tuple(tokens), tuple(logprobs))


def test_what_the_options_have_in_common_does_not_count():
    """Neither prompt nor `The answer is (`, whose log-probabilities a batch may round differently."""
    found = compare_options([scored([1, 2, 7, 9], -90.0, -0.5, -0.25), scored([1, 2, 8, 9], -80.0, -2.0, -1.0)])
    assert found == (-0.75, -3.0)


def test_a_letter_may_be_several_tokens():
    found = compare_options([scored([1, 7, 9], -1.0, -0.5), scored([1, 5, 6, 9], -1.0, -2.0, -1.0)])
    assert found == (-1.5, -4.0)


@pytest.mark.parametrize("second", [[1, 2, 3], [1, 2], [1, 2, 3, 4]])
def test_options_that_no_token_tells_apart_have_no_margin(second):
    with pytest.raises(BadAnswer, match="no margin") as caught:
        compare_options([scored([1, 2, 3], -1.0, -1.0), scored(second, *[-1.0] * (len(second) - 1))])
    assert (caught.value.scope, caught.value.reason) == ("item", "not_comparable")


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
def test_a_log_probability_that_is_no_number_is_no_margin(odd):
    with pytest.raises(BadAnswer, match="finite"):
        compare_options([scored([1, 2], odd), scored([1, 3], -1.0)])


def test_a_margin_is_over_the_best_of_the_wrong_ones():
    told = OptionScores(key="k", task="t", checkpoint="c", logps=(-3.0, -1.0, -1.5))
    assert [told.margin([place == answer for place in range(3)]) for answer in range(3)] == [-2.0, 0.5, -0.5]
    assert told.margin([True, False, True]) == -0.5, "of options that say the same, the likelier one"
    for wrong in ({}, {"logps": (-1.0, -2.0), "error": "no"}):
        with pytest.raises(ValueError, match="either log-probabilities or an error"):
            OptionScores(key="k", task="t", checkpoint="c", **wrong)


class Vllm:
    """vLLM's chat endpoint as far as options use it: a token a word, and likelier the earlier its letter."""

    def __init__(self):
        self.asked = []
        self.faults = {}
        """What to answer instead, by the words sent back."""

    async def __call__(self, request):
        body = json.loads(request.content)
        user, said = body["messages"]
        assert (body["prompt_logprobs"], body["continue_final_message"]) == (0, True), "the turn is not ended"
        self.asked.append(said["content"])
        if said["content"] in self.faults:
            return self.faults[said["content"]]
        words = [part["type"] for part in user["content"]] + said["content"].split()
        tokens = [sum(map(ord, word)) for word in words]
        content = {"id": "", "object": "chat.completion", "created": 0, "model": "", "prompt_token_ids": tokens}
        content["choices"] = [{"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}]
        content["prompt_logprobs"] = [None, *({str(token): {"logprob": -token / 100}} for token in tokens[1:])]
        return httpx2.Response(200, json=content, headers={DIGEST_HEADER: request.headers["x-vcot-expect"]})


def refuse(status, message="no"):
    return httpx2.Response(status, json={"error": {"message": message}})


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path)


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    yield ledger
    ledger.close()


@pytest.fixture
def requests(store):
    image = store.put_png(Image.new("RGB", (4, 4), "red"))
    tasks = [
        Task(id=f"t{n}", question=f"q{n}?", choices=("red", "blue", "red"), answer=0, images=(image,), source="nano",
             split="test")
        for n in range(2)
    ]  # fmt: skip
    return list(Plan(tasks, OPTION_PROMPT, REF, NOT_DRAWN))


async def ask(server, requests, ledger, store):
    async with ChatClient("http://x/v1", "k", max_connections=2, transport=httpx2.MockTransport(server)) as client:
        return await score_options(requests, client, ledger, store, max_concurrency=1)


async def test_each_option_is_asked_once_and_kept(requests, ledger, store):
    """Two options with the same words are two letters, each with a figure of its own."""
    server = Vllm()
    count = await ask(server, requests, ledger, store)
    assert (count.requested, count.ok, count.cached) == (2, 2, 0)
    assert server.asked == [f"The answer is ({letter})" for letter in "ABC"] * 2
    told = ledger.get(OptionScores, [key_options(requests[0])])[key_options(requests[0])]
    assert told.logps == pytest.approx([-sum(map(ord, f"({letter})")) / 100 for letter in "ABC"])
    assert (told.task, told.checkpoint, told.usage.completion_tokens) == ("t0", REF.digest, 3)
    count = await ask(server, requests, ledger, store)
    assert (count.requested, count.ok, count.cached) == (2, 0, 2)
    assert len(server.asked) == 6


def test_what_is_shown_and_asked_is_in_the_key(requests):
    without = show_images(requests[0], ())
    keys = {key_options(requests[0]), key_options(requests[1]), key_options(without), requests[0].key}
    assert len(keys) == 4


async def test_a_fault_of_the_account_stops_and_keeps_what_was_told(requests, ledger, store):
    server = Vllm()
    await ask(server, requests[:1], ledger, store)
    server.faults["The answer is (B)"] = refuse(401)
    with pytest.raises(AccountError):
        await ask(server, requests, ledger, store)
    owed, tally = list_owed_options(requests, ledger)
    assert (owed, tally.cached) == (requests[1:], 1)


async def test_a_refusal_is_final_and_counted_and_a_failure_is_owed(requests, ledger, store):
    server, message = Vllm(), "This model's maximum context length is 2048 tokens. However, you sent 4000 input tokens."
    await ask(server, requests[:1], ledger, store)
    server.faults["The answer is (C)"] = refuse(500)
    count = await ask(server, requests, ledger, store)
    assert (count.cached, count.failed) == (1, 1)
    assert list_owed_options(requests, ledger)[0] == requests[1:]
    server.faults["The answer is (C)"] = refuse(400, message)
    count = await ask(server, requests, ledger, store)
    assert (count.cached, count.refused, count.reasons) == (1, 1, {"too_long": 1})
    server.asked.clear()
    count = await ask(server, requests, ledger, store)
    assert (count.cached, count.refused, server.asked) == (1, 1, [])


async def test_a_server_without_log_probs_ends_the_stage(requests, ledger, store):
    server = Vllm()
    content = {"choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}]}
    server.faults["The answer is (A)"] = httpx2.Response(200, json=content, headers={DIGEST_HEADER: REF.digest})
    with pytest.raises(AccountError, match="gives no log-prob for each token of a prompt; only vLLM"):
        await ask(server, requests, ledger, store)
    assert ledger.get(OptionScores, map(key_options, requests)) == {}


def test_a_ledger_of_before_there_were_options_keeps_its_gains_in_sight(tmp_path):
    path, gain = (
        tmp_path / "old.sqlite",
        ImageGain(key="g", response="r", checkpoint="c", logp_true=-1.0, logp_blank=-2.0),
    )
    told = OptionScores(key="k", task="t", checkpoint="c", logps=(-1.5, -2.0))
    ledger = Ledger(path)
    ledger.put([gain])
    ledger.close()
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE option_scores")
    connection.commit()
    connection.close()
    reader = Ledger(path, is_read=True)
    assert reader.get(OptionScores, ["k"]) == {}
    assert reader.get(ImageGain, ["g"]) == {"g": gain}
    reader.close()
    ledger = Ledger(path)
    ledger.put([told])
    assert ledger.get(OptionScores, ["k"]) == {"k": told}
    ledger.close()
