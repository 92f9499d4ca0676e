"""Two real vLLM servers behind one gateway: adapters beside their base, a server of another shape, and lost replicas."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from bench.engine import NANO, make_variant
from tests.e2e.test_serving import ask, client, descendants
from vcot.pipeline.errors import SwapError
from vcot.services.gateway.admin import GatewayState, fetch_state, register, swap_to
from vcot.services.run.directory import open_run
from vcot.services.run.serving import GatewayHandle, running_gateway

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

NUM_QUESTIONS = 4
# In a process of its own: torch stays out of this one.
MAKE = """
import json, shutil, sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from vcot.pipeline.identity import compute_digest, read_manifest, write_manifest
from vcot.pipeline.manifest import CheckpointManifest
from vcot.pipeline.records import CheckpointRef
from tests.e2e.test_serving import question
from vcot.training.model.canary import build_canary
from vcot.training.model.loading import load_model, load_processor, quiet_libraries
from vcot.training.model.template import render

nano, out, num_questions = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
quiet_libraries()
processor, _ = load_processor(nano)
parent = read_manifest(nano).checkpoint.digest

def answers(model):
    import base64, io
    from PIL import Image
    for number in range(num_questions):
        image, text = question(number)[0]["content"]
        picture = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2])))
        prompt = render(processor, [{"role": "user", "content": [{"type": "image"}, text]}], prompt=True)
        inputs = processor(images=[[picture]], text=[prompt], add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=16)
        yield processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)

def adapt(name, targets):
    torch.manual_seed(0)
    model = get_peft_model(
        load_model(nano, torch.float32), LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    ).eval()
    model.save_pretrained(out / name)
    ref = CheckpointRef(name=name, digest=compute_digest(out / name), kind="adapter", parent=parent)
    write_manifest(out / name, CheckpointManifest(checkpoint=ref, canary=build_canary(model, processor)))
    return list(answers(model))

expected = {"base": list(answers(load_model(nano, torch.float32)))}
layers = r".*language_model.*\\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
expected["light"] = adapt("light", layers)
adapt("every", "all-linear")
shutil.copytree(nano, out / "shallow")
config = json.loads((out / "shallow" / "config.json").read_text())
last = config["text_config"]["num_hidden_layers"] = config["text_config"]["num_hidden_layers"] - 1
config["text_config"].pop("layer_types", None)
(out / "shallow" / "config.json").write_text(json.dumps(config))
weights = load_file(nano / "model.safetensors")
kept = {name: value for name, value in weights.items() if f"language_model.model.layers.{last}." not in name}
save_file(kept, out / "shallow" / "model.safetensors", metadata={"format": "pt"})
model = load_model(out / "shallow", torch.float32)
ref = CheckpointRef(name="shallow", digest=compute_digest(out / "shallow"), kind="merged", parent=parent)
write_manifest(out / "shallow", CheckpointManifest(checkpoint=ref, canary=build_canary(model, processor)))
expected["shallow"] = list(answers(model))
print(json.dumps(expected))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """Checkpoints of nano, and what Hugging Face's models answer to the questions."""
    folder = tmp_path_factory.mktemp("made")
    command = [sys.executable, "-c", MAKE, str(NANO), str(folder), str(NUM_QUESTIONS)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    make_variant(folder, "moved", 0.2)
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
async def gateway(
    tmp_path_factory: pytest.TempPathFactory, made: tuple[Path, dict[str, list[str]]]
) -> AsyncIterator[GatewayHandle]:
    options = ["serve.port=0", "serve.replicas=2", "serve.hang_timeout_s=4", "train.target_modules=language-model"]
    with open_run(tmp_path_factory.mktemp("fleet") / "run", "nano", options) as run:
        async with running_gateway(run, lambda _: None) as handle:
            for name in ("light", "every", "shallow", "moved"):
                await register(handle.url, made[0] / name)
            await until(handle, lambda state: all(replica.phase == "live" for replica in state.replicas))
            yield handle


async def until(gateway: GatewayHandle, is_so: Callable[[GatewayState], bool]) -> GatewayState:
    for _ in range(1800):
        if is_so(state := await fetch_state(gateway.url)):
            return state
        await asyncio.sleep(0.1)
    raise AssertionError(state)


async def answers(gateway: GatewayHandle, model: str) -> list[str]:
    async with client(gateway) as api:
        return [(await ask(api, number, model=model))[1][0] for number in range(NUM_QUESTIONS)]


async def test_base_and_adapter_answer_side_by_side_as_hugging_face_does(
    gateway: GatewayHandle, made: tuple[Path, dict[str, list[str]]]
) -> None:
    expected = made[1]
    assert expected["light"] != expected["base"]
    swapped = await swap_to(gateway.url, "policy", "light")
    assert (swapped.way, swapped.pause_s) == ("adapter", 0)
    for _ in range(2):
        both = await asyncio.gather(answers(gateway, "policy"), answers(gateway, "base"))
        assert both == [expected["light"], expected["base"]]
    assert {len(replica.serves) for replica in (await fetch_state(gateway.url)).replicas} == {2}


async def test_an_adapter_of_all_linear_layers_is_refused(gateway: GatewayHandle) -> None:
    with pytest.raises(SwapError, match=r"would not be served exactly.*(multi_modal_projector|vision_tower).*merge it"):
        await swap_to(gateway.url, "policy", "every")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_replica_that_is_lost_costs_no_request_and_comes_back_with_what_is_live(
    gateway: GatewayHandle, number: signal.Signals
) -> None:
    """One that is stopped hangs: it answers /health, and no request."""
    await swap_to(gateway.url, "policy", "moved")
    expected = await answers(gateway, "policy")
    state = await fetch_state(gateway.url)
    engine = descendants(state, b"VLLM::EngineCore")[0]
    done, busy, wrong, count = asyncio.Event(), asyncio.Event(), list[object](), itertools.count()

    async def keep_asking(which: int) -> None:
        while not done.is_set():
            if (answer := (await ask(api, which % NUM_QUESTIONS))[1][0]) != expected[which % NUM_QUESTIONS]:
                wrong.append((which, answer))
            if next(count) == 100:
                busy.set()

    async with client(gateway) as api:
        askers = [asyncio.create_task(keep_asking(which)) for which in range(8)]
        await busy.wait()
        os.kill(engine, number)
        await until(gateway, lambda now: now.num_restarts > state.num_restarts)
        state = await until(gateway, lambda now: all(replica.phase == "live" for replica in now.replicas))
        done.set()
        await asyncio.gather(*askers)
    assert wrong == []
    assert [[ref.name for ref in replica.serves] for replica in state.replicas] == [["moved"], ["moved"]]
    assert await answers(gateway, "policy") == expected


async def test_a_checkpoint_of_another_shape_takes_a_server_of_its_own(
    gateway: GatewayHandle, made: tuple[Path, dict[str, list[str]]]
) -> None:
    from vcot.services.gateway.admin import remove_replica

    await remove_replica(gateway.url, "vllm-1")
    swapped = await swap_to(gateway.url, "policy", "shallow")
    assert (swapped.way, swapped.live.name) == ("replica", "shallow")
    assert await answers(gateway, "policy") == made[1]["shallow"]
    assert [replica.name for replica in (await fetch_state(gateway.url)).replicas] == ["vllm-2"]
