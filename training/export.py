"""Base + adapter as files that vLLM loads, merged or apart, always under the tensor names of the base's own files.

vLLM maps those names to its modules, whatever the architecture, and drops without a word what it cannot map: a merged
tensor or an adapter's module that the base's files do not name is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig
from transformers.core_model_loading import revert_weight_conversion

from pipeline.errors import CheckpointError
from pipeline.recipe import Dtype
from training.models import Model
from training.template import Processor

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAMES: dict[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""As safetensors calls them."""


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


def write_adapter(policy: Model, base: Path, adapter: Path, out: Path) -> None:
    """Write the adapter alone to `out`, its modules named as in the files of `base`.

    Raises CheckpointError for a module that those files do not name.
    """
    known = set(_shards(base))
    renamed = {}
    for key, tensor in load_file(adapter / _WEIGHTS).items():
        module, part = key.removeprefix(_PREFIX).rsplit(".lora_", 1)
        names = list(revert_weight_conversion(policy.base_model.model, {f"{module}.weight": tensor}))
        if not key.startswith(_PREFIX) or len(names) != 1 or names[0] not in known:
            raise CheckpointError(
                f"adapter {adapter} adapts {module!r}, which the files of base {base} do not name; vLLM would drop it: "
                "train other modules, or serve it merged"
            )
        renamed[f"{_PREFIX}{names[0].removesuffix('.weight')}.lora_{part}"] = tensor
    save_file(renamed, out / _WEIGHTS, {"format": "pt"})
    config = json.loads((adapter / _CONFIG).read_text("utf-8")) | {"base_model_name_or_path": None}
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # PEFT writes a set, in no order: the digest would change with it
    (out / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def is_served_exactly(policy: Model) -> bool:
    """Whether vLLM applies the whole adapter: it takes the language model's part, and drops tower and projector."""
    decoder = {id(module) for module in policy.base_model.model.get_decoder().modules()}
    return all(id(module) in decoder for module in policy.modules() if hasattr(module, "lora_B"))


def count_learned_tensors(adapter: Path) -> int:
    """Matrices of the adapter that training moved from their zero."""
    tensors = load_file(adapter / _WEIGHTS)
    return sum(bool(tensor.any()) for name, tensor in tensors.items() if ".lora_B." in name)


def count_changed_tensors(base: Path, merged: Path) -> int:
    """Tensors of `merged` that differ from the base's in the merged dtype.

    Raises CheckpointError for a name that the base does not have: vLLM loads the base's names, and would drop it.
    """
    shards = _shards(base)
    changed = 0
    for name, tensor in _tensors(merged):
        if name not in shards:
            raise CheckpointError(
                f"merged weights name {name!r}, which base {base} does not have; vLLM would not load it"
            )
        with safe_open(shards[name], "pt") as file:
            changed += not torch.equal(file.get_tensor(name).to(tensor.dtype), tensor)
    return changed


def stored_dtypes(directory: Path) -> set[Dtype]:
    """The types that the checkpoint's weights are written in; a packed type counts as float32, which holds any."""
    dtypes: set[Dtype] = set()
    for shard in directory.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            dtypes |= {_NAMES.get(file.get_slice(name).get_dtype(), "float32") for name in file.keys()}  # noqa: SIM118
    return dtypes


def _shards(directory: Path) -> dict[str, Path]:
    """The file of each tensor."""
    return {name: shard for shard in directory.glob("*.safetensors") for name in _names(shard)}


def _names(shard: Path) -> list[str]:
    with safe_open(shard, "pt") as file:
        return list(file.keys())


def _tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name)
