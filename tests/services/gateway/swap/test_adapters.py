"""Adapters beside their base: served under names of their own, verified, refused where vLLM would serve something else."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.services.bench_fleet import BASE, TUNED, Bench, answer_of
from tests.services.fake_vllm import write_adapter, write_tensors
from vcot.pipeline.errors import CheckpointError, SwapError
from vcot.services.engine.command import SERVED_NAME
from vcot.services.gateway.fleet.replica import Supervision
from vcot.services.gateway.stamps import served_name
from vcot.services.gateway.swap.ways import check_adapter, choose_way

DELTA = 0.5
MODULE = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    bench.adapter("light", DELTA)
    async with bench.running():
        yield bench


async def test_an_adapter_has_a_name_of_its_own_and_whole_weights_the_served_one(bench: Bench) -> None:
    light, base = bench.registry.resolve("light").ref, bench.base.ref
    assert served_name(light) == f"light-{light.digest.removeprefix('sha256:')[:12]}"
    assert served_name(base) == SERVED_NAME


async def test_base_and_policy_are_served_side_by_side_without_a_pause(bench: Bench) -> None:
    bench.server.hold.clear()
    held = asyncio.create_task(bench.answer("hold on"))
    await bench.server.holding.wait()
    swapped = await bench.swap("policy", "light")  # nothing is drained
    bench.server.hold.set()
    assert (swapped.way, swapped.pause_s) == ("adapter", 0)
    assert await held == ("base", answer_of(BASE))
    assert await bench.answer() == ("light", answer_of(BASE + DELTA))
    assert await bench.answer(model="base") == ("base", answer_of(BASE))
    listed = (await bench.http.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["base", "policy", "light"]
    assert bench.registry.live() == "base"


async def test_answers_are_stamped_with_the_adapters_own_digest(bench: Bench) -> None:
    await bench.swap("policy", "light")
    digest = bench.registry.resolve("light").ref.digest
    answer = await bench.ask(headers={"x-vcot-expect": digest})
    assert (answer.status_code, answer.headers["x-vcot-digest"]) == (200, digest)
    assert answer.json()["model"] == f"light@{digest[7:19]}"
    assert (await bench.ask(model="base", headers={"x-vcot-expect": digest})).status_code == 409


async def test_an_adapter_is_unloaded_when_no_alias_means_it_and_no_request_is_on_it(bench: Bench) -> None:
    await bench.swap("policy", "light")
    name = served_name(bench.registry.resolve("light").ref)
    bench.server.hold.clear()
    held = asyncio.create_task(bench.answer("hold on"))
    await bench.server.holding.wait()
    swap = asyncio.create_task(bench.swap("policy", "base"))
    await bench.until_so(lambda: not bench.admission.adapters)
    assert await bench.answer() == ("base", answer_of(BASE))
    for _ in range(20):  # whatever does not wait has its chance
        await asyncio.sleep(0.005)
    assert name in bench.server.adapters
    bench.server.hold.set()
    assert await held == ("light", answer_of(BASE + DELTA))
    await swap
    assert bench.server.adapters == {}
    assert list(bench.registry.served_folder.iterdir()) == [], "nor is its copy kept"
    assert (await bench.ask(model="light")).status_code == 409


async def test_a_swap_is_done_though_a_server_goes_down_before_its_old_adapter_is_unloaded(tmp_path: Path) -> None:
    bench = Bench(tmp_path, supervision=Supervision(first_backoff_s=60.0))
    bench.adapter("light", DELTA)
    async with bench.running():
        await bench.swap("policy", "light")
        bench.server.hold.clear()
        held = asyncio.create_task(bench.ask("hold on"))
        await bench.server.holding.wait()
        swap = asyncio.create_task(bench.swap("policy", "base"))
        await bench.until_so(lambda: not bench.admission.adapters)
        bench.server.died.set()
        await bench.until("dead")
        bench.server.hold.set()
        await held
        assert (await swap).live.name == "base"


async def test_another_adapter_of_the_same_name_meets_no_cache_of_the_first(bench: Bench) -> None:
    """vLLM keeps what it computed under a name and a path: the digest is in both."""
    await bench.swap("policy", "light")
    assert await bench.answer() == ("light", answer_of(BASE + DELTA))
    await bench.swap("policy", "base")
    bench.registry.retire("light")
    second = write_adapter(bench.directory / "second", "light", 0.25, bench.base.ref, BASE)
    bench.registry.register(second)
    await bench.swap("policy", "light")
    assert await bench.answer() == ("light", answer_of(BASE + 0.25))


async def test_an_adapter_that_changes_nothing_served_is_refused(bench: Bench) -> None:
    bench.adapter("faint", 1e-6)
    bench.server.ignores_adapters = True
    with pytest.raises(SwapError, match=r"no nearer to its manifest than its parent.*all is as before"):
        await bench.swap("policy", "faint")
    assert bench.server.adapters == {}
    assert bench.registry.resolve("policy").ref.name == "base"


async def test_an_adapter_that_answers_otherwise_is_refused(bench: Bench) -> None:
    bench.adapter("liar", 0.25, canary_weight=9.0)
    with pytest.raises(SwapError, match="its canary answers otherwise"):
        await bench.swap("policy", "liar")
    assert await bench.answer() == ("base", answer_of(BASE))


async def test_what_a_refused_adapter_computed_does_not_answer_when_it_is_tried_again(bench: Bench) -> None:
    """Its name and path, and so its cached prefixes, are the same as before."""
    bench.server.ignores_adapters = True
    with pytest.raises(SwapError, match="its canary answers otherwise"):
        await bench.swap("policy", "light")
    bench.server.ignores_adapters = False
    bench.server.images.clear()  # which are kept by name alone
    await bench.swap("policy", "light")
    assert await bench.answer() == ("light", answer_of(BASE + DELTA))


async def test_what_an_adapter_is_verified_by_is_computed_anew_each_time(bench: Bench) -> None:
    """But for its parent's answer alone: what comes from a cache shows nothing of what the engine does now."""
    for _ in range(2):
        num_hits = bench.server.num_hits
        await bench.swap("policy", "light")
        assert bench.server.num_hits <= num_hits + 1
        await bench.swap("policy", "base")


