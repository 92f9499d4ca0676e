import asyncio
import json
import shutil
import time
from pathlib import Path

import pytest

from tests.services.bench_fleet import BASE, TUNED, Bench, answer_of
from tests.services.fake_vllm import FAR, FakeVllm, make_canary, write_checkpoint
from vcot.pipeline.errors import CheckpointError, ServerError, SwapError, VcotError
from vcot.services.checkpoints.registry import Registry
from vcot.services.gateway.fleet.admission import Admission
from vcot.services.gateway.swap import rollout
from vcot.services.gateway.swap.canary_check import (
    CanaryAnswer,
    agree,
    canary_request,
    explain_difference,
    long_request,
    parse_canary,
)
from vcot.services.gateway.swap.verified import SwapLimits
from vcot.services.gateway.swap.ways import check_reloadable


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def test_a_swap_changes_every_answer_and_back(bench: Bench) -> None:
    async with bench.running():
        assert await bench.answer() == ("base", answer_of(BASE))
        began = time.monotonic()
        swapped = await bench.swap("policy", "tuned")
        assert swapped.live.name == "tuned"
        assert 0 < swapped.pause_s <= time.monotonic() - began
        assert bench.admission.message == ""
        assert await bench.answer() == ("tuned", answer_of(TUNED))  # the same prompt: nothing cached is left
        await bench.swap("base", "base")
        assert await bench.answer(model="base") == ("base", answer_of(BASE))
        assert bench.registry.aliases() == {"base": "base", "policy": "tuned"}
        assert bench.fleet.warnings == []


async def test_an_alias_that_is_another_checkpoint_s_name_is_refused_before_anything_stops(bench: Bench) -> None:
    async with bench.running():
        with pytest.raises(CheckpointError, match="tuned is a checkpoint's own name and cannot mean base"):
            await bench.swap("tuned", "base")
        with pytest.raises(CheckpointError, match="base is a checkpoint's own name"):
            await bench.swap("base", "tuned")
        assert not any(call.startswith("reload") for call in bench.server.calls)


async def test_where_another_replica_answers_meanwhile_nobody_waits(tmp_path: Path) -> None:
    bench = Bench(tmp_path, replicas=2)
    async with bench.running():
        swapped = await bench.swap("policy", "tuned")
        assert (swapped.way, swapped.pause_s) == ("reload", 0.0)
        assert [replica.gate.admission.checkpoint for replica in bench.fleet.replicas] == [bench.tuned] * 2


async def test_a_replica_that_is_not_drained_in_time_is_started_anew_all_the_same(tmp_path: Path) -> None:
    bench = Bench(tmp_path, replicas=2, swap="replica", limits=SwapLimits(drain_s=0.05))
    async with bench.running():
        for server in bench.servers:
            server.hold.clear()
        held = [asyncio.create_task(bench.ask("hold on")) for _ in bench.servers]
        await asyncio.gather(*(server.holding.wait() for server in bench.servers))
        await bench.swap("policy", "tuned")
        assert any("vllm-1 was not drained" in warning for warning in bench.fleet.warnings)
        assert [replica.gate.admission.checkpoint for replica in bench.fleet.replicas] == [bench.tuned] * 2
        await asyncio.gather(*held)


async def test_a_swap_ends_though_a_server_cannot_be_started_anew(tmp_path: Path) -> None:
    bench = Bench(tmp_path, replicas=2, swap="replica")
    bench.prepare = lambda server: setattr(server, "fail_start", "no memory" if len(bench.servers) > 3 else "")
    async with bench.running():
        async with asyncio.timeout(10):
            await bench.swap("policy", "tuned")
        assert await bench.answer() == ("tuned", answer_of(TUNED))
        assert [replica.gate.admission.phase == "live" for replica in bench.fleet.replicas] == [False, True]


