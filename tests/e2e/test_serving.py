"""The gateway over the real vLLM: what the fake one is assumed to do, and the swap on real weights."""

import asyncio
import base64
import io
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from bench.engine import make_variant
from tests.services.run.test_serving import gone
from vcot.pipeline.errors import SwapError
from vcot.services.gateway.admin import GatewayState, fetch_state, live_checkpoint, register, swap_to
from vcot.services.run.directory import open_run
from vcot.services.run.serving import GatewayHandle, running_gateway

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GatewayHandle]:
    folder = tmp_path_factory.mktemp("serving")
    said: list[str] = []
    with open_run(folder / "run", "nano", ["serve.port=0"]) as run:
        async with running_gateway(run, said.append) as handle:
            assert any(line.startswith("vLLM: ") for line in said), said
            await register(handle.url, make_variant(folder, "moved", 0.2))
            yield handle


def client(gateway: GatewayHandle) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, http_client=openai.DefaultAioHttpClient()
    )


def question(number: int = 0) -> list[dict[str, Any]]:
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56), (40 * number % 256, 30, 200)).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    text = {"type": "text", "text": "What is the colour of the circle?"}
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, text]}]


async def ask(api: openai.AsyncOpenAI, number: int = 0, **options: Any) -> tuple[str, list[str]]:
    """The stamped digest, and the texts."""
    settings = {"model": "policy", "max_tokens": 16, "temperature": 0.0} | options
    raw = await api.chat.completions.with_raw_response.create(messages=question(number), **settings)
    answer = raw.parse()
    assert answer.model == f"{raw.headers['x-vcot-checkpoint']}@{raw.headers['x-vcot-digest'][7:19]}"
    return raw.headers["x-vcot-digest"], [choice.message.content for choice in answer.choices]


async def test_seeded_samples_repeat_themselves(gateway: GatewayHandle) -> None:
    async with client(gateway) as api:
        sampled = {"n": 8, "temperature": 1.0, "seed": 7}
        digest, texts = await ask(api, **sampled)
        assert digest == (await live_checkpoint(gateway.url)).digest
        assert len(texts) == 8
        assert len(set(texts)) > 1
        again, *others = await asyncio.gather(
            ask(api, **sampled), *(ask(api, n, n=8, seed=n, temperature=1.0) for n in range(1, 5))
        )
        assert again == (digest, texts)
        assert all(len(texts) == 8 for _, texts in others)


async def test_a_stream_is_stamped_and_says_the_same(gateway: GatewayHandle) -> None:
    async with client(gateway) as api:
        digest, (text,) = await ask(api)
        stream = await api.chat.completions.create(
            model="policy", messages=question(), max_tokens=16, temperature=0.0, stream=True
        )
        chunks = [chunk async for chunk in stream]
        assert {chunk.model for chunk in chunks} == {f"base@{digest[7:19]}"}
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


async def test_ten_swaps_under_load(gateway: GatewayHandle) -> None:
    """No request fails, and each answer is what its stamp's weights say, token for token."""
    async with client(gateway) as api:
        expected: dict[str, list[list[str]]] = {}
        for name in ("base", "moved"):
            swapped = await swap_to(gateway.url, "policy", name)
            expected[swapped.live.digest] = [(await ask(api, number))[1] for number in range(8)]
        assert len({str(texts) for texts in expected.values()}) == 2
        wrong, count, done = [], itertools.count(), asyncio.Event()

        async def keep_asking(number: int) -> None:
            while not done.is_set():
                digest, texts = await ask(api, number)
                next(count)
                if texts != expected[digest][number]:
                    wrong.append((number, digest, texts))

        askers = [asyncio.create_task(keep_asking(number)) for number in range(8)]
        pauses = [(await swap_to(gateway.url, "policy", ("base", "moved")[turn % 2])).pause_s for turn in range(10)]
        done.set()
        await asyncio.gather(*askers)
        assert wrong == []
        assert next(count) > 20
        assert max(pauses) < 5


