"""How much GPU memory a training takes, from the model's shape and the recipe alone: no weights, no torch.

Model: per process, the peak of a step of DPO with LoRA by TRL 1.16 and PEFT 0.21, in bytes:

    weights        every parameter, in the type that training computes in; with nf4, linears but lm_head in 4 bits (QLoRA: a
                   constant of one byte for 64 weights, and one of four bytes for 256 constants)
    adapter        16 x its parameters: PEFT keeps them in float32, and so are the gradient and AdamW's two moments
    gathered       where weights are spread over processes: the layer that computes and the next one, whole; and as one group
                   tower, projector and head (training/model/sharded.py)
    checkpoints    each layer's input, kept for the backward pass (with gradient checkpointing)
    layer          what one layer keeps for its own backward pass; without checkpointing, all layers keep theirs
    logits         one tile of them: TRL's fused head projects at most 4,096 tokens by 32,768 of the vocabulary at a time
    overhead       the CUDA context, cuBLAS and what the allocator cannot use

All rows of a batch are taken to be as long as the longest, and no prompt to be shared between two of them: the sum is what a
step may take. `least` is what every step takes: what depends on the rows counts half there, since a prompt is shared where
the model allows it, and the other rows are shorter. What a layer keeps was counted with
`torch.autograd.graph.saved_tensors_hooks` on a CPU, whose dropout masks are larger than a GPU's
(tests/training/protocol/test_memory.py does it again).

Limits: those of training/protocol/shape.py (a Qwen-VL's image is counted at the recipe's largest); attention without a
stored score matrix (SDPA's flash or memory-efficient kernels). FSDP and ZeRO are counted by what they spread, evenly. A
round whose reference is another model holds both until the reference's log-probs are there, which is not counted. It is an
estimate: no GPU has confirmed it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vcot.pipeline.records import Record
from vcot.training.protocol.shape import Shape, Stack
from vcot.training.protocol.train_sections import BaseWeights, Dtype, TrainSection

GIB = 2**30
BYTES: Mapping[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
Verdict = Literal["fits", "close", "too_large"]
_NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
_TILE_TOKENS, _TILE_VOCABULARY = 4096, 32768
_OVERHEAD_GIB = 1.5
_CONTEXT_GIB = 0.5
"""Of `overhead`, what no allocator can avoid."""
_LEAST_OF_ROWS = 0.5
_KEPT: Mapping[tuple[Dtype, bool], tuple[int, int]] = {
    ("float32", False): (32, 16),
    ("float32", True): (72, 20),
    ("bfloat16", False): (28, 8),
    ("bfloat16", True): (52, 12),
    ("float16", False): (28, 8),
    ("float16", True): (52, 12),
}
"""What an adapted layer keeps per token, without and with dropout: bytes x hidden size, and bytes x intermediate size."""


def kept_per_token(stack: Stack, dtype: Dtype, *, dropout: bool) -> int:
    """Bytes that the backward pass of one layer needs of its forward pass."""
    per_hidden, per_intermediate = _KEPT[dtype, dropout]
    return per_hidden * stack.hidden + per_intermediate * stack.intermediate


class MemoryEstimate(Record):
    """Peak memory of one process, in GiB."""

    weights: float
    adapter: float
    gathered: float = 0.0
    checkpoints: float
    layer: float
    logits: float
    overhead: float
    longest_row: int
    """In tokens, image tokens included."""
    num_rows: int
    """Rows of a batch: two per pair, three for mDPO."""

    @property
    def _of_rows(self) -> float:
        return self.checkpoints + self.layer + self.logits

    @property
    def total(self) -> float:
        """The sum: what a step may take."""
        return self.weights + self.adapter + self.gathered + self._of_rows + self.overhead

    @property
    def least(self) -> float:
        """What every step takes."""
        return self.weights + self.adapter + self.gathered + _LEAST_OF_ROWS * self._of_rows + _CONTEXT_GIB

    def judge(self, free_gib: float) -> Verdict:
        """Whether it fits into `free_gib` of a GPU: surely, perhaps, or surely not."""
        if self.total <= free_gib:
            return "fits"
        return "close" if self.least <= free_gib else "too_large"

    @property
    def summary(self) -> str:
        """The sum and its parts, for a person."""
        parts = ("weights", "adapter", "gathered", "checkpoints", "layer", "logits", "overhead")
        terms = " + ".join(f"{name} {getattr(self, name):.1f}" for name in parts if getattr(self, name) >= 0.05)
        return f"{self.total:.1f} GiB, estimated for {self.num_rows} rows of {self.longest_row} tokens ({terms})"


def estimate_memory(shape: Shape, recipe: TrainSection, longest_row: int) -> MemoryEstimate:
    """What one process takes at most, with rows of `longest_row` tokens, image tokens included."""
    all_linear, dropout = recipe.target_modules == "all-linear", recipe.lora_dropout > 0
    width, num_rows = BYTES[recipe.dtype], recipe.batch_size * (3 if recipe.method == "mdpo" else 2)
    tokens, patches = num_rows * longest_row, num_rows * shape.num_patches(recipe.max_image_side) if all_linear else 0
    spread = _Spread.of(recipe)
    layer = tokens * kept_per_token(shape.decoder, recipe.dtype, dropout=dropout)
    tower_layer = patches * kept_per_token(shape.tower, recipe.dtype, dropout=dropout)
    if recipe.gradient_checkpointing:
        inputs = tokens * shape.decoder.hidden * shape.decoder.num_layers
        inputs += patches * shape.tower.hidden * shape.tower.num_layers
        checkpoints, kept = width * inputs, max(layer, tower_layer)
    else:
        checkpoints, kept = 0, layer * shape.decoder.num_layers + tower_layer * shape.tower.num_layers
    tile = min(tokens, _TILE_TOKENS) * min(shape.vocabulary, _TILE_VOCABULARY) * width
    return MemoryEstimate(
        weights=weight_bytes(shape, recipe.dtype, recipe.base_weights) / spread.weights / GIB,
        adapter=shape.num_adapter_parameters(recipe.lora_r, all_linear=all_linear) * spread.per_parameter / GIB,
        gathered=_gathered(shape, spread) * width / GIB,
        checkpoints=checkpoints / GIB,
        layer=kept / GIB,
        logits=(tile + 4 * tokens * shape.decoder.hidden) / GIB,
        overhead=_OVERHEAD_GIB,
        longest_row=longest_row,
        num_rows=num_rows,
    )


def weight_bytes(shape: Shape, dtype: Dtype, base_weights: BaseWeights) -> float:
    """Of all weights, as training holds them."""
    per_linear = _NF4_BYTES if base_weights == "nf4" else BYTES[dtype]
    return shape.num_linear_parameters * per_linear + shape.num_embedding_parameters * BYTES[dtype]


def _gathered(shape: Shape, spread: _Spread) -> int:
    """Parameters that a process holds whole for a while, though they are spread."""
    if spread.weights == 1:
        return 0
    decoder = shape.decoder.num_layers * shape.decoder.layer_parameters
    tower_and_projector = shape.num_linear_parameters - decoder
    return 2 * shape.decoder.layer_parameters + tower_and_projector + shape.vocabulary * shape.decoder.hidden


@dataclass(frozen=True)
class _Spread:
    """How many processes share the weights, and what a trained parameter costs each of them, in bytes."""

    weights: int
    per_parameter: float

    @classmethod
    def of(cls, recipe: TrainSection) -> _Spread:
        """For a config file of the user's own, as if nothing were spread."""
        num = recipe.num_processes
        match recipe.accelerate_config:
            case "fsdp":
                return cls(num, 16)  # the adapter stays whole (training/model/sharded.py)
            case "zero3":
                return cls(num, 16 / num)
            case "zero2":
                return cls(1, 4 + 12 / num)
            case _:
                return cls(1, 16 if num == 1 else 20)  # DDP keeps a second copy of the gradients, in its buckets