async def test_a_server_of_its_own_has_the_devices_of_the_one_that_it_replaces(tmp_path: Path) -> None:
    bench = Bench(tmp_path, swap="replica", devices=("0", "1"))
    async with bench.running():
        swapped = await bench.swap("policy", "tuned")
        assert (swapped.way, swapped.pause_s) == ("replica", 0.0)
        assert [(replica.name, replica.devices) for replica in bench.fleet.replicas] == [("vllm-1", "0")]
        assert await bench.answer() == ("tuned", answer_of(TUNED))


async def test_every_cache_is_reset_after_the_load(bench: Bench) -> None:
    async with bench.running():
        await bench.swap("policy", "tuned")
        after = bench.server.calls[bench.server.calls.index("reload tuned") :]
        assert {"/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"} < set(after)


async def test_a_cache_that_was_not_reset_is_no_swap(bench: Bench) -> None:
    """vLLM says so in a body of 200; whoever reads the status only goes on with prefixes of the old weights."""
    async with bench.running():
        bench.server.holds_prefixes = True
        with pytest.raises(SwapError, match="did not reset its prefix cache"):
            await bench.swap("policy", "tuned")


async def test_what_is_live_already_is_not_loaded_again(bench: Bench) -> None:
    async with bench.running():
        swapped = await bench.swap("best", "base")
        assert swapped.pause_s == 0
        assert not any(call.startswith("reload") for call in bench.server.calls)
        assert bench.registry.resolve("best").ref.name == "base"


@pytest.mark.parametrize("num", [1, 2])
async def test_the_same_weights_under_another_name_or_elsewhere_are_not_loaded_again(tmp_path: Path, num: int) -> None:
    """A load of them was refused, since nothing in the answers changed."""
    bench = Bench(tmp_path, replicas=num)
    bench.registry.register(write_checkpoint(tmp_path / "copy", "copy", BASE))
    async with bench.running():
        num_calls = len(bench.server.calls)
        assert (await bench.swap("policy", "copy")).way == "none"
        assert await bench.answer() == ("copy", answer_of(BASE))
        assert {state["name"] for state in (await bench.http.get("/admin/state")).json()["replicas"][0]["serves"]} == {
            "copy"
        }
        assert len(bench.server.calls) == num_calls
        await bench.swap("policy", "tuned")
        bench.registry.register((tmp_path / "tuned").rename(tmp_path / "moved"))
        assert (await bench.swap("policy", "tuned")).way == "none"
        moved = bench.registry.resolve("tuned")
        tried = await rollout.try_out(bench.fleet, shutil.copytree(tmp_path / "moved", tmp_path / "again"))
        assert tried.way == "none"
        await rollout.end_trial(bench.fleet, "")
        assert [replica.gate.admission.checkpoint for replica in bench.fleet.replicas] == [moved] * num
        assert await bench.answer() == ("tuned", answer_of(TUNED))
        assert (await bench.swap("policy", "base")).way == "reload"  # and back, should it fail, from where they are
        assert await bench.answer() == ("base", answer_of(BASE))


async def test_requests_in_flight_end_with_the_weights_that_they_began_with(bench: Bench) -> None:
    async with bench.running():
        bench.server.hold.clear()
        asked = asyncio.create_task(bench.answer("hold on"))
        await bench.server.holding.wait()
        swap = asyncio.create_task(bench.swap("policy", "tuned"))
        await bench.until("draining")
        assert bench.admission.message == "swapping base for tuned"
        late = asyncio.create_task(bench.answer("late"))
        for _ in range(20):  # whatever does not wait has its chance
            await asyncio.sleep(0.005)
        assert not any(call.startswith("reload") for call in bench.server.calls)
        assert not late.done()
        bench.server.hold.set()
        assert await asked == ("base", answer_of(BASE))
        await swap
        assert await late == ("tuned", answer_of(TUNED))


