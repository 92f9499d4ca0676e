"""Weight files are rewritten tensor by tensor: the same names, order and index, and never more than one tensor in memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vcot.training.model.weights import Cast, rewrite_weights, stored_dtypes, tensor_shapes, write_tensors

TENSORS = {
    "b.weight": torch.arange(6.0).reshape(2, 3),
    "a.weight": torch.full((3, 1), 1.001).bfloat16(),
    "scale": torch.tensor(2.5),
    "ids": torch.arange(3),
}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    save_file(TENSORS, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    return tmp_path / "source"


def test_nothing_changed_is_the_same_file(source):
    target = source.with_name("target")
    rewrite_weights(source, target, Cast())
    read = load_file(target / "model.safetensors")
    assert set(read) == set(TENSORS)
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    with safe_open(source / "model.safetensors", "pt") as old, safe_open(target / "model.safetensors", "pt") as new:
        assert (new.metadata(), new.offset_keys()) == (old.metadata(), old.offset_keys())


def test_numbers_are_cast_and_whole_numbers_are_not(source):
    target = source.with_name("target")
    rewrite_weights(source, target, Cast(("bfloat16",)), lambda name, tensor: tensor + 1 if name == "scale" else tensor)
    read = load_file(target / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in read.items()} == {
        name: torch.int64 if name == "ids" else torch.bfloat16 for name in TENSORS
    }
    assert read["scale"] == 3.5
    assert stored_dtypes(target) == {"bfloat16", "float32"}, "a type that is no float's counts as the widest"


def test_a_cast_rounds_what_it_cannot_hold():
    assert Cast(("bfloat16",)).rounds({"float32"})
    assert Cast(("float16",)).rounds({"bfloat16"}), "its range is smaller"
    assert not Cast(("float32",)).rounds({"bfloat16", "float16"})
    assert not Cast(("bfloat16",)).rounds({"bfloat16"})
    assert Cast(("float16", "bfloat16"))(torch.tensor(1.0 + 2**-9)).dtype == torch.bfloat16


def test_small_files_are_written_alike(tmp_path):
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != "ids"}
    write_tensors(tmp_path / "a.safetensors", tensors)
    read = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert tensor_shapes(tmp_path)["b.weight"] == (2, 3)


MERGE = """
import resource, sys
from pathlib import Path
import torch
from vcot.training.merge.export import read_adapter, write_merged
from vcot.training.model.weights import Cast

torch.set_num_threads(1)
base, adapter, out = map(Path, sys.argv[1:])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
named = read_adapter(base, adapter)
print(peak() - before, write_merged(base, named, Cast(("float32",)), None, out), peak() - before)
"""


def save_large(directory, num_shards):
    """A LLaVA of half a GB, all zeros, and an adapter for its decoder's first layer; returns the checkpoint's size."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=14, vocab_size=2000)
    tower = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = LlavaConfig(text_config=text, vision_config=tower)
    config.architectures = ["LlavaForConditionalGeneration"]
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlavaForConditionalGeneration(config).state_dict().items()}
    base, adapter = directory / "base", directory / "adapter"
    for folder in (base, adapter, directory / "out"):
        folder.mkdir()
    config.save_pretrained(base)
    weight_map = {name: f"model-{i % num_shards}.safetensors" for i, name in enumerate(sorted(shapes))}
    for file in sorted(set(weight_map.values())):
        tensors = {name: torch.zeros(shapes[name]).half() for name in shapes if weight_map[name] == file}
        save_file(tensors, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    modules = [
        name.removesuffix(".weight") for name in shapes if ".language_model.layers.0." in name and "proj" in name
    ]
    matrices = {}
    for module in modules:
        high, wide = shapes[f"{module}.weight"]
        matrices |= {f"base_model.model.{module}.lora_A.weight": torch.ones(2, wide)}
        matrices |= {f"base_model.model.{module}.lora_B.weight": torch.ones(high, 2)}
    save_file(matrices, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 3}))
    return sum(file.stat().st_size for file in base.glob("*.safetensors"))


@pytest.mark.slow
def test_a_merge_takes_a_small_part_of_the_checkpoints_memory(tmp_path):
    """One file's pages and one tensor, where all of it in the merged type would take twice the size of its files."""
    size = save_large(tmp_path, 6)
    command = [sys.executable, "-c", MERGE, *(str(tmp_path / name) for name in ("base", "adapter", "out"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    _, num_changed, peak = map(int, done.stdout.split())
    assert num_changed == 7
    assert peak < size // 3
    assert stored_dtypes(tmp_path / "out") == {"float32"}
    with safe_open(tmp_path / "out" / "model-0.safetensors", "pt") as file:
        assert {float(file.get_tensor(name).max()) for name in file.offset_keys()} <= {0.0, 3.0}
