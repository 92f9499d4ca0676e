"""Training on a base in 4 bits (QLoRA), for real on the CPU: what is quantized, what is trained, what leaving it costs."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from safetensors.torch import load_file

from vcot.pipeline.errors import CheckpointError, MachineError
from vcot.services.recipes.recipe import load_recipe
from vcot.training.model.loading import compute_in_float32, load_model
from vcot.training.protocol import agreement, launch
from vcot.training.protocol.job import ADAPTER, MERGE_REPORT, REFERENCE, MergeReport, read_record
from vcot.training.protocol.memory import estimate_memory, weight_bytes
from vcot.training.protocol.shape import find_shape, read_shape
from vcot.training.worker import jobs

NF4 = "train.base_weights=nf4"
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (requirements/gpu.in)"
)


def quantized(model):
    return {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


@needs_bitsandbytes
def test_all_linears_but_lm_head_are_in_4_bits(checkpoint):
    model = load_model(checkpoint, torch.bfloat16, weights="nf4")
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears - quantized(model) == {"lm_head"}
    assert {name.split(".")[1] for name in quantized(model)} == {
        "vision_tower",
        "multi_modal_projector",
        "language_model",
    }
    assert {model.get_submodule(name).weight.dtype for name in quantized(model)} == {torch.uint8}
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}


@needs_bitsandbytes
def test_what_is_asked_in_float32_are_the_weights_that_were_trained_on(checkpoint):
    """Rounded from another type, other weights would come out."""
    trained = load_model(checkpoint, torch.bfloat16, weights="nf4")
    asked = compute_in_float32(load_model(checkpoint, torch.bfloat16, weights="nf4"))
    for name in quantized(trained):
        assert torch.equal(trained.get_submodule(name).weight, asked.get_submodule(name).weight)
    assert torch.equal(trained.lm_head.weight.float(), asked.lm_head.weight)
    ids = torch.arange(8).unsqueeze(0)
    with torch.inference_mode():
        logits = asked(input_ids=ids).logits
        assert logits.dtype == torch.float32
        assert torch.allclose(trained(input_ids=ids).logits.float(), logits, atol=0.02)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trains_on_4_bits_and_merges_into_the_base_itself(dtype, make_job, checkpoint, tmp_path):
    """That the loss starts at log 2 says that the reference, cached, is the same 4-bit base."""
    directory = make_job(NF4, f"train.dtype={dtype}", "train.learning_rate=1e-2", "train.lora_r=4", "merge.dtype=auto")
    jobs.work(directory, tmp_path / "out")
    assert [path.name.split("-", 1)[1] for path in (directory / REFERENCE).iterdir()] == [f"{dtype}-nf4-336.sqlite"]
    adapter = load_file(directory / ADAPTER / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    report = read_record(tmp_path / "out" / MERGE_REPORT, MergeReport)
    assert report.max_abs_logprob < 1e-4, "base + adapter is compared with the merge, not the 4-bit base"
    assert report.retention.error < 1e-3
    assert 1e-3 < report.unquantized.error < agreement.MAX_UNQUANTIZED_LOSS
    base, merged = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in merged.items()} == {name: t.dtype for name, t in base.items()}
    kept = [name for name in base if "norm" in name or "embed_tokens" in name]
    assert all(torch.equal(base[name], merged[name]) for name in kept)


@needs_bitsandbytes
def test_updates_of_adapters_are_not_rounded(build):
    """TRL puts an adapter on 4-bit weights into bfloat16, where an update of a thousandth is lost."""
    trainer, _ = build(NF4, "train.dtype=bfloat16")
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    adapted = [module for module in trainer.model.modules() if hasattr(module, "lora_B")]
    assert {type(module.base_layer).__name__ for module in adapted} == {"Linear4bit"}


@needs_bitsandbytes
def test_an_adapter_that_loses_too_much_on_the_base_itself_is_refused(make_job, tmp_path, monkeypatch):
    directory = make_job(NF4, "train.epochs=1", "train.learning_rate=1e-2", "train.lora_r=4")
    monkeypatch.setattr(agreement, "MAX_UNQUANTIZED_LOSS", 1e-4)
    with pytest.raises(CheckpointError, match=r"trained on the base in 4 bits, with an error of"):
        jobs.work(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_said_before_anything_is_sampled(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(MachineError, match="base_weights = nf4 needs the package bitsandbytes, which is not installed"):
        launch.check_installed(load_recipe("nano", [NF4]).train)


def test_the_papers_recipe_fits_24_gb_on_4_bits():
    shape = read_shape(find_shape("llava-hf/llava-1.5-7b-hf"))
    full, four = (estimate_memory(shape, load_recipe("paper", overrides).train, 1856) for overrides in ([], [NF4]))
    assert four.weights == pytest.approx((6.80e9 * 0.516 + 0.263e9 * 2) / 2**30, rel=0.01)
    assert four.total == pytest.approx(full.total - full.weights + four.weights)
    assert four.total < 24e9 / 2**30 < full.total


@needs_bitsandbytes
def test_bytes_of_a_4_bit_weight_are_those_of_the_library():
    from bitsandbytes.nn import Params4bit

    held = Params4bit(torch.randn(1024, 1024), requires_grad=False, quant_type="nf4").to("cpu")
    state = held.quant_state
    num_bytes = held.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    shape = read_shape(find_shape("llava-hf/llava-1.5-7b-hf"))
    linears = weight_bytes(shape, "bfloat16", "nf4") - 2 * shape.num_embedding_parameters
    per_weight = linears / shape.num_linear_parameters
    assert per_weight == pytest.approx(num_bytes / held.quant_state.shape.numel())
