"""The gate's traps, each set on a server that is right in all else: every one of them turns the gate red."""

from __future__ import annotations

import base64
import io
import json
import shutil
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from vcot.pipeline.client import DIGEST_HEADER, ChatClient
from vcot.pipeline.errors import SwapError
from vcot.services.run.parity import ask_served, check_defaults, verify
from vcot.training.merge.export import attach_adapter
from vcot.training.model.loading import completion_logprobs, load_model
from vcot.training.model.template import render
from vcot.training.protocol.agreement import read_probe
from vcot.training.protocol.job import ADAPTER
from vcot.training.worker import jobs


@pytest.fixture(scope="module")
def trained(make_job, tmp_path_factory):
    """A job that was trained and merged."""
    job = make_job("train.learning_rate=1e-2", "train.lora_r=4")
    out = tmp_path_factory.mktemp("checkpoints") / "merged"
    jobs.work(job, out)
    return job, out


@dataclass
class HfServer:
    """vLLM's chat endpoint, as far as the gate uses it, with a Hugging Face model below it and a knob for each trap."""

    model: Any
    processor: Any
    template: str | None = None
    defaults: dict[str, float] = field(default_factory=dict)

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        answer = self.score(body["messages"]) if "prompt_logprobs" in body else {}
        choice = {"message": {"role": "assistant", "content": self.draw(body)}, "finish_reason": "stop"}
        content = {"id": "", "object": "chat.completion", "created": 0, "model": "", **answer}
        content["choices"] = [{"index": index, **choice} for index in range(body.get("n") or 1)]
        return httpx2.Response(200, json=content, headers={DIGEST_HEADER: request.headers["x-vcot-expect"]})

    def draw(self, body: dict[str, Any]) -> str:
        """The settings that would be sampled with: the request's, or the model's own where it leaves them out."""
        neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
        given = {name: value for name in neutral if (value := body.get(name)) is not None}
        return str(neutral | self.defaults | given)

    def score(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        url = messages[0]["content"][0]["image_url"]["url"]
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        user = {"role": "user", "content": [{"type": "image"}, messages[0]["content"][1]]}
        turns = [user, {"role": "assistant", "content": [{"type": "text", "text": messages[1]["content"]}]}]
        self.processor.chat_template = self.template or self.processor.chat_template
        options = {"add_special_tokens": False, "return_tensors": "pt"}
        batch = dict(self.processor(images=[[image]], text=[render(self.processor, turns)], **options))
        ids = batch["input_ids"][0].tolist()
        logprobs = completion_logprobs(self.model, {**batch, "completion_mask": torch.ones_like(batch["input_ids"])})
        steps = [{str(i): {"logprob": value}} for i, value in zip(ids[1:], logprobs[0].tolist(), strict=True)]
        return {"prompt_token_ids": ids, "prompt_logprobs": [None, *steps]}


async def pass_gate(base: HfServer, policy: HfServer, probe, dtype="float32"):
    """Through the gate as the loop does."""
    served = []
    for server in (base, policy):
        transport = httpx2.MockTransport(server)
        async with ChatClient("http://fake/v1", "key", max_connections=2, transport=transport) as client:
            served.append(await ask_served(client, probe.checkpoint, probe, max_concurrency=2))
            await check_defaults(client, probe.checkpoint, probe)
    return verify(probe.checkpoint, served[1], served[0], probe, dtype)


@pytest.fixture
def serve(trained, checkpoint):
    """Makes a server of a directory, of the trained checkpoint if none is given."""

    def make(directory=None, **knobs):
        directory = directory or trained[1]
        processor = AutoProcessor.from_pretrained(directory)
        return HfServer(load_model(directory, torch.float32), processor, **knobs)

    return make


async def test_what_is_served_right_passes(trained, checkpoint, serve):
    report = await pass_gate(serve(checkpoint), serve(), read_probe(trained[1]))
    assert max(report.max_abs_logp.values()) < 1e-4 < report.differs_from_base
    assert report.retention.kept == pytest.approx(1, abs=1e-3)


async def test_what_the_template_writes_behind_eos_is_served_and_not_compared(
    make_job, qwen_checkpoint, serve, tmp_path
):
    """ChatML's line break, and nothing else in its place."""
    jobs.work(make_job("train.learning_rate=1e-2", "train.lora_r=4", base=qwen_checkpoint), tmp_path / "merged")
    probe, base, policy = read_probe(tmp_path / "merged"), serve(qwen_checkpoint), serve(tmp_path / "merged")
    tokenizer = base.processor.tokenizer
    assert tokenizer.decode(probe.closing) == "\n"
    assert {row.tokens[-1] for pair in probe.pairs for row in (pair.chosen, pair.rejected)} == {tokenizer.eos_token_id}
    report = await pass_gate(base, policy, probe)
    assert max(report.max_abs_logp.values()) < 1e-4 < report.differs_from_base
    policy.template = policy.processor.chat_template + "{{ '\\n' }}"
    with pytest.raises(SwapError, match=r"the server reads \(\d+,\), where \(\) was trained"):
        await pass_gate(base, policy, probe)


async def test_trap_base_served_as_the_policy(trained, checkpoint, serve):
    with pytest.raises(SwapError, match="a log-prob of the checkpoint differs"):
        await pass_gate(serve(checkpoint), serve(checkpoint), read_probe(trained[1]))


async def test_trap_small_update_not_served(trained, checkpoint, serve):
    """Within the type's tolerance the base would pass for the policy; the margins tell."""
    probe = read_probe(trained[1])
    near = [
        [b + (p - b) / 1e4 for b, p in zip(*rows, strict=True)] for rows in zip(probe.base, probe.policy, strict=True)
    ]
    small = probe.model_copy(update={"policy": near, "stored": near})
    with pytest.raises(SwapError, match="cannot be told from its base: 0%"):
        await pass_gate(serve(checkpoint), serve(checkpoint), small)


async def test_trap_dropped_tower_adapter(trained, checkpoint, serve, tmp_path):
    job, merged = trained
    adapter = shutil.copytree(job / ADAPTER, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    tensors = {n: t * ("language_model" in n or "lora_A" in n) for n, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    server = serve(merged)
    server.model = attach_adapter(load_model(checkpoint, torch.float32), adapter)
    with pytest.raises(SwapError, match="not all of its weights are served"):
        await pass_gate(serve(checkpoint), server, read_probe(merged))


async def test_trap_doubled_bos(trained, checkpoint, serve, processor):
    doubled = "{{- bos_token }}" + processor.chat_template
    with pytest.raises(SwapError, match=r"from token 2 on the server reads \(1, .*a BOS more or less"):
        await pass_gate(serve(checkpoint, template=doubled), serve(), read_probe(trained[1]))


async def test_trap_another_template(trained, checkpoint, serve, stock_template):
    with pytest.raises(SwapError, match="from token 1 on the server reads"):
        await pass_gate(serve(checkpoint), serve(template=stock_template), read_probe(trained[1]))


@pytest.mark.parametrize("default", [{"temperature": 0.2}, {"top_p": 0.7}, {"top_k": 1}, {"repetition_penalty": 1.3}])
async def test_trap_sampling_from_the_generation_config(trained, checkpoint, serve, default):
    with pytest.raises(SwapError, match=r"generation_config\.json; start vLLM with --generation-config vllm"):
        await pass_gate(serve(checkpoint), serve(defaults=default), read_probe(trained[1]))
