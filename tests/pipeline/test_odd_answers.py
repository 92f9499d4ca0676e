"""Whatever an API answers is a record or a fault of one sentence, never a crash."""

import copy
import json
from contextlib import suppress

import httpx2
import pytest

from vcot.pipeline.client import ChatClient, user_message
from vcot.pipeline.errors import RequestError
from vcot.pipeline.records import SamplingParams

PARAMS = SamplingParams(temperature=0.0, max_tokens=8, seed=0)
MESSAGE = {"role": "assistant", "content": "yes"}
COMPLETION = {
    "id": "x", "object": "chat.completion", "created": 0, "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": MESSAGE}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}  # fmt: skip
ODD = [None, -1, 1.5, True, "x", "", [], {}, [1], {"a": 1}, ["a"], "\ud83d", 10**30]


async def ask(body, status=200, **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    def answer(_):
        return httpx2.Response(status, content=content, headers={"content-type": "application/json"} | headers)

    transport = httpx2.MockTransport(answer)
    async with ChatClient("http://judge.invalid/v1", "key", max_connections=1, transport=transport) as client:
        return await client.complete("m", [user_message("?")], PARAMS)


def list_places(value, place=()):
    """The place of every value in a JSON tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield (*place, name)
        yield from list_places(inner, (*place, name))


@pytest.mark.parametrize("place", list_places(COMPLETION), ids=str)
async def test_a_field_of_any_other_type_is_a_record_or_a_fault(place):
    for odd in ODD:
        body = copy.deepcopy(COMPLETION)
        node = body
        for name in place[:-1]:
            node = node[name]
        node[place[-1]] = odd
        with suppress(RequestError):
            completion = await ask(body)
            assert completion.usage.num_tokens < 10**9
            completion.choices[0].text.encode()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 100_000, 200),
        (b'{"choices":' + b"[" * 100_000, 200),
        (b"\0\xff", 200),
        (b"\0\xff", 500),
        ({"error": {"message": "m", "code": {"a": 1}, "param": ["x"], "type": 3}}, 400),
        ({"error": {"message": ["m"], "param": {}}}, 400),
        ({"error": {"message": "a\nb \ud83d \x1b[31m" + "x" * 100_000}}, 400),
    ],
    ids=["deep", "deep choices", "bytes", "bytes 500", "odd code", "odd message", "long message"],
)
async def test_a_body_of_no_known_shape_is_a_sentence(body, status):
    with pytest.raises(RequestError) as caught:
        await ask(body, status)
    said = str(caught.value)
    assert len(said) < 1200
    assert said.isprintable()
    said.encode()


async def test_a_redirect_is_the_address_s_fault_at_once():
    with pytest.raises(RequestError, match="elsewhere, at '/login'") as caught:
        await ask(b"", 302, location="/login")
    assert (caught.value.scope, caught.value.reason) == ("account", "address")


async def test_half_a_character_of_a_model_can_be_kept():
    body = copy.deepcopy(COMPLETION)
    body["choices"][0]["message"]["content"] = "ok \ud83d"
    assert (await ask(body)).choices[0].text == "ok ?"


async def test_only_the_parts_that_are_text_are_the_text():
    body = copy.deepcopy(COMPLETION)
    body["choices"][0]["message"]["content"] = [
        {"type": "reasoning", "text": "hm"}, {"type": "text", "text": "yes"}, {"type": "text", "text": None},
    ]  # fmt: skip
    assert (await ask(body)).choices[0].text == "yes"
    body["choices"][0]["message"]["content"] = []
    with pytest.raises(RequestError, match="no text"):
        await ask(body)
