"""A model's shape, read from its config.json alone: no weights, no torch.

Limits: Llama-like decoders; towers of CLIP's kind (LLaVA, InternVL, Gemma) and of the Qwen-VLs. Norms, biases and position
embeddings are left out, which is less than a thousandth of the parameters. A processor that cuts an image into tiles makes
several times the tokens that are counted here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vcot.pipeline.errors import CheckpointError

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
_QWEN_VISION = {"depth": 32, "patch_size": 14, "spatial_merge_size": 2, "mlp_ratio": 4}
"""transformers' Qwen2VLVisionConfig, likewise."""

Linears = tuple[tuple[int, int], ...]
"""(input, output) size of each linear layer."""


@dataclass(frozen=True)
class Stack:
    """The transformer layers of a decoder or of a tower."""

    hidden: int
    intermediate: int
    num_layers: int
    kv_hidden: int
    num_mlp_matrices: int
    """3 with a gate, as in Llama; 2 without, as in CLIP."""
    is_qkv_fused: bool = False
    """Whether queries, keys and values come from one linear layer, which then has one adapter."""

    @property
    def linears(self) -> Linears:
        """Those of one layer."""
        up = ((self.hidden, self.intermediate),) * (self.num_mlp_matrices - 1)
        mlp = (*up, (self.intermediate, self.hidden))
        out = (self.hidden, self.hidden)
        if self.is_qkv_fused:
            return (self.hidden, self.hidden + 2 * self.kv_hidden), out, *mlp
        return out, out, (self.hidden, self.kv_hidden), (self.hidden, self.kv_hidden), *mlp

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        return _size(self.linears)


@dataclass(frozen=True)
class Shape:
    """A vision-language model, as far as its memory and its arithmetic go."""

    decoder: Stack
    tower: Stack
    projector: Linears
    vocabulary: int
    tied: bool
    image_side: int | None
    """What the tower scales each image to, in pixels; None where it takes images as they are."""
    patch_side: int
    merged: int
    """Patches, along a side, that become one token."""
    image_tokens: int | None = None
    """Tokens of every image, where the config names them."""

    def num_patches(self, max_side: int) -> int:
        """Patches of an image of at most `max_side` pixels, and the class token, as the tower sees them."""
        return int((self.image_side or max_side) // self.patch_side) ** 2 + 1

    def num_image_tokens(self, max_side: int) -> int:
        """Tokens of such an image, as the decoder sees them."""
        return self.image_tokens or int((self.image_side or max_side) // (self.patch_side * self.merged)) ** 2

    @property
    def num_linear_parameters(self) -> int:
        """Those of the layers and the projector, which a 4-bit base quantizes."""
        stacks = sum(stack.num_layers * stack.layer_parameters for stack in (self.decoder, self.tower))
        return stacks + _size(self.projector)

    @property
    def num_embedding_parameters(self) -> int:
        """Those of the token embeddings and the head."""
        return (1 if self.tied else 2) * self.vocabulary * self.decoder.hidden

    @property
    def num_parameters(self) -> int:
        """All of them, within a thousandth."""
        return self.num_linear_parameters + self.num_embedding_parameters

    def num_adapter_parameters(self, rank: int, *, all_linear: bool) -> int:
        """A and B of each adapted linear layer; `all_linear` adapts tower and projector, too."""
        sizes = self.decoder.linears * self.decoder.num_layers
        if all_linear:
            sizes += self.tower.linears * self.tower.num_layers + self.projector
        return rank * sum(wide + high for wide, high in sizes)

    def kv_bytes_per_token(self, width: int) -> int:
        """Keys and values of one token in all layers of the decoder, at `width` bytes a number."""
        return 2 * self.decoder.num_layers * self.decoder.kv_hidden * width


def _size(linears: Linears) -> int:
    return sum(wide * high for wide, high in linears)


def find_shape(hub_id: str) -> Path | None:
    """What the config.json of a model on the hub says of its shape, for those that come with vcot: no network is asked."""
    path = Path(str(resources.files("vcot.training").joinpath("shapes", f"{hub_id.replace('/', '--')}.json")))
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
    text, vision = _LLAMA | config.get("text_config", config), config["vision_config"]
    heads = text["num_attention_heads"]
    head = text.get("head_dim") or text["hidden_size"] // heads
    kv_heads = text.get("num_key_value_heads") or heads
    decoder = Stack(text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"], head * kv_heads, 3)
    is_qwen = "spatial_merge_size" in vision
    parts = _qwen_vision(vision, decoder.hidden) if is_qwen else _clip_vision(vision, config, decoder.hidden)
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    return Shape(decoder=decoder, vocabulary=text["vocab_size"], tied=tied, **parts)


def _clip_vision(vision: Mapping[str, Any], config: Mapping[str, Any], hidden: int) -> dict[str, Any]:
    vision = {**_CLIP, **vision}
    width = vision["hidden_size"]
    return {
        "tower": Stack(width, vision["intermediate_size"], vision["num_hidden_layers"], width, 2),
        "projector": ((width, hidden), (hidden, hidden)),
        "image_side": _side(vision["image_size"]),
        "patch_side": _side(vision["patch_size"]),
        "merged": 1,
        "image_tokens": config.get("image_seq_length") or config.get("mm_tokens_per_image"),
    }


def _qwen_vision(vision: Mapping[str, Any], hidden: int) -> dict[str, Any]:
    """Of Qwen2-VL, whose `hidden_size` is the decoder's, of Qwen2.5-VL, whose layers have a gate, or of Qwen3-VL."""
    vision = {**_QWEN_VISION, **vision}
    width, merged = vision.get("embed_dim") or vision["hidden_size"], vision["spatial_merge_size"]
    intermediate = vision.get("intermediate_size") or int(vision["mlp_ratio"] * width)
    num_mlp_matrices = 3 if vision.get("hidden_act") == "silu" else 2
    taken = merged**2 * width
    num_mergers = 1 + len(vision.get("deepstack_visual_indexes", ()))
    return {
        "tower": Stack(width, intermediate, vision["depth"], width, num_mlp_matrices, is_qkv_fused=True),
        "projector": ((taken, taken), (taken, hidden)) * num_mergers,
        "image_side": None,
        "patch_side": _side(vision["patch_size"]),
        "merged": merged,
    }


def _side(size: int | Sequence[int]) -> int:
    """Of a square, as some configurations write it twice."""
    return size if isinstance(size, int) else size[0]
