"""Loading a checkpoint's model and processor, and asking how likely a response is: the calls that all share."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from accelerate.utils import get_max_memory
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.utils import logging

from vcot.pipeline.errors import CheckpointError, MachineError
from vcot.pipeline.identity import check_layout
from vcot.training.model.template import Processor, ensure_template
from vcot.training.protocol.train_sections import BaseWeights, Dtype

Model: TypeAlias = Any
"""A transformers or PEFT model; neither library ships types."""
Batch: TypeAlias = dict[str, torch.Tensor]
DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

Place: TypeAlias = Literal["device", "spread", "nowhere"]
"""Where weights are held: all on the GPU (or the CPU), as training needs it; wherever there is room, GPUs first, then
memory, then the files themselves; or nowhere, for names and shapes alone."""
_WORKSPACE = 8 * 2**30
"""Bytes that spread weights leave free for what asking needs, or half of what is free where that is less: the float32
logits of a batch take up to 2 GiB (training/dpo/probe.py) or one pair's, and what a layer computes is of that size."""
_SMALL = 50_000_000
"""Parameters below which a second CPU thread costs more than it brings: its layers take microseconds, and on a busy
machine each waits for the other thread (measured with nano: 10 steps in 5 s on one thread, 47 s on two)."""

_WRONG_TYPES = (ValueError, TypeError, AttributeError, KeyError)
"""What transformers raises for a file that is JSON of another kind than it takes."""


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def num_gpus() -> int:
    """GPUs that this process sees."""
    return torch.cuda.device_count()


def quiet_libraries() -> None:
    """No progress bars and no warnings for library users: a command's output is read by people, or is a log."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_processor(directory: Path) -> tuple[Processor, bool]:
    """The checkpoint's processor with a sound chat template and a padding token, and whether its template was mended.

    Raises CheckpointError.
    """
    try:
        processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
    except (OSError, *_WRONG_TYPES) as error:
        raise CheckpointError(f"checkpoint {directory} has no usable processor ({_first_line(error)})") from None
    if not hasattr(processor, "image_token_id") or not hasattr(processor, "_get_num_multimodal_tokens"):
        raise CheckpointError(
            f"checkpoint {directory} has no processor that announces its image tokens; take a vision-language model "
            "that transformers serves itself"
        )
    mended = ensure_template(processor)
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor, mended


def load_model(directory: Path, dtype: torch.dtype, place: Place = "device", weights: BaseWeights = "full") -> Model:
    """The checkpoint's weights in `dtype`, in evaluation mode.

    With `weights` nf4, all linear layers but lm_head are rounded from `dtype` to 4 bits and compute in `dtype`; that is for
    the place "device" alone.

    Raises CheckpointError, and MachineError where not even a layer has room.
    """
    model = read_weights(directory, dtype, **(_four_bit(dtype) if weights == "nf4" else _placement(place)))
    if set(getattr(model, "hf_device_map", {}).values()) == {"disk"}:
        free = ", ".join(f"{free / 2**30:.1f}" for free in free_bytes().values())
        raise MachineError(
            f"no layer of {directory} has room in the {free} GiB that are free; stop what else runs here"
        )
    if device().type == "cpu" and model.num_parameters() < _SMALL:
        torch.set_num_threads(1)
    if weights == "nf4":
        return _keep_packing(model).eval()
    return (model.to(device()) if place == "device" else model).eval()


def read_weights(directory: Path, dtype: torch.dtype, **how: Any) -> Model:
    """The checkpoint as transformers reads it, placed or spread as `how` says. Raises CheckpointError."""
    check_layout(directory)
    try:
        return AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype, local_files_only=True, **how)
    except (OSError, RuntimeError, SafetensorError, *_WRONG_TYPES) as error:
        raise CheckpointError(f"checkpoint {directory} cannot be loaded ({_first_line(error)})") from None


def compute_in_float32(model: Model) -> Model:
    """The same 4-bit weights, and all that is not in 4 bits, computed in float32: to be asked, not trained."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model


def free_bytes() -> dict[int | str, int]:
    """What is free now of each GPU's memory and of the machine's ("cpu")."""
    return dict(get_max_memory())


def _placement(place: Place) -> dict[str, Any]:
    """`from_pretrained`'s arguments; none for "device", which DeepSpeed's ZeRO-3 forbids."""
    if place != "spread":
        return {} if place == "device" else {"device_map": "meta"}
    room = {where: max(free - _WORKSPACE, free // 2) for where, free in free_bytes().items()}
    return {"device_map": "auto", "max_memory": room}


def _four_bit(dtype: torch.dtype) -> dict[str, Any]:
    """`from_pretrained`'s arguments for QLoRA's weights: NF4, the constants quantized as well."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device() if num_gpus() else "cpu"}}


def _keep_packing(model: Model) -> Model:
    """The model with its 4-bit weights to be used as they are.

    On a CPU bitsandbytes 0.50 would pack them anew at the first pass without a gradient, which rounds their constants, so
    that reference and policy would differ, and fails where a layer's width is no multiple of 64.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def free_memory() -> None:
    """Give back what a model that is no longer used held; a trainer and its model refer to each other."""
    gc.collect()
    torch.cuda.empty_cache()


def completion_logprobs(model: Model, batch: Batch) -> torch.Tensor:
    """The log-prob of each completion token given what stands before it: float32, (rows, length - 1), 0 elsewhere.

    `batch` is a PairCollator's.
    """
    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "completion_mask"}
    with torch.inference_mode():
        logits = model(**inputs, use_cache=False).logits[:, :-1]
    labels = inputs["input_ids"][:, 1:].unsqueeze(-1).to(logits.device)
    rows = zip(logits, labels, strict=True)  # one at a time: the logits are large
    logprobs = torch.stack([row.float().log_softmax(dim=-1).gather(-1, label).squeeze(-1) for row, label in rows])
    masked: torch.Tensor = logprobs.cpu() * batch["completion_mask"][:, 1:]
    return masked


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
