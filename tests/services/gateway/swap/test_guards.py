"""What a swap is verified by: for each kind of fault the guard that sees it, and that a right checkpoint passes."""

import hashlib
import os
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.services.bench_fleet import BASE, TUNED, Bench, answer_of
from tests.services.fake_vllm import FakeVllm, read_weight, write_checkpoint
from vcot.pipeline.errors import CheckpointError, SwapError
from vcot.pipeline.identity import compute_digest
from vcot.pipeline.manifest import CheckpointManifest
from vcot.pipeline.records import CheckpointRef
from vcot.services.checkpoints.registry import Checkpoint, Registry
from vcot.services.gateway.swap.calibration import Calibration
from vcot.services.gateway.swap.fingerprint import Fingerprint, Layout, Tensor, check_unchanged, read_fingerprint


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, dtype="float32")


async def expect_refused(bench: Bench, message: str, name: str = "tuned") -> None:
    with pytest.raises((SwapError, CheckpointError), match=message):
        await bench.swap("policy", name)
    assert await bench.answer() == ("base", answer_of(BASE))
    assert bench.registry.live() == "base"


def garble(directory: Path, value: bytes) -> None:
    """Change the last bytes in place, and keep the file's own time, as a copy may."""
    path = directory / "model.safetensors"
    times = path.stat()
    path.write_bytes(path.read_bytes()[: -len(value)] + value)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


async def test_a_file_that_was_changed_and_kept_its_time_is_refused_before_anything_stops(bench: Bench) -> None:
    async with bench.running():
        garble(bench.tuned.directory, b"\0\0\0\0")
        await expect_refused(bench, "its files were changed")
        assert "reload tuned" not in bench.server.calls


async def test_a_file_that_is_changed_while_it_is_loaded_is_refused(bench: Bench) -> None:
    """Between its verification and the engine's look at it; what comes back is the same again."""
    async with bench.running():
        path = bench.tuned.directory / "model.safetensors"

        def write_too(directory: Path) -> float:
            if directory == bench.tuned.directory:
                path.write_bytes(path.read_bytes())
                return TUNED
            return BASE

        bench.server.read = write_too
        await expect_refused(bench, r"model\.safetensors in .* was changed while tuned was loaded")
        bench.server.read = read_weight
        await bench.swap("policy", "tuned")


async def test_a_tensor_that_no_answer_shows_is_seen_by_what_the_engine_says_that_it_holds(bench: Bench) -> None:
    async with bench.running():
        bench.server.garbled = 7.0
        with pytest.raises(
            SwapError, match=r"could not be brought back.*1 tensors in the engine are not the files' \(w\)"
        ):
            await bench.swap("policy", "tuned")
        await bench.until_so(lambda: bench.admission.phase == "live" and len(bench.servers) == 2)
        await bench.swap("policy", "tuned")


async def test_a_server_that_is_started_with_other_tensors_never_goes_live(bench: Bench) -> None:
    async with bench.running():
        bench.prepare = lambda server: setattr(server, "garbled", 7.0 if len(bench.servers) == 2 else None)
        bench.server.died.set()
        await bench.until_so(lambda: len(bench.servers) == 3 and bench.admission.phase == "live")
        assert any("tensors in the engine are not the files'" in line for line in bench.said)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"garbled": 7.0}, "tensors in the engine are not the files'"),
        ({"prompt_tokens": (1, 2)}, "another chat template or image processor"),
        ({"wrong_start": True}, "does not answer the canary as tuned should"),
    ],
)
async def test_a_server_of_its_own_that_is_not_the_checkpoint_does_not_take_over(
    tmp_path: Path, fault: dict[str, object], message: str
) -> None:
    """The way `replica`."""
    bench = Bench(tmp_path, dtype="float32", swap="replica")
    async with bench.running():

        def spoil(server: FakeVllm) -> None:
            for name, value in fault.items():
                setattr(server, name, value)
            if "wrong_start" in fault:
                server.checkpoint = bench.base
                server.start = partial(_start_as, server, server.start, bench.tuned)  # type: ignore[method-assign]

        bench.prepare = spoil
        await expect_refused(bench, message)
        bench.prepare = lambda _: None
        assert (await bench.swap("policy", "tuned")).way == "replica"
        assert await bench.answer() == ("tuned", answer_of(TUNED))


