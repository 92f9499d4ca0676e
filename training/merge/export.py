"""Base + adapter as files that vLLM loads, merged or apart, always under the tensor names of the base's own files.

A merged checkpoint is the base's own files with the adapted tensors changed: whatever reads the base reads it, other
versions of transformers among them, and it is made one tensor at a time. Beside the weights only this differs: the types
that config.json names, where they changed; the generation config, which keeps the token ids and nothing else (vLLM would
take sampling defaults from it); and the chat template, where the base's own had to be mended.

vLLM maps the names of the files to its modules, whatever the architecture, and drops without a word what it cannot map: an
adapter's module that the base's files do not name is refused here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers.core_model_loading import revert_weight_conversion

from vcot.pipeline.errors import CheckpointError
from vcot.pipeline.identity import MANIFEST
from vcot.training.model.loading import Model, load_model
from vcot.training.model.weights import Cast, rewrite_weights, tensor_shapes, write_tensors
from vcot.training.protocol.agreement import PROBE
from vcot.training.protocol.job import MERGE_REPORT

_CONFIG, _WEIGHTS, _GENERATION = "adapter_config.json", "adapter_model.safetensors", "generation_config.json"
_PREFIX = "base_model.model."
_TEMPLATE, _TEMPLATE_KEY = "chat_template.jinja", "chat_template"
_OURS = {MANIFEST, MERGE_REPORT, PROBE, "README.md"}
"""What a checkpoint of ours says of itself."""
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf"}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Adapter:
    """A trained adapter by the tensors of the base's files that it changes."""

    matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    """A (rank, input) and B (output, rank) for the name of each weight."""
    scale: float

    def add(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The base's tensor and the adapter's part of it, in float32."""
        a, b = self.matrices[name]
        return tensor.float() + (b.float() @ a.float()) * self.scale

    @property
    def num_learned(self) -> int:
        """Weights that training moved."""
        return sum(bool(b.any()) for _, b in self.matrices.values())


def attach_adapter(base: Model, adapter: Path) -> Model:
    """`base` with the trained adapter on it, in evaluation mode; it becomes part of `base`.

    Of a base that is spread, PEFT 0.21 would write the files on disk anew, with the adapter in them. So it is not told, and
    each of the adapter's matrices is put where its module takes its inputs.
    """
    spread = getattr(base, "hf_device_map", None)
    if spread is None:
        return PeftModel.from_pretrained(base, adapter).eval()
    del base.hf_device_map
    policy = PeftModel.from_pretrained(base, adapter, torch_device="cpu", low_cpu_mem_usage=True).eval()
    base.hf_device_map = spread
    tensors = load_file(adapter / _WEIGHTS)
    for name, module in policy.named_modules():
        if isinstance(module, LoraLayer):
            place = module.base_layer._hf_hook.execution_device
            shape = (module.out_features, module.in_features)
            in_files = _PREFIX + _file_names(base, name.removeprefix(_PREFIX), shape)[0].removesuffix(".weight")
            own = name if f"{name}.lora_A.weight" in tensors else in_files
            for part in ("lora_A", "lora_B"):
                matrix = getattr(module, part)[policy.active_adapter]
                set_module_tensor_to_device(matrix, "weight", place, tensors[f"{own}.{part}.weight"])
    return policy


def read_adapter(base: Path, adapter: Path) -> Adapter:
    """The adapter that PEFT wrote, its modules named as in the files of `base`; no weight of the base is read.

    Raises CheckpointError for a module that those files do not name.
    """
    shapes, model = tensor_shapes(base), load_model(base, torch.float32, place="nowhere")
    config = json.loads((adapter / _CONFIG).read_text("utf-8"))
    tensors = load_file(adapter / _WEIGHTS)
    matrices = {}
    for key in sorted(tensors):
        module, part = key.removeprefix(_PREFIX).rsplit(".lora_", 1)
        if part != "A.weight":
            continue
        a, b = tensors[key], tensors[key.replace(".lora_A.", ".lora_B.")]
        shape = (b.shape[0], a.shape[1])
        names = _file_names(model, module, shape)
        if not key.startswith(_PREFIX) or len(names) != 1 or shapes.get(names[0]) != shape:
            raise CheckpointError(
                f"adapter {adapter} adapts {module!r}, which the files of base {base} do not name; vLLM would drop it: "
                "train other modules"
            )
        matrices[names[0]] = (a, b)
    return Adapter(matrices, config["lora_alpha"] / config["r"])


def _file_names(model: Model, module: str, shape: tuple[int, int]) -> list[str]:
    """Under which names the files that `model` was loaded from hold the module's weight."""
    return list(revert_weight_conversion(model, {f"{module}.weight": torch.empty(shape, device="meta")}))


def write_merged(base: Path, adapter: Adapter, cast: Cast, template: str | None, out: Path) -> int:
    """Write to `out` all that serving needs; base and adapter are added in float32, then cast, or keep the base's types.

    `template` is the chat template where the base's own had to be mended. Returns how many tensors differ from the base's.
    """
    num_changed = 0

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        nonlocal num_changed
        if name not in adapter.matrices:
            return tensor
        merged = adapter.add(name, tensor)
        written = cast(merged) if cast.to else merged.to(tensor.dtype)
        num_changed += not torch.equal(written, cast(tensor))
        return written

    copy_files(base, out)
    rewrite_weights(base, out, cast, change)
    if cast.to:
        _edit(out / "config.json", lambda config: _rename_dtypes(config, cast.to[-1]))
    _edit(out / _GENERATION, lambda config: {name: config[name] for name in _TOKEN_IDS if name in config})
    if template is not None:
        _replace_template(out, template)
    return num_changed


def copy_files(base: Path, out: Path) -> None:
    """Copy, byte for byte, what belongs to the model beside its weights."""
    for path in sorted(base.iterdir()):
        is_weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and not path.name.startswith(".") and path.name not in _OURS:
            shutil.copyfile(path, out / path.name)


def write_rounded(source: Path, cast: Cast, out: Path) -> None:
    """A copy of the checkpoint with its weights rounded: `cast` need not end in the type that they are written in."""
    copy_files(source, out)
    rewrite_weights(source, out, cast)


def write_adapter(adapter: Path, named: Adapter, out: Path) -> None:
    """Write the adapter alone to `out`; `named` is its content as `read_adapter` gives it."""
    write_tensors(
        out / _WEIGHTS,
        {
            f"{_PREFIX}{name.removesuffix('.weight')}.lora_{part}.weight": matrix
            for name, matrices in named.matrices.items()
            for part, matrix in zip("AB", matrices, strict=True)
        },
    )
    config = json.loads((adapter / _CONFIG).read_text("utf-8")) | {"base_model_name_or_path": None}
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # PEFT writes a set, in no order: the digest would change with it
    (out / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def is_served_exactly(policy: Model) -> bool:
    """Whether vLLM applies the whole adapter: it takes the language model's part, and drops tower and projector."""
    decoder = {id(module) for module in policy.base_model.model.get_decoder().modules()}
    return all(id(module) in decoder for module in policy.modules() if hasattr(module, "lora_B"))


def _edit(path: Path, change: Any) -> None:
    """Replace a JSON object by what `change` makes of it; a file that need not change stays as it is, byte for byte."""
    if not path.is_file():
        return
    before = json.loads(path.read_text("utf-8"))
    if (after := change(before)) != before:
        path.write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _rename_dtypes(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration with every type that it names, its parts' as well, set to `dtype`."""
    renamed = {name: _rename_dtypes(part, dtype) if isinstance(part, dict) else part for name, part in config.items()}
    return renamed | {name: dtype for name in ("dtype", "torch_dtype") if config.get(name)}


def _replace_template(out: Path, template: str) -> None:
    """The one template of the checkpoint, whichever of the files that may hold one a library reads."""
    (out / _TEMPLATE).write_text(template, "utf-8")
    (out / "chat_template.json").unlink(missing_ok=True)
    for name in ("tokenizer_config.json", "processor_config.json"):
        _edit(out / name, lambda config: {key: value for key, value in config.items() if key != _TEMPLATE_KEY})