async def test_a_drain_that_takes_too_long_gives_the_swap_up(tmp_path: Path) -> None:
    bench = Bench(tmp_path, limits=SwapLimits(drain_s=0.05))
    async with bench.running():
        bench.server.hold.clear()
        asked = asyncio.create_task(bench.answer("hold on"))
        await bench.server.holding.wait()
        with pytest.raises(SwapError, match="1 requests were still in flight"):
            await bench.swap("policy", "tuned")
        bench.server.hold.set()
        assert await asked == ("base", answer_of(BASE))
        assert await bench.answer("next") == ("base", answer_of(BASE))
        assert bench.registry.live() == "base"


async def test_ten_swaps_under_load_mix_nothing(bench: Bench) -> None:
    async with bench.running():
        wrong: list[object] = []

        async def keep_asking(number: int) -> None:
            for turn in range(20):
                name, values = await bench.answer(f"{number} {turn % 3}")
                if values != answer_of({"base": BASE, "tuned": TUNED}[name]):
                    wrong.append((name, values))

        askers = [asyncio.create_task(keep_asking(number)) for number in range(8)]
        for turn in range(10):
            await bench.swap("policy", ("tuned", "base")[turn % 2])
        await asyncio.gather(*askers)
        assert wrong == []


async def test_a_canary_that_differs_rolls_back(bench: Bench) -> None:
    bench.registry.register(write_checkpoint(bench.directory / "liar", "liar", 3.0, canary_weight=4.0))
    async with bench.running():
        with pytest.raises(SwapError, match=r"a log-prob differs by 1.1e\+02.*base is live as before"):
            await bench.swap("policy", "liar")
        assert bench.server.calls.count("reload base") == 1
        assert bench.admission.message == ""
        assert await bench.answer() == ("base", answer_of(BASE))
        assert bench.registry.live() == "base"
        assert bench.registry.resolve("policy").ref.name == "base"
        assert len(bench.servers) == 1


async def test_weights_that_were_not_applied_are_noticed(bench: Bench) -> None:
    """A tolerant canary passes with the old weights, too; being equal to the last bit gives them away."""
    near = write_checkpoint(bench.directory / "near", "near", BASE + 1e-6)
    bench.registry.register(near)
    async with bench.running():
        bench.server.read = lambda _: BASE
        with pytest.raises(SwapError, match="to the last bit"):
            await bench.swap("policy", "near")
        assert bench.admission.phase == "live"


async def test_a_reload_that_fails_half_way_rolls_back(bench: Bench) -> None:
    async with bench.running():
        bench.server.fail_next_reload = True
        with pytest.raises(SwapError, match=r"collective_rpc with 500.*base is live as before"):
            await bench.swap("policy", "tuned")
        assert await bench.answer() == ("base", answer_of(BASE))


async def test_a_swap_that_cannot_be_recorded_did_not_happen(bench: Bench) -> None:
    async with bench.running():
        lock = bench.directory / "run" / "checkpoints" / "registry.lock"
        lock.unlink()
        lock.mkdir()
        with pytest.raises(SwapError, match="Is a directory"):
            await bench.swap("policy", "tuned")
        assert await bench.answer() == ("base", answer_of(BASE))


async def test_where_the_roll_back_fails_the_server_is_started_anew(bench: Bench) -> None:
    async with bench.running():
        bench.server.is_rollback_broken = True
        with pytest.raises(SwapError, match="could not be brought back"):
            await bench.swap("policy", "tuned")
        await bench.until("live")
        assert len(bench.servers) == 2
        assert await bench.answer() == ("base", answer_of(BASE))
        await bench.swap("policy", "tuned")
        assert await bench.answer() == ("tuned", answer_of(TUNED))


async def test_a_roll_back_is_verified_too(bench: Bench) -> None:
    bench.registry.register(write_checkpoint(bench.directory / "liar", "liar", 3.0, canary_weight=4.0))
    async with bench.running():
        bench.server.reloads_base_as = 9.0
        with pytest.raises(SwapError, match=r"could not be brought back.*does not answer the canary as base should"):
            await bench.swap("policy", "liar")
        await bench.until("live")
        assert len(bench.servers) == 2
        assert await bench.answer() == ("base", answer_of(BASE))