async def test_an_adapter_that_the_engine_does_not_let_go_is_one_that_nobody_is_served(bench: Bench) -> None:
    await bench.swap("policy", "light")
    bench.server.keeps_adapters = True
    await bench.swap("policy", "base")
    assert await bench.answer() == ("base", answer_of(BASE))
    assert (await bench.ask(model="light")).status_code == 409
    bench.server.ignores_adapters = True
    bench.server.images.clear()
    with pytest.raises(SwapError, match=r"its canary answers otherwise.*all is as before"):
        await bench.swap("policy", "light")


async def test_an_engine_that_falls_back_to_the_base_is_not_believed(bench: Bench) -> None:
    await bench.swap("policy", "light")
    for stream in (False, True):
        bench.server.faults = ["wrong-model"]
        answer = await bench.ask(stream=stream)
        assert answer.status_code == 502
        assert "answered as vcot" in answer.json()["error"]["message"]


async def test_an_adapter_that_the_engine_lost_is_not_answered_by_its_base(bench: Bench) -> None:
    await bench.swap("policy", "light")
    bench.server.adapters.clear()
    assert (await bench.ask()).status_code == 502


async def test_adapters_are_there_again_after_a_restart(tmp_path: Path) -> None:
    bench = Bench(tmp_path, replicas=2)
    bench.adapter("light", DELTA)
    async with bench.running():
        await bench.swap("policy", "light")
        assert [len(bench.server_of(number).adapters) for number in (0, 1)] == [1, 1]
        bench.server_of(0).died.set()
        await bench.until("dead")
        assert await bench.answer() == ("light", answer_of(BASE + DELTA))
        await bench.until("live")
        assert len(bench.lives[0][1].adapters) == 1
    again = Bench(tmp_path)
    async with again.running():
        assert await again.answer() == ("light", answer_of(BASE + DELTA))


async def test_an_adapter_that_is_altered_later_leaves_its_base_served(bench: Bench) -> None:
    await bench.swap("policy", "light")
    (bench.registry.served_folder / bench.registry.resolve("light").ref.digest[7:] / "adapter_config.json").write_text(
        "{}"
    )
    bench.server.died.set()
    await bench.until("loading")
    await bench.until("live")
    assert await bench.answer(model="base") == ("base", answer_of(BASE))
    assert (await bench.ask()).status_code == 409
    assert "light is not served" in bench.fleet.warnings[0]