async def test_a_lying_checkpoint_is_rolled_back(gateway: GatewayHandle, tmp_path: Path) -> None:
    await swap_to(gateway.url, "policy", "base")
    liar = make_variant(tmp_path, "liar", 0.5)
    other = make_variant(tmp_path, "other", 0.3)
    text = (liar / "checkpoint.json").read_text()
    canary = (other / "checkpoint.json").read_text()
    (liar / "checkpoint.json").write_text(text[: text.index('"job"')] + canary[canary.index('"job"') :])
    await register(gateway.url, liar)
    async with client(gateway) as api:
        before = await ask(api)
        with pytest.raises(SwapError, match=r"canary answers otherwise.*base is live as before"):
            await swap_to(gateway.url, "policy", "liar")
        assert await ask(api) == before


async def test_a_killed_engine_comes_back_with_what_was_live(gateway: GatewayHandle) -> None:
    await swap_to(gateway.url, "policy", "moved")
    async with client(gateway) as api:
        before = await ask(api)
        (engine,) = descendants(await fetch_state(gateway.url), b"VLLM::EngineCore")
        os.kill(engine, signal.SIGKILL)
        assert await gone(engine)
        with pytest.raises(openai.APIStatusError) as caught:
            await ask(api)
        assert caught.value.status_code >= 500
        for _ in range(600):
            if (await fetch_state(gateway.url)).num_restarts and (await fetch_state(gateway.url)).live:
                break
            await asyncio.sleep(0.2)
        assert await ask(api) == before


def descendants(state: GatewayState, name: bytes) -> list[int]:
    """Processes of that name below the gateway."""
    found, parents = [], {state.pid}
    deadline = time.monotonic() + 10
    while parents and time.monotonic() < deadline:
        children = {int(p) for pid in parents for p in _children(pid)}
        found += [pid for pid in children if name in Path(f"/proc/{pid}/cmdline").read_bytes()]
        parents = children
    return found


def _children(pid: int) -> list[str]:
    return [pid for task in Path(f"/proc/{pid}/task").iterdir() for pid in (task / "children").read_text().split()]


async def test_the_rest_of_the_api_is_the_engines(gateway: GatewayHandle) -> None:
    """n, log-probs, structured outputs, a stream's usage, and completions, by the SDK."""
    await swap_to(gateway.url, "policy", "base")
    stamp = f"base@{(await live_checkpoint(gateway.url)).digest[7:19]}"
    async with client(gateway) as api:
        settings: dict[str, Any] = {"model": "policy", "messages": question(), "max_tokens": 16, "temperature": 1.0}
        sampled = await api.chat.completions.create(**settings, n=3, logprobs=True, top_logprobs=2)
        assert [choice.index for choice in sampled.choices] == [0, 1, 2]
        tokens = [choice.logprobs.content for choice in sampled.choices]
        assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for content in tokens for token in content)
        assert sum(len(content) for content in tokens) == sampled.usage.completion_tokens

        stream = await api.chat.completions.create(**settings, n=2, stream=True, stream_options={"include_usage": True})
        *chunks, last = [chunk async for chunk in stream]
        assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}
        assert last.choices == []
        assert 0 < last.usage.completion_tokens <= 32
        assert {chunk.model for chunk in (*chunks, last)} == {stamp}

        completion = await api.completions.create(
            model="policy", prompt="The circle is", max_tokens=4, n=2, logprobs=1, extra_body={"ignore_eos": True}
        )
        assert (completion.model, len(completion.choices)) == (stamp, 2)
        assert len(completion.choices[0].logprobs.token_logprobs) == 4


async def test_an_answer_keeps_its_json_schema(gateway: GatewayHandle) -> None:
    """nano's vocabulary has no braces or quotes of JSON as single pieces; the grammar holds it to them all the same."""
    schema = {"type": "integer", "enum": [1, 2, 3]}
    form = {"type": "json_schema", "json_schema": {"name": "rating", "schema": schema, "strict": True}}
    async with client(gateway) as api:
        _, texts = await ask(api, n=4, temperature=1.0, response_format=form)
        assert {int(text) for text in texts} <= {1, 2, 3}


async def test_curl_is_a_client(gateway: GatewayHandle) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = json.dumps({"model": "policy", "messages": question(), "max_tokens": 4}).encode()
    command = [
        "curl",
        "--silent",
        "--show-error",
        "--max-time",
        "60",
        "-H",
        "content-type: application/json",
        "-d",
        "@-",
    ]
    asking = await asyncio.create_subprocess_exec(*command, f"{gateway.url}/v1/chat/completions", stdin=-1, stdout=-1)
    answer, _ = await asking.communicate(body)
    assert json.loads(answer)["model"].startswith("base@")