@pytest.mark.parametrize("name", ["tuned", "liar"])
async def test_a_tensor_that_no_answer_depends_on_is_held_to_the_files_after_a_swap_and_a_roll_back(
    tmp_path: Path, name: str
) -> None:
    bench = Bench(tmp_path, dtype="float32")
    bench.registry.register(write_checkpoint(bench.directory / "liar", "liar", 3.0, canary_weight=4.0))
    async with bench.running():
        bench.server.garbled = 9.0
        said = rf"{name} was not swapped in \((?!None).*base could not be brought back.*tensor"
        with pytest.raises(SwapError, match=said):
            await bench.swap("policy", name)
        await bench.until("live")
        assert len(bench.servers) == 2
        assert await bench.answer() == ("base", answer_of(BASE))


async def test_what_was_swapped_in_is_held_to_its_files_when_it_is_brought_back(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dtype="float32")
    bench.registry.register(write_checkpoint(bench.directory / "liar", "liar", 3.0, canary_weight=4.0))
    async with bench.running():
        await bench.swap("policy", "tuned")
        bench.server.garbled = 9.0
        with pytest.raises(SwapError, match=r"a log-prob differs.*tuned could not be brought back.*tensor"):
            await bench.swap("policy", "liar")
        await bench.until("live")
        assert len(bench.servers) == 2
        assert await bench.answer() == ("tuned", answer_of(TUNED))


async def test_what_an_engine_was_off_by_is_what_the_next_weights_may_be_off_by(tmp_path: Path) -> None:
    """In float32 the type's tolerance would pass a policy with a tensor wrong."""
    bench = Bench(tmp_path, dtype="float32")
    bench.registry.register(write_checkpoint(bench.directory / "near", "near", 2.0, canary_weight=2.0 + 2**-20))
    async with bench.running():
        with pytest.raises(SwapError, match=r"a log-prob differs by 0\.00011, and the tolerance is 1e-05"):
            await bench.swap("policy", "near")


async def test_where_the_old_weights_cannot_be_asked_they_are_live_as_before(bench: Bench) -> None:
    async with bench.running():
        bench.server.faults = ["500"]
        with pytest.raises(SwapError, match=r"/v1/chat/completions with 500.*base is live as before"):
            await bench.swap("policy", "tuned")
        assert "reload tuned" not in bench.server.calls
        assert await bench.answer() == ("base", answer_of(BASE))