async def _start_as(
    server: FakeVllm, start: Callable[[object], Awaitable[None]], said: Checkpoint, say: object
) -> None:
    """Start with the weights that it has, and say that it was with others."""
    await start(say)
    server.checkpoint = said


async def test_a_prefix_cache_that_says_it_was_reset_and_was_not_is_no_swap(bench: Bench) -> None:
    async with bench.running():
        bench.server.keeps_prefixes = True
        with pytest.raises(SwapError, match="prefix cache still holds what the old weights computed"):
            await bench.swap("policy", "tuned")


@pytest.mark.parametrize(("off_by", "is_served"), [(2e-6, True), (2e-4, False)])
async def test_a_canary_is_held_to_what_such_an_engine_was_off_by(
    tmp_path: Path, off_by: float, is_served: bool
) -> None:
    """The type's tolerance is 1e-3, for any model; this one was exact so far."""
    bench = Bench(tmp_path, dtype="float32")
    weight = 3.0
    path = write_checkpoint(tmp_path / "near", "near", weight, canary_weight=weight + off_by / 111)
    bench.registry.register(path)
    async with bench.running():
        if is_served:
            await bench.swap("policy", "near")
        else:
            await expect_refused(bench, "a log-prob differs by 0.0002, and the tolerance is 1e-05", "near")


def test_the_first_verified_answer_sets_the_tolerance() -> None:
    exact, half = Calibration("float32"), Calibration("bfloat16")
    assert (exact.tolerance, half.tolerance) == (1e-3, 0.15)
    exact.saw(3e-6)
    exact.saw(9e-4)  # one that passed and should not have: no other passes for it
    half.saw(3e-6)
    assert exact.tolerance == pytest.approx(1.2e-5)
    assert half.tolerance == 0.15
    quiet, deep = Calibration("float32"), Calibration("float32")
    quiet.saw(0.0)
    deep.saw(5e-4)
    assert (quiet.tolerance, deep.tolerance) == (1e-5, 1e-3)


async def test_what_a_refused_adapter_computed_does_not_answer_for_the_right_one(bench: Bench) -> None:
    """The same name and path: vLLM's prefix cache outlives an unloaded adapter."""
    bench.adapter("light", 0.5)
    async with bench.running():
        bench.server.ignores_adapters = True
        with pytest.raises(SwapError, match="canary"):
            await bench.swap("policy", "light")
        bench.server.ignores_adapters = False
        bench.server.images.clear()
        await bench.swap("policy", "light")
        assert await bench.answer() == ("light", answer_of(BASE + 0.5))


async def test_an_adapter_that_is_changed_while_it_is_loaded_is_refused(bench: Bench) -> None:
    adapter = bench.adapter("light", 0.5)
    served = bench.registry.served_folder / adapter.ref.digest.removeprefix("sha256:")

    def change() -> None:
        path = served / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")

    async with bench.running():
        bench.server.after_load = change
        await expect_refused(bench, "its files were changed", "light")


# Fingerprints


