"""The memory estimate, held against the library's own parameter counts and against what autograd keeps."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from vcot.pipeline.errors import CheckpointError
from vcot.services.recipes.recipe import load_recipe
from vcot.training.protocol.memory import estimate_memory, kept_per_token
from vcot.training.protocol.shape import Stack, find_shape, parse_shape, read_shape

LLAVA_7B = json.loads(find_shape("llava-hf/llava-1.5-7b-hf").read_text())
QWEN_72B = json.loads(find_shape("Qwen/Qwen2.5-VL-72B-Instruct").read_text())


def estimate(*overrides, longest=1856, config=LLAVA_7B):
    return estimate_memory(parse_shape(config), load_recipe("paper", overrides).train, longest)


PUBLISHED = {
    "llava-hf/llava-1.5-7b-hf": 7.06e9,
    "llava-hf/llava-1.5-13b-hf": 13.35e9,
    "Qwen/Qwen2-VL-72B-Instruct": 73.4e9,
    "Qwen/Qwen2.5-VL-72B-Instruct": 73.4e9,
}
"""Parameters, as the hub counts them in the published weights."""


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_parameters_are_those_that_are_published_and_that_the_library_counts(hub_id):
    config = json.loads(find_shape(hub_id).read_text())
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
        adapted = get_peft_model(model, LoraConfig(r=64, target_modules="all-linear"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    shape = parse_shape(config)
    assert shape.num_adapter_parameters(64, all_linear=True) == trained
    assert shape.num_parameters == pytest.approx(sum(p.numel() for p in model.parameters()) - trained, rel=1e-3)
    assert shape.num_parameters == pytest.approx(PUBLISHED[hub_id], rel=0.01)


def test_images_are_counted_by_the_tower():
    shape = parse_shape(LLAVA_7B)
    assert (shape.num_image_tokens(672), shape.num_patches(672)) == (576, 577)
    assert shape.num_adapter_parameters(64, all_linear=True) == 189_071_360
    qwen = parse_shape(QWEN_72B)
    assert (qwen.num_image_tokens(672), qwen.num_image_tokens(336), qwen.num_patches(672)) == (576, 144, 2305)
    fixed = parse_shape(LLAVA_7B | {"mm_tokens_per_image": 256})
    assert fixed.num_image_tokens(672) == 256
    assert find_shape("someone/else") is None


def test_the_papers_recipe_fits_40_gb_at_7b():
    typical, longest = estimate(), estimate(longest=4096)
    assert typical.total < longest.total < 40e9 / 2**30
    assert typical.weights == pytest.approx(7.06e9 * 2 / 2**30, rel=0.01)
    assert typical.adapter == pytest.approx(189e6 * 16 / 2**30, rel=0.01)
    assert estimate("train.gradient_checkpointing=false").total > 80


def test_what_spreads_and_what_does_not():
    alone, ddp = estimate(), estimate("train.num_processes=4")
    assert ddp.weights == alone.weights
    assert ddp.adapter == pytest.approx(alone.adapter * 20 / 16)
    fsdp = estimate("train.num_processes=4", "train.accelerate_config=fsdp")
    assert (fsdp.weights, fsdp.adapter) == (alone.weights / 4, alone.adapter)
    zero3 = estimate("train.num_processes=4", "train.accelerate_config=zero3")
    assert (zero3.weights, zero3.adapter) == (alone.weights / 4, alone.adapter / 4)
    zero2 = estimate("train.num_processes=4", "train.accelerate_config=zero2")
    assert zero2.weights == alone.weights
    assert zero3.adapter < zero2.adapter < alone.adapter


def test_a_large_model_fits_where_it_is_spread_and_a_layer_is_whole_for_a_while():
    flags = ("train.num_processes=8", "train.accelerate_config=fsdp", "train.gradient_accumulation=1")
    alone, spread = estimate("train.batch_size=1", config=QWEN_72B), estimate(*flags, config=QWEN_72B)
    assert alone.weights == pytest.approx(73.4e9 * 2 / 2**30, rel=0.01)
    assert spread.weights == alone.weights / 8
    layer, head, tower = 877_658_112, 152_064 * 8192, 0.70e9
    assert spread.gathered == pytest.approx((2 * layer + head + tower) * 2 / 2**30, rel=0.01)
    assert alone.gathered == 0
    assert spread.total < 79.1 < alone.least


def test_between_surely_and_surely_not_lies_perhaps():
    found = estimate()
    assert found.least == pytest.approx(found.weights + found.adapter + 0.5 + 4.53, abs=0.1)
    verdicts = [found.judge(free) for free in (found.total, found.total - 0.1, found.least, found.least - 0.1)]
    assert verdicts == ["fits", "close", "close", "too_large"]


def test_a_base_in_4_bits_is_little_more_than_a_quarter_where_it_is_linear():
    full, packed = estimate(), estimate("train.base_weights=nf4")
    embeddings = 2 * 32_064 * 4096 * 2 / 2**30
    assert packed.weights - embeddings == pytest.approx((full.weights - embeddings) * 4.127 / 16, rel=1e-3)
    assert packed.total - packed.weights == pytest.approx(full.total - full.weights)


def count_kept(num_layers, dtype, dropout, tokens=256):
    """Bytes that autograd keeps for the backward pass, weights and their casts left out of the growth per token."""
    config = LlamaConfig(
        hidden_size=128, intermediate_size=320, num_hidden_layers=num_layers, num_attention_heads=4, vocab_size=64
    )
    model = LlamaForCausalLM(config).to(dtype)
    model = get_peft_model(model, LoraConfig(r=2, lora_dropout=dropout, target_modules="all-linear")).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        model.base_model.model.model(torch.zeros(1, tokens, dtype=torch.long))
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_layer_keeps_what_autograd_keeps(dtype, dropout):
    """Twice the tokens, less once, and three layers, less two: one layer's cost of a token."""
    measured = [
        count_kept(layers, getattr(torch, dtype), dropout, tokens) for layers in (2, 3) for tokens in (128, 256)
    ]
    per_token = ((measured[3] - measured[1]) - (measured[2] - measured[0])) / 128
    expected = kept_per_token(Stack(128, 320, 3, 128, 3), dtype, dropout=dropout > 0)
    assert per_token == pytest.approx(expected, rel=0.1)


def test_other_files_are_named(tmp_path):
    for text in ("{", '{"model_type": "llama"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="describes no vision-language model"):
            read_shape(tmp_path / "config.json")
