"""How much memory a training takes, from the model's config.json and the recipe alone: no weights, no torch.

Model: per process, the peak of a step of DPO with LoRA by TRL 1.16 and PEFT 0.21, in bytes:

    weights        every parameter, in the type that training computes in
    adapter        16 x its parameters: PEFT keeps them in float32, and so are the gradient and AdamW's two moments
    checkpoints    each layer's input, kept for the backward pass (with gradient checkpointing)
    layer          what one layer keeps for its own backward pass; without checkpointing, all layers keep theirs
    logits         one tile of them: TRL's fused head projects at most 4,096 tokens by 32,768 of the vocabulary at a time
    overhead       the CUDA context, cuBLAS and what the allocator cannot use

All rows of a batch are taken to be as long as the longest, and no prompt to be shared between two of them. What a layer
keeps was counted with `torch.autograd.graph.saved_tensors_hooks` on a CPU, whose dropout masks are larger than a GPU's
(tests/training/test_memory.py does it again).

Limits: Llama-like decoders and CLIP-like towers (a Qwen-VL's is counted as one, at the recipe's largest image); attention
without a stored score matrix (SDPA's flash or memory-efficient kernels). FSDP and ZeRO are counted by what they spread,
evenly, without their buffers. It is an estimate: no GPU has confirmed it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.recipe import Dtype, TrainSection
from pipeline.records import Record

GIB = 2**30
BYTES: Mapping[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
_TILE_TOKENS, _TILE_VOCABULARY = 4096, 32768
_OVERHEAD_GIB = 1.5
_LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
"""transformers' LlamaConfig: a hub config leaves out what equals it."""
_CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
"""transformers' CLIPVisionConfig, likewise."""
_KEPT: Mapping[tuple[Dtype, bool], tuple[int, int]] = {
    ("float32", False): (32, 16),
    ("float32", True): (72, 20),
    ("bfloat16", False): (28, 8),
    ("bfloat16", True): (52, 12),
    ("float16", False): (28, 8),
    ("float16", True): (52, 12),
}
"""What an adapted layer keeps per token, without and with dropout: bytes x hidden size, and bytes x intermediate size."""