async def test_a_reload_takes_the_adapters_of_the_old_weights_away(bench: Bench) -> None:
    await bench.swap("mine", "light")
    await bench.swap("policy", "tuned")
    assert bench.server.adapters == {}
    assert await bench.answer() == ("tuned", answer_of(TUNED))
    assert (await bench.ask(model="mine")).status_code == 409


async def test_the_parent_is_made_live_first(bench: Bench) -> None:
    await bench.swap("policy", "tuned")
    swapped = await bench.swap("policy", "light")
    assert (swapped.way, swapped.pause_s > 0) == ("adapter", True)
    assert bench.registry.live() == "base", "as a server that is started anew finds it"
    assert await bench.answer() == ("light", answer_of(BASE + DELTA))
    assert await bench.answer(model="base") == ("base", answer_of(BASE))


async def test_an_adapter_that_vllm_would_serve_in_part_is_never_loaded(bench: Bench) -> None:
    bench.adapter("every", 0.25, module="vision_tower.encoder.layers.0.self_attn.q_proj")
    with pytest.raises(SwapError, match=r"would not be served exactly, because of tensor .*vision_tower.*merge it"):
        await bench.swap("policy", "every")
    assert not any(call.startswith("load") for call in bench.server.calls)


async def test_an_adapter_of_unknown_weights_is_refused(bench: Bench) -> None:
    stranger = bench.base.ref.model_copy(update={"digest": "sha256:" + "0" * 64})
    bench.registry.register(write_adapter(bench.directory / "stray", "stray", 0.1, stranger, BASE))
    with pytest.raises(SwapError, match="no checkpoint has those; register its base"):
        await bench.swap("policy", "stray")


async def test_what_is_published_is_what_was_registered(bench: Bench) -> None:
    light = bench.registry.resolve("light")
    write_tensors(light.directory / "adapter_model.safetensors", {f"{MODULE}.lora_A.weight": (4, 8)}, 9.0)
    with pytest.raises(CheckpointError, match="is not what was registered"):
        bench.replica.plan.publish(light)
    assert list(bench.registry.served_folder.glob("*")) == []


async def test_replicas_that_start_at_once_publish_an_adapter_once(bench: Bench) -> None:
    """Each in a thread: one emptied the half-made copy that another was writing."""
    light, plan = bench.registry.resolve("light"), bench.replica.plan
    for number in range(40):
        (light.directory / f"{number}.txt").write_text("x" * 1000)  # so that a copy takes a while
    for _ in range(10):
        shutil.rmtree(bench.registry.served_folder, ignore_errors=True)
        published = await asyncio.gather(*(asyncio.to_thread(plan.publish, light) for _ in range(6)))
        assert len(set(published)) == 1
        assert sorted(entry.name for entry in bench.registry.served_folder.iterdir()) == [published[0].name]


def spoil(bench: Bench, tensors: dict[str, tuple[int, ...]] | None = None, **config: Any) -> None:
    """Change the adapter's files in place; only the check reads them."""
    directory = bench.registry.resolve("light").directory
    if tensors is not None:
        write_tensors(directory / "adapter_model.safetensors", tensors, 0.5)
    text = json.loads((directory / "adapter_config.json").read_text()) | config
    (directory / "adapter_config.json").write_text(json.dumps(text))