def checkpoint(directory: Path, tensors: dict[str, Any], save: Callable[..., object] = save_file) -> Checkpoint:
    directory.mkdir(exist_ok=True)
    save(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    ref = CheckpointRef(name="it", digest=compute_digest(directory), kind="merged")
    return Checkpoint(directory, CheckpointManifest(checkpoint=ref))


def sha(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_tensors_go_by_the_names_and_in_the_type_that_an_engine_has_them(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    names = ("a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight", "a.gate_proj.weight", "a.up_proj.weight")
    tensors = {name: draw.normal(size=(4, 4)).astype(np.float32) for name in names}
    tensors["embed_tokens.weight"] = draw.normal(size=(66, 2)).astype(np.float32)
    found = read_fingerprint(checkpoint(tmp_path / "it", tensors), "float32").tensors
    q, k, v, gate, up = (tensors[name].tobytes() for name in names)
    assert found["a.qkv_proj.weight"] == Tensor(192, frozenset({sha(q, k, v)}))
    assert found["a.gate_up_proj.weight"].digests == {sha(gate, up)}
    assert found["a.k_proj.weight"].digests == {sha(k)}
    rows = tensors["embed_tokens.weight"].tobytes()
    assert found["embed_tokens.weight"].digests == {sha(rows), sha(rows, bytes(62 * 8))}
    half = read_fingerprint(checkpoint(tmp_path / "it", tensors), "float16").tensors
    assert half["a.k_proj.weight"].digests == {sha(tensors[names[1]].astype(np.float16).tobytes())}


def test_rounding_to_bfloat16_is_torchs(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = np.concatenate(
        [np.random.default_rng(0).normal(size=1000), [0.0, 1e-40, 3.3895e38, 1.00390625, 1.01171875]]
    ).astype(np.float32)
    found = read_fingerprint(checkpoint(tmp_path / "it", {"w": values}), "bfloat16").tensors["w"]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert found == Tensor(2 * len(values), frozenset({sha(expected)}))


def test_what_is_stored_in_16_bits_is_widened_for_an_engine_that_computes_in_32(tmp_path: Path) -> None:
    torch, save_of_torch = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch").save_file
    values = torch.linspace(-3, 3, 65)
    stored = {"half": values.to(torch.float16), "brain": values.to(torch.bfloat16)}
    found = read_fingerprint(checkpoint(tmp_path / "it", stored, save=save_of_torch), "float32").tensors
    for name, tensor in stored.items():
        assert found[name].digests == {sha(tensor.to(torch.float32).numpy().tobytes())}, name


def test_a_layer_with_an_adapter_is_known_by_its_own_name() -> None:
    of = Fingerprint((), {"a.q_proj.weight": Tensor(4, frozenset({"right"}))})
    layout = Layout()
    layout.learn({"tp0:a.q_proj.base_layer.weight": "right"}, of)
    assert "(a.q_proj.weight)" in str(layout.fault({"tp0:a.q_proj.base_layer.weight": "wrong"}, of))


def test_only_what_was_the_files_on_a_verified_engine_is_held_to_them() -> None:
    def of(**tensors: str) -> Fingerprint:
        return Fingerprint((), {name: Tensor(4, frozenset({digest})) for name, digest in tensors.items()})

    def held(**tensors: str) -> dict[str, str]:
        return {f"tp0:{name.replace('__', '.')}": digest for name, digest in tensors.items()}

    layout = Layout()
    layout.learn(held(plain="a", packed="?", empty=sha()), of(plain="a", packed="b", empty="c"))
    assert layout.fault(held(plain="A", packed="?", empty=sha()), of(plain="A", packed="B", empty="C")) is None
    assert "1 tensors in the engine are not the files' (plain)" in str(layout.fault(held(plain="a"), of(plain="A")))
    wide = Fingerprint((), {"plain": Tensor(8, frozenset({"A"}))})
    assert layout.fault(held(plain="a"), wide) is None, "another shape may be stored otherwise"
    sharded = {"tp0:plain": "x", "tp1:plain": "y"}
    assert layout.fault(sharded, of(plain="A")) is None


def test_reading_notices_other_files_than_were_registered(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "run")
    made = registry.register(write_checkpoint(tmp_path / "made", "made", 2.0))
    fingerprint = read_fingerprint(made, "float32")
    check_unchanged(made, fingerprint)
    garble(made.directory, b"\1\2\3\4")
    with pytest.raises(CheckpointError, match=r"model\.safetensors in .* was changed while made was loaded"):
        check_unchanged(made, fingerprint)
    with pytest.raises(CheckpointError, match="its files were changed"):
        read_fingerprint(made, "float32")
    with pytest.raises(CheckpointError, match="its files were changed"):
        registry.verify("made")