async def test_a_base_without_canary_is_brought_back_by_how_it_answered_the_others(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    forget_canary(tmp_path)
    bench.registry.register(write_checkpoint(bench.directory / "liar", "liar", 3.0, canary_weight=4.0))
    async with bench.running():
        bench.server.reloads_base_as = FAR
        with pytest.raises(SwapError, match=r"brought back.*base does not answer the canary of liar as it did"):
            await bench.swap("policy", "liar")
        await bench.until("live")
        assert len(bench.servers) == 2


async def test_other_shapes_are_refused_before_anything_stops(tmp_path: Path) -> None:
    bench = Bench(tmp_path, swap="reload")
    bench.registry.register(write_checkpoint(bench.directory / "wide", "wide", 3.0, shape=2))
    async with bench.running():
        with pytest.raises(SwapError, match="another shape"):
            await bench.swap("policy", "wide")
        assert not any(call.startswith("reload") for call in bench.server.calls)
        assert bench.admission.phase == "live"


async def test_a_server_that_dies_comes_back_with_what_should_be_live(bench: Bench) -> None:
    async with bench.running():
        await bench.swap("policy", "tuned")
        bench.server.died.set()
        await bench.until("loading")
        with pytest.raises(ServerError, match="no checkpoint is live"):
            await bench.answer()
        await bench.until("live")
        assert bench.server.checkpoint.ref.name == "tuned"
        assert await bench.answer() == ("tuned", answer_of(TUNED))
        assert bench.replica.num_restarts == 1


async def test_a_restart_that_fails_is_tried_again(bench: Bench) -> None:
    async with bench.running():

        def fail_twice(server: FakeVllm) -> None:
            server.fail_start = "no memory" if len(bench.servers) in (2, 3) else ""

        bench.prepare = fail_twice
        bench.server.died.set()
        await bench.until("loading")
        await bench.until("live")
        assert len(bench.servers) == 4


async def test_a_checkpoint_that_is_gone_is_replaced_by_the_base_aloud(bench: Bench) -> None:
    bench.registry.set_live("policy", "tuned")
    (bench.directory / "tuned" / "model.safetensors").write_bytes(b"")
    async with bench.running():
        assert (await bench.answer(model="base"))[0] == "base"
        assert any("base is served instead of tuned" in warning for warning in bench.fleet.warnings)


async def test_a_server_that_answers_the_canary_otherwise_never_goes_live(bench: Bench) -> None:
    def spoil(server: FakeVllm) -> None:
        start = server.start

        async def start_with_other_weights(progress: object) -> None:
            await start(progress)
            server.weight = 7.0

        server.start = start_with_other_weights  # type: ignore[method-assign]

    bench.prepare = spoil
    with pytest.raises(ServerError, match=r"does not answer the canary as base should.*serve\.dtype"):
        async with bench.running():
            pass


async def test_a_first_start_that_fails_says_so_and_ends(bench: Bench) -> None:
    bench.prepare = lambda server: setattr(server, "fail_start", "vLLM ended with status 1")
    with pytest.raises(ServerError, match="status 1"):
        async with bench.running():
            pass


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"shape": 2}, "1 tensors are of another shape"),
        ({"bytes": b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"}, "not a whole safetensors file"),
        ({"bytes": b""}, "not a whole safetensors file"),
    ],
)
def test_what_cannot_be_loaded_in_place_is_refused_first(
    tmp_path: Path, weights: dict[str, object], message: str
) -> None:
    registry = Registry(tmp_path / "run")
    live = registry.register(write_checkpoint(tmp_path / "live", "live", 1.0))
    directory = write_checkpoint(tmp_path / "new", "new", 2.0, shape=weights.get("shape", 1))
    target = registry.register(directory)
    if "bytes" in weights:
        (directory / "model.safetensors").write_bytes(weights["bytes"])
    with pytest.raises(SwapError, match=message):
        check_reloadable(live, target)


def forget_canary(directory: Path) -> None:
    path = directory / "run" / "checkpoints" / "registry.json"
    content = json.loads(path.read_text())
    content["checkpoints"]["base"]["manifest"]["canary"] = None
    path.write_text(json.dumps(content))