def factors(module: str, rank: int = 4, size: int = 8) -> dict[str, tuple[int, ...]]:
    return {f"{module}.lora_A.weight": (rank, size), f"{module}.lora_B.weight": (size, rank)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (factors("base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj"), r"vision_tower.*merge it"),
        (factors("base_model.model.model.multi_modal_projector.linear_1"), r"multi_modal_projector.*merge it"),
        (factors("base_model.model.lm_head"), r"lm_head.*no LoRA factor of the language model"),
        (factors("base_model.model.model.language_model.layers.9.self_attn.q_proj"), r"layers.9.*fits no linear layer"),
        (factors("base_model.model.language_model.layers.0.self_attn.q_proj"), "no LoRA factor of the language model"),
        (factors("model.language_model.layers.0.self_attn.q_proj"), "no LoRA factor of the language model"),
        (factors("base_model.model.model.layers.0.self_attn.q_proj"), "fits no linear layer of its base"),
        (factors(MODULE, size=7), r"\[4, 7\], which fits no linear layer"),
        ({f"{MODULE}.lora_B.weight": (8,)}, r"\[8\], which fits no linear layer"),
        (factors(MODULE, rank=16), r"adapter light has rank 16.*takes 8; merge it"),
        ({f"{MODULE}.lora_A.weight": (4, 8)}, "whose other factor is missing"),
        ({f"{MODULE}.lora_magnitude_vector": (8,)}, "no LoRA factor"),
        ({}, "no tensor in adapter_model"),
    ],
)
async def test_tensors_that_vllm_would_drop_are_named_and_refused(
    bench: Bench, tensors: dict[str, tuple[int, ...]], message: str
) -> None:
    spoil(bench, tensors)
    with pytest.raises(SwapError, match=message):
        check_adapter(bench.registry.resolve("light"), bench.base, 8)


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3]},
        {"init_lora_weights": "pissa"},
        {"peft_type": "IA3"},
    ],
)
async def test_features_that_vllm_passes_over_are_refused(bench: Bench, config: dict[str, Any]) -> None:
    spoil(bench, None, **config)
    with pytest.raises(SwapError, match=rf"{next(iter(config))} = .*merge it"):
        check_adapter(bench.registry.resolve("light"), bench.base, 8)


async def test_what_vllm_serves_exactly_passes(bench: Bench) -> None:
    light = bench.registry.resolve("light")
    for tensors in (factors(MODULE), factors("base_model.model.language_model.model.layers.0.self_attn.q_proj")):
        spoil(bench, tensors, use_rslora=True, rank_pattern={"q_proj": 4}, bias="none", use_dora=False)
        check_adapter(light, bench.base, 8)
    with pytest.raises(SwapError, match="started without adapters"):
        check_adapter(light, bench.base, None)


async def test_the_way_is_the_recipes_or_the_fastest(bench: Bench) -> None:
    light, base, tuned = bench.registry.resolve("light"), bench.base, bench.tuned
    assert choose_way("auto", base, light, can_start=True) == "adapter"
    assert choose_way("adapter", base, light, can_start=True) == "adapter"
    assert choose_way("auto", base, tuned, can_start=False) == "reload"
    assert choose_way("replica", base, tuned, can_start=True) == "replica"
    for wanted, target, message in (
        ("reload", light, 'serve.swap = "reload" cannot serve light, which is an adapter'),
        ("replica", light, "which is an adapter"),
        ("adapter", tuned, "which is no adapter"),
    ):
        with pytest.raises(SwapError, match=message):
            choose_way(wanted, base, target, can_start=True)
    with pytest.raises(SwapError, match="not ours to start"):
        choose_way("replica", base, tuned, can_start=False)
    unproven = type(tuned)(tuned.directory, tuned.manifest.model_copy(update={"canary": None}))
    with pytest.raises(SwapError, match="has no canary"):
        choose_way("auto", base, unproven, can_start=True)


async def test_what_is_served_no_longer_is_taken_out_of_the_engine(bench: Bench) -> None:
    """vLLM keeps the weights when a name is unloaded; on a CPU, those in the last slot reach the base's tokens."""
    for number in range(3):
        if number:
            bench.registry.retire("light")
            folder = bench.directory / f"light-{number}"
            bench.registry.register(write_adapter(folder, "light", DELTA + number / 8, bench.base.ref, BASE))
        await bench.swap("policy", "light")
        assert len(bench.server.loras) == 1
        await bench.swap("policy", "base")
        assert bench.server.loras == set()


async def test_a_refused_adapter_is_taken_out_of_the_engine(bench: Bench) -> None:
    bench.adapter("liar", 0.25, canary_weight=9.0)
    with pytest.raises(SwapError, match="its canary answers otherwise"):
        await bench.swap("policy", "liar")
    assert bench.server.loras == set()
    bench.server.refuses_adapters = True
    with pytest.raises(SwapError, match="a tensor is missing"):
        await bench.swap("policy", "light")
    assert bench.server.loras == set()


async def test_an_engine_that_applies_an_adapter_to_others_requests_is_not_given_it(bench: Bench) -> None:
    bench.server.mixes_adapters = True
    with pytest.raises(SwapError, match="its parent answers otherwise while it answers"):
        await bench.swap("policy", "light")
    assert await bench.answer() == ("base", answer_of(BASE))
