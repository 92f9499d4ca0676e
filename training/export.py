"""Base + adapter as files that vLLM loads: the base's own tensor names, one dtype, and what goes with weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import GenerationConfig

from pipeline.errors import CheckpointError
from training.models import Model
from training.template import Processor


def attach_adapter(base: Model, adapter: Path) -> Model:
    """`base` with the trained adapter on it, in evaluation mode; it becomes part of `base` until merged."""
    return PeftModel.from_pretrained(base, adapter).eval()


def write_merged(policy: Model, processor: Processor, dtype: torch.dtype, out: Path) -> None:
    """Merge the adapter into its base (in the base's dtype) and write everything that serving needs, in `dtype`.

    The generation config keeps the token ids and nothing else: vLLM would take sampling defaults from it.
    """
    merged = policy.merge_and_unload().to(dtype)
    ids = merged.generation_config
    merged.generation_config = GenerationConfig(
        bos_token_id=ids.bos_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id
    )
    merged.save_pretrained(out)
    processor.save_pretrained(out)


def count_changed_tensors(base: Path, merged: Path) -> int:
    """Tensors of `merged` that differ from the base's in the merged dtype.

    Raises CheckpointError for a name that the base does not have: vLLM loads the base's names, and would drop it.
    """
    shards = {name: shard for shard in base.glob("*.safetensors") for name in _names(shard)}
    changed = 0
    for name, tensor in _tensors(merged):
        if name not in shards:
            raise CheckpointError(
                f"merged weights name {name!r}, which base {base} does not have; vLLM would not load it"
            )
        with safe_open(shards[name], "pt") as file:
            changed += not torch.equal(file.get_tensor(name).to(tensor.dtype), tensor)
    return changed


def stored_dtypes(directory: Path) -> set[torch.dtype]:
    """The dtypes that the checkpoint's weights are written in."""
    return {tensor.dtype for _, tensor in _tensors(directory)}


def _names(shard: Path) -> list[str]:
    with safe_open(shard, "pt") as file:
        return list(file.keys())


def _tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name)
