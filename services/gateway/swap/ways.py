"""What a server that runs can be made to serve, told from files alone: no server is asked, and nothing is loaded.

Three ways lead to a checkpoint. `adapter` loads a LoRA beside the checkpoint that it was trained on; `reload` puts
other weights of the same architecture in its place; `replica` starts another server. vLLM checks little of this by
itself: a tensor that a file lacks keeps its old values, an adapter's tensor whose name fits no module is dropped, and
tokenizer, processor and chat template stay those of the start. Each would answer 200, with something else than the
checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from vcot.pipeline.errors import SwapError
from vcot.services.checkpoints.registry import Checkpoint

Way = Literal["adapter", "reload", "replica"]

_CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json")
_BOOKKEEPING = frozenset(("transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures", "auto_map"))
"""Written anew by each save; the dtype is the recipe's."""
_TOKENIZER_STATE = frozenset(("padding", "truncation"))
"""Of the last call before tokenizer.json was saved; each call sets its own."""
_TEMPLATE = "chat_template.jinja"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_LANGUAGE = {
    "model.language_model.": ("language_model.model.", "model.language_model.", "model."),
    "language_model.model.": ("language_model.model.",),
    "model.layers.": ("model.layers.",),
}
"""How PEFT names the language model's modules (after `base_model.model.`), or an export that keeps the files' names; and
under what the files of a base that vLLM maps alike have them."""
_SIDES = {"lora_A": 1, "lora_B": 0}
"""Which side of the adapted matrix (out x in) each factor shares."""
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
"""What vLLM's loader takes for granted."""
_IGNORED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
"""Features of PEFT that change what an adapter computes, and that vLLM 0.32 refuses or passes over."""

Shapes = dict[str, tuple[int, ...]]


def choose_way(
    wanted: Literal["auto", "adapter", "reload", "replica"], live: Checkpoint, target: Checkpoint, can_start: bool
) -> Way:
    """The fastest way that the recipe's `serve.swap` and the checkpoint allow. Raises SwapError with the reason.

    An adapter is for check_adapter to judge, since its parent need not be live yet.
    """
    name, is_adapter = target.ref.name, target.ref.kind == "adapter"
    if target.manifest.canary is None and target.ref.kind != "base":
        raise SwapError(f"checkpoint {name} has no canary, so a swap to it could not be verified; make it again")
    if is_adapter != (wanted == "adapter") and (is_adapter or wanted == "adapter") and wanted != "auto":
        kind = "an adapter" if is_adapter else "no adapter"
        raise SwapError(f'serve.swap = "{wanted}" cannot serve {name}, which is {kind}; set it to "auto"')
    if is_adapter:
        return "adapter"
    if wanted == "replica":
        _check_startable(name, can_start, "it is what serve.swap asks for")
        return "replica"
    try:
        check_reloadable(live, target)
    except SwapError as error:
        if wanted == "reload":
            raise
        _check_startable(name, can_start, str(error))
        return "replica"
    return "reload"


def _check_startable(name: str, can_start: bool, reason: str) -> None:
    if not can_start:
        raise SwapError(
            f"checkpoint {name} takes a server of its own ({reason}), and servers of serve.upstreams are not ours to start; "
            "start one with it, and give its run to a gateway"
        )


def check_reloadable(live: Checkpoint, target: Checkpoint) -> None:
    """Raise SwapError unless `target` differs from `live` in its weights' values only."""
    name, other = target.ref.name, live.ref.name
    old, new = tensor_shapes(live.directory), tensor_shapes(target.directory)
    if wrong := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
        first = f"{wrong[0]} is {new.get(wrong[0], 'absent')}, and {old.get(wrong[0], 'absent')} in {other}"
        raise SwapError(
            f"checkpoint {name} cannot be loaded in place of {other}, since {len(wrong)} tensors are of another "
            f"shape ({first})"
        )
    for difference in _differences(live, target):
        raise SwapError(
            f"checkpoint {name} cannot be loaded in place of {other}, whose {difference}: only weights are loaded"
        )