@dataclass(frozen=True)
class Stack:
    """The transformer layers of a decoder or of a tower."""

    hidden: int
    intermediate: int
    num_layers: int
    kv_hidden: int
    num_mlp_matrices: int
    """3 with a gate, as in Llama; 2 without, as in CLIP."""

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(input, output) size of each linear of one layer."""
        attention = ((self.hidden, self.hidden),) * 2 + ((self.hidden, self.kv_hidden),) * 2
        up = ((self.hidden, self.intermediate),) * (self.num_mlp_matrices - 1)
        return (*attention, *up, (self.intermediate, self.hidden))

    def kept_per_token(self, dtype: Dtype, *, dropout: bool) -> int:
        """Bytes that the backward pass of one layer needs of its forward pass."""
        per_hidden, per_intermediate = _KEPT[dtype, dropout]
        return per_hidden * self.hidden + per_intermediate * self.intermediate


@dataclass(frozen=True)
class Shape:
    """A vision-language model, as far as its memory goes."""

    decoder: Stack
    tower: Stack
    vocabulary: int
    tied: bool
    image_side: int | None
    """What the tower scales each image to, in pixels; None where it takes images as they are."""
    patch_side: int
    merged: int
    """Patches, along a side, that become one token."""

    def num_patches(self, max_side: int) -> int:
        """Patches of an image of at most `max_side` pixels, and the class token, as the tower sees them."""
        return int((self.image_side or max_side) // self.patch_side) ** 2 + 1

    def num_image_tokens(self, max_side: int) -> int:
        """Tokens of such an image, as the decoder sees them."""
        return int((self.image_side or max_side) // (self.patch_side * self.merged)) ** 2

    @property
    def projector(self) -> tuple[tuple[int, int], ...]:
        """(input, output) size of its linears."""
        return (self.tower.hidden, self.decoder.hidden), (self.decoder.hidden, self.decoder.hidden)

    @property
    def num_parameters(self) -> int:
        """All of them but norms, biases and position embeddings, which are less than a thousandth."""
        stacks = sum(stack.num_layers * _size(stack.linears) for stack in (self.decoder, self.tower))
        return stacks + _size(self.projector) + (1 if self.tied else 2) * self.vocabulary * self.decoder.hidden

    def num_adapter_parameters(self, rank: int, *, all_linear: bool) -> int:
        """A and B of each adapted linear; `all_linear` adapts tower and projector, too."""
        sizes = self.decoder.linears * self.decoder.num_layers
        if all_linear:
            sizes += self.tower.linears * self.tower.num_layers + self.projector
        return rank * sum(wide + high for wide, high in sizes)


def _size(linears: tuple[tuple[int, int], ...]) -> int:
    return sum(wide * high for wide, high in linears)


def find_shape(hub_id: str) -> Path | None:
    """What the config.json of a model on the hub says of its shape, for those that come with vcot: no network is asked."""
    path = Path(str(resources.files("training").joinpath("shapes", f"{hub_id.replace('/', '--')}.json")))
    return path if path.is_file() else None


def read_shape(config_path: Path) -> Shape:
    """The shape that a config.json describes. Raises CheckpointError where it is not of a vision-language model."""
    try:
        config = json.loads(config_path.read_text("utf-8"))
        return parse_shape(config)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{config_path} describes no vision-language model ({error!r}); name another") from None


def parse_shape(config: Mapping[str, Any]) -> Shape:
    """The same from the parsed file; KeyError where there is no `vision_config`."""
    text, vision = _LLAMA | config.get("text_config", config), _CLIP | config["vision_config"]
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or text["num_attention_heads"]
    decoder = Stack(text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"], head * kv_heads, 3)
    width = vision.get("embed_dim") or vision["hidden_size"]
    tower = Stack(width, vision["intermediate_size"], vision.get("depth") or vision["num_hidden_layers"], width, 2)
    is_clip = "spatial_merge_size" not in vision
    return Shape(
        decoder=decoder,
        tower=tower,
        vocabulary=text["vocab_size"],
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        image_side=_side(vision["image_size"]) if is_clip else None,
        patch_side=_side(vision["patch_size"]),
        merged=1 if is_clip else vision["spatial_merge_size"],
    )


def _side(size: int | Sequence[int]) -> int:
    """Of a square, as some configurations write it twice."""
    return size if isinstance(size, int) else size[0]


class MemoryEstimate(Record):
    """Peak memory of one process, in GiB."""

    weights: float
    adapter: float
    checkpoints: float
    layer: float
    logits: float
    overhead: float
    longest_row: int
    """In tokens, image tokens included."""
    num_rows: int
    """Rows of a batch: two per pair, three for mDPO."""

    @property
    def total(self) -> float:
        """The sum."""
        return self.weights + self.adapter + self.checkpoints + self.layer + self.logits + self.overhead

    @property
    def summary(self) -> str:
        """The sum and its parts, for a person."""
        parts = ("weights", "adapter", "checkpoints", "layer", "logits", "overhead")
        terms = " + ".join(f"{name} {getattr(self, name):.1f}" for name in parts if getattr(self, name) >= 0.05)
        return f"{self.total:.1f} GiB, estimated for {self.num_rows} rows of {self.longest_row} tokens ({terms})"


def estimate_memory(shape: Shape, recipe: TrainSection, longest_row: int) -> MemoryEstimate:
    """What one process takes at most, with rows of `longest_row` tokens, image tokens included."""
    all_linear, dropout = recipe.target_modules == "all-linear", recipe.lora_dropout > 0
    width, num_rows = BYTES[recipe.dtype], recipe.batch_size * (3 if recipe.method == "mdpo" else 2)
    tokens, patches = num_rows * longest_row, num_rows * shape.num_patches(recipe.max_image_side) if all_linear else 0
    spread = _Spread.of(recipe)
    layer = tokens * shape.decoder.kept_per_token(recipe.dtype, dropout=dropout)
    tower_layer = patches * shape.tower.kept_per_token(recipe.dtype, dropout=dropout)
    if recipe.gradient_checkpointing:
        inputs = tokens * shape.decoder.hidden * shape.decoder.num_layers
        inputs += patches * shape.tower.hidden * shape.tower.num_layers
        checkpoints, kept = width * inputs, max(layer, tower_layer)
    else:
        checkpoints, kept = 0, layer * shape.decoder.num_layers + tower_layer * shape.tower.num_layers
    tile = min(tokens, _TILE_TOKENS) * min(shape.vocabulary, _TILE_VOCABULARY) * width
    return MemoryEstimate(
        weights=shape.num_parameters * width / spread.weights / GIB,
        adapter=shape.num_adapter_parameters(recipe.lora_r, all_linear=all_linear) * spread.per_parameter / GIB,
        checkpoints=checkpoints / GIB,
        layer=kept / GIB,
        logits=(tile + 4 * tokens * shape.decoder.hidden) / GIB,
        overhead=_OVERHEAD_GIB,
        longest_row=longest_row,
        num_rows=num_rows,
    )


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
                return cls(num, 16)
            case "zero3":
                return cls(num, 16 / num)
            case "zero2":
                return cls(1, 4 + 12 / num)
            case _:
                return cls(1, 16 if num == 1 else 20)  # DDP keeps a second copy of the gradients, in its buckets