async def test_a_base_without_canary_is_served_with_a_warning(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    forget_canary(tmp_path)
    async with bench.running():
        assert any("base has no canary" in warning for warning in bench.fleet.warnings)
        await bench.swap("policy", "tuned")
        num_warnings = len(bench.fleet.warnings)
        await bench.swap("policy", "base")
        assert await bench.answer() == ("base", answer_of(BASE))
        assert len(bench.fleet.warnings) == num_warnings + 1


def test_the_canary_compares_tokens_then_logprobs() -> None:
    canary = make_canary(1.0)

    def difference(
        tokens: tuple[int, ...] = canary.tokens,
        logprobs: tuple[float, ...] = canary.logprobs,
        prompt_tokens: tuple[int, ...] = canary.prompt_tokens,
    ) -> str | None:
        return explain_difference(canary, CanaryAnswer(prompt_tokens, tokens, logprobs), 1e-3)

    assert difference() is None
    assert difference(logprobs=tuple(value + 9e-4 for value in canary.logprobs)) is None
    assert "0.002" in str(difference(logprobs=(*canary.logprobs[:-1], canary.logprobs[-1] - 2e-3)))
    assert "token 2 of the answer is 8, and 7 in the manifest" in str(difference(tokens=(7, 8, 7)))
    assert "2 tokens came" in str(difference(canary.tokens[:2], canary.logprobs[:2]))
    assert "inf" in str(difference(logprobs=(*canary.logprobs[:-1], float("nan"))))
    longer = str(difference(prompt_tokens=(*canary.prompt_tokens, 5)))
    assert "10 tokens, and it was 9 in training, others from token 10 on" in longer
    assert "others from token 1 on" in str(difference(prompt_tokens=(5, *canary.prompt_tokens[1:])))


@pytest.mark.parametrize(
    ("leads", "tolerance", "num_asked"),
    [
        ((1.0, 1.0, 1.0), 1e-3, 3),
        ((1.0, 0.1, 1.0), 0.04, 3),
        ((1.0, 0.1, 1.0), 0.06, 2),
        ((0.1, 1.0, 1.0), 0.06, 1),
        ((0.0, 0.0, 0.0), 1e-3, 1),
    ],
)
def test_the_canary_ends_where_rounding_may_exchange_tokens(
    leads: tuple[float, ...], tolerance: float, num_asked: int
) -> None:
    """The type that vLLM computes in sets the tolerance, and so how long an answer is comparable."""
    canary = make_canary(1.0).model_copy(update={"leads": leads, "logprobs": (-1.0, -2.0, -3.0)})
    assert canary_request(canary, "vcot", tolerance)["max_tokens"] == num_asked
    is_doubtful = not leads[num_asked - 1] > 2 * tolerance
    other = (*canary.tokens[: num_asked - 1], 8)

    def difference(tokens: tuple[int, ...], last_is_off_by: float) -> str | None:
        logprobs = (*canary.logprobs[: num_asked - 1], canary.logprobs[num_asked - 1] + last_is_off_by)
        return explain_difference(canary, CanaryAnswer(canary.prompt_tokens, tokens, logprobs), tolerance)

    assert difference(canary.tokens[:num_asked], 0.9 * tolerance) is None
    assert (difference(other, 0.9 * tolerance) is None) == is_doubtful, "the runner-up may come instead, and only there"
    assert "differs by" in str(difference(canary.tokens[:num_asked], 1.1 * tolerance))


@pytest.mark.parametrize("salt", [None, "new"])
def test_the_canary_is_asked_with_its_image_and_prompt_greedily_and_past_the_answer_s_end(salt: str | None) -> None:
    canary = make_canary(1.0)
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{canary.image_png_base64}"}}
    assert canary_request(canary, "vcot", 1e-3, salt) == {
        "model": "vcot",
        "messages": [{"role": "user", "content": [image, {"type": "text", "text": canary.prompt}]}],
        "temperature": 0.0,
        "max_tokens": 3,
        "ignore_eos": True,
        "logprobs": True,
        "return_token_ids": True,
        **({"cache_salt": "new"} if salt else {}),
    }


@pytest.mark.parametrize(
    ("prompt_tokens", "num_prompts"), [((*[9] * 100, 1, 2, 3, 4, 5), 57), ((9, 9), 281), ((9, *range(100, 380)), 2)]
)
def test_a_long_question_fills_two_blocks_of_128_tokens_and_some_without_an_image(
    prompt_tokens: tuple[int, ...], num_prompts: int
) -> None:
    canary = make_canary(1.0).model_copy(update={"prompt": "What?", "prompt_tokens": prompt_tokens})
    text = "\n".join(["What?"] * num_prompts)
    messages = [{"role": "user", "content": text}]
    assert long_request(canary, "vcot") == {"model": "vcot", "messages": messages, "temperature": 0.0, "max_tokens": 1}


@pytest.mark.parametrize(
    ("tokens", "logprobs", "is_alike"),
    [
        ((7, 7, 7), (-1.0, -2.5, -3.0), True),  # twice the tolerance
        ((7, 7, 7), (-1.0, -2.625, -3.0), False),
        ((7, 7, 7), (-1.0, -2.0, -3.625), False),
        ((7, 8, 7), (-1.0, -2.0, -9.0), True),  # from where they part they answer different texts
        ((7, 8, 7), (-1.0, -9.0, -3.0), False),
        ((7, 7, 7), (-1.0, float("nan"), -3.0), False),
        ((7, 7), (-1.0, -2.0), True),
        ((7, 7), (-1.0, -9.0), False),
    ],
)
def test_two_answers_agree_up_to_where_they_part(
    tokens: tuple[int, ...], logprobs: tuple[float, ...], is_alike: bool
) -> None:
    one = CanaryAnswer((1,), (7, 7, 7), (-1.0, -2.0, -3.0))
    assert agree(one, CanaryAnswer((1,), tokens, logprobs), 0.25) == is_alike


@pytest.mark.parametrize(("dtype", "is_served"), [("float32", False), ("float16", True)])
async def test_the_tolerance_is_that_of_the_type_that_is_served_now(
    tmp_path: Path, dtype: str, is_served: bool
) -> None:
    """One manifest serves for all types, so that a begun run may change serve.dtype."""
    bench = Bench(tmp_path, dtype=dtype)

    def round_off(server: FakeVllm) -> None:
        start = server.start

        async def start_rounded(progress: object) -> None:
            await start(progress)
            server.weight += 1e-4  # 0.011 in a log-prob

        server.start = start_rounded  # type: ignore[method-assign]

    bench.prepare = round_off
    if is_served:
        async with bench.running():
            assert bench.admission.phase == "live"
    else:
        with pytest.raises(ServerError, match=r"differs by 0\.011, and the tolerance is 0\.001"):
            async with bench.running():
                raise AssertionError


async def test_a_server_that_reads_another_prompt_takes_no_request(bench: Bench) -> None:
    """A line break more behind the image, say: in 16 bits no log-prob would tell."""
    bench.prepare = lambda server: setattr(server, "prompt_tokens", tuple(range(10)))
    with pytest.raises(ServerError, match="another chat template or image processor"):
        async with bench.running():
            raise AssertionError


def test_an_answer_without_logprobs_or_token_ids_is_no_canary() -> None:
    step = {"token": "yes", "logprob": -1.0}
    for payload in (
        {},
        {"choices": []},
        {"choices": [{"logprobs": None, "token_ids": [7]}], "prompt_token_ids": [1]},
        {"choices": [{"logprobs": {"content": [step]}}], "prompt_token_ids": [1]},
        {"choices": [{"logprobs": {"content": [step]}, "token_ids": [7, 7]}], "prompt_token_ids": [1]},
        {"choices": [{"logprobs": {"content": [step]}, "token_ids": [7]}]},
    ):
        with pytest.raises(ServerError, match="no log-probs"):
            parse_canary(payload)


def test_a_swap_cannot_begin_with_requests_in_flight(bench: Bench) -> None:
    admission, digest = Admission(), bench.base.ref.digest
    admission.move("live", "", bench.base)
    admission.admit(digest)
    with pytest.raises(RuntimeError, match="no request"):
        admission.admit(bench.tuned.ref.digest)
    admission.move("draining", "")
    with pytest.raises(RuntimeError, match="1 requests in flight"):
        admission.move("swapping", "")
    admission.leave(digest)
    admission.move("swapping", "")
    for wrong in ("loading", "draining", "swapping"):
        with pytest.raises(RuntimeError, match="cannot go"):
            admission.move(wrong, "")
    with pytest.raises(RuntimeError):
        admission.admit(digest)
    with pytest.raises(RuntimeError):
        admission.leave(digest)


async def test_a_swap_while_nothing_is_live_is_refused(bench: Bench) -> None:
    with pytest.raises(VcotError, match="no checkpoint is live"):
        await bench.swap("policy", "tuned")