def _differences(live: Checkpoint, target: Checkpoint) -> Iterator[str]:
    """What a server reads at its start only, and would keep."""
    if (ours := _template(live)) != (theirs := _template(target)) and ours is not None and theirs is not None:
        yield "chat template is another"
    for name in _CONFIGS:
        paths = live.directory / name, target.directory / name
        if all(path.is_file() for path in paths) and paths[0].read_bytes() != paths[1].read_bytes():
            ignored = _BOOKKEEPING | _TOKENIZER_STATE if name == "tokenizer.json" else _BOOKKEEPING
            ours, theirs = map(_read_json, paths)
            yield from (f"{name} says {key}" for key in _unequal(ours, theirs, ignored))


def _unequal(ours: Any, theirs: Any, ignored: frozenset[str], place: str = "") -> Iterator[str]:
    """Where two JSON documents contradict each other; what only one of them says is a default written out."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() & theirs.keys() - ignored):
            yield from _unequal(ours[key], theirs[key], ignored, f"{place}.{key}" if place else key)
    elif ours != theirs:
        yield f"{place} = {str(ours)[:40]} where it says {str(theirs)[:40]}"


def _template(checkpoint: Checkpoint) -> str | None:
    path = checkpoint.chat_template or checkpoint.directory / _TEMPLATE
    return path.read_text("utf-8") if path.is_file() else None


def check_adapter(target: Checkpoint, parent: Checkpoint, max_rank: int | None) -> None:
    """Raise SwapError unless vLLM serves exactly this adapter on `parent`, up to rounding.

    Its loader compares the last part of a name only, and then applies what it finds a module for: of an adapter on all
    linear layers the tower's and the projector's share is lost without a word.
    """
    name = target.ref.name
    if max_rank is None:
        raise SwapError(
            f'adapter {name} cannot be served, since vLLM was started without adapters; set serve.swap = "adapter" and '
            "start it again, or merge it"
        )
    config = _read_json(target.directory / "adapter_config.json")
    for field, allowed in _PLAIN.items():
        if config.get(field, allowed[0]) not in allowed:
            raise _not_exact(name, f"{field} = {config[field]!r}")
    for field in _IGNORED:
        if config.get(field):
            raise _not_exact(name, f"{field} = {str(config[field])[:60]}")
    shapes, adapted = tensor_shapes(parent.directory), tensor_shapes(target.directory, _ADAPTER_WEIGHTS)
    if not adapted:
        raise _not_exact(name, f"no tensor in {_ADAPTER_WEIGHTS}")
    for key, shape in sorted(adapted.items()):
        _check_tensor(name, key, shape, shapes, max_rank)
    halves = {key.replace(".lora_A.", ".lora_B.") for key in adapted} ^ {key for key in adapted if ".lora_B." in key}
    if halves:
        raise _not_exact(name, f"{min(halves)}, whose other factor is missing")


def _check_tensor(name: str, key: str, shape: tuple[int, ...], shapes: Shapes, max_rank: int) -> None:
    """Raise SwapError unless the tensor is a factor of a linear layer of the language model."""
    module, _, factor = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    prefix = next((prefix for prefix in _LANGUAGE if module.startswith(prefix)), None)
    if prefix is None or factor not in _SIDES or not key.startswith("base_model.model.") or not key.endswith(".weight"):
        raise _not_exact(name, f"tensor {key}, which is no LoRA factor of the language model")
    rest = module.removeprefix(prefix)
    stored = (f"{start}{rest}.weight" for start in _LANGUAGE[prefix])
    matrix = next((shapes[known] for known in stored if known in shapes), None)
    side, rank = _SIDES[factor], shape[1 - _SIDES[factor]] if len(shape) == 2 else 0
    if matrix is None or len(matrix) != 2 or len(shape) != 2 or shape[side] != matrix[side]:
        raise _not_exact(name, f"tensor {key} {list(shape)}, which fits no linear layer of its base")
    if rank > max_rank:
        raise SwapError(f"adapter {name} has rank {rank} ({key}), and the server takes {max_rank}; merge it")


def _not_exact(name: str, what: str) -> SwapError:
    return SwapError(f"adapter {name} would not be served exactly, because of {what}; merge it")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SwapError(f"{path} is not JSON ({error}); make the checkpoint again") from None


def tensor_shapes(directory: Path, pattern: str = "*.safetensors") -> Shapes:
    """Name and shape of every tensor, from the safetensors headers only. Raises SwapError for a damaged file."""
    shapes: Shapes = {}
    for path in directory.glob(pattern):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise SwapError(f"{path} is not a whole safetensors file ({error}); make the checkpoint again") from None
    return shapes
