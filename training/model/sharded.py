"""Weights that no process holds whole: each reads its own part of every parameter, and layers are gathered as they compute.

transformers does it (FSDP 2): it builds the model without weights, shards it over the processes, and reads of the
safetensors files only what is the process's own. Its trainer then leaves the model as it is, keeps the adapter whole in each
process, and averages the adapter's gradients.

Limits: decoder layers are gathered one at a time; the image tower, the projector and the head are one group, which is whole
while a step is computed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.distributed import DistributedConfig

from vcot.pipeline.errors import ServerError
from vcot.training.model.loading import Model, read_weights


def load_sharded(directory: Path, dtype: torch.dtype, num_processes: int) -> Model:
    """The checkpoint's weights in `dtype`, spread over all processes, in evaluation mode. Each process calls this.

    Raises CheckpointError.
    """
    model = read_weights(directory, dtype, distributed_config=DistributedConfig(fsdp_size=num_processes))
    check_filled(model)
    # One process alone writes a checkpoint, and must neither gather nor give back what the others do not.
    model.set_reshard_after_forward(True)  # else state_dict() gives back what stays gathered between passes
    model._tp_size = None  # a size, be it 1, has PEFT gather the whole base for an adapter that is saved
    return model.eval()


def check_filled(model: Model) -> None:
    """Raise ServerError where a parameter or a buffer of `model` was left without a value."""
    empty = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if empty:
        raise ServerError(f"{len(empty)} weights were not loaded, the first {empty[0]}; train with ddp instead")
