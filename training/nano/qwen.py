"""The nano-Qwen: the classes and the disk layout of `Qwen/Qwen3-VL-4B-Instruct`, only smaller.

What it has that LLaVA has not: an image keeps its shape and takes as many tokens as that needs (dynamic resolution), 2 x 2
patches are merged into one token, features of an inner tower layer are added within the language model (DeepStack),
positions are those of time, row and column (interleaved M-RoPE), a vision start and end around each image, and ChatML turns
that end in a line break after EOS, without BOS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLTextConfig,
    Qwen3VLVideoProcessor,
    Qwen3VLVisionConfig,
)

from vcot.pipeline.sources.nano.scene import CELL, IMAGE_SIZE
from vcot.training.model.loading import Model
from vcot.training.model.template import Processor
from vcot.training.nano.architecture import NUM_IMAGE_TOKENS, Architecture, Features, Tokens, Turns, initialise

MERGE = 2
PATCH_SIZE = CELL // MERGE
TEMPORAL_PATCH_SIZE = 2
"""An image is taken for a film of two equal pictures."""
_GRID = IMAGE_SIZE // PATCH_SIZE
_MAX_PIXELS = 4 * IMAGE_SIZE**2
_PATCHES = {"patch_size": PATCH_SIZE, "merge_size": MERGE, "temporal_patch_size": TEMPORAL_PATCH_SIZE}


class Qwen(Architecture):
    """Patches of 14 pixels, merged two by two: each cell of a scene is one image token."""

    title = "nano-Qwen"
    checkpoint_name = "nano-qwen"
    tokens = Tokens(
        special={"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
        named={
            "turn_start_token": "<|im_start|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
        },
    )
    chat_template = (
        "{% for message in messages %}"
        "{% if message['content'] is string %}{% set content = [{'type': 'text', 'text': message['content']}] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% for part in content if part['type'] == 'text' %}"
        "{% generation %}{{ part['text'] | trim + '<|im_end|>' }}{% endgeneration %}{% endfor %}"
        "{% else %}"
        "{% for part in content %}{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    """ChatML as Qwen3-VL writes it, and like it with loops over `content`: by that name vLLM sees that a message comes in
    parts, where it is not told."""
    turns = Turns(
        user="<|im_start|>user\n",
        image=f"<|vision_start|>{'<|image_pad|>' * NUM_IMAGE_TOKENS}<|vision_end|>",
        assistant="<|im_end|>\n<|im_start|>assistant\n",
        begin="",
        eos="<|im_end|>",
    )

    def build_processor(self, tokenizer: PreTrainedTokenizerFast) -> Processor:
        """Qwen3-VL's processor: images of 4 to 16 tokens, their shape kept."""
        size = {"shortest_edge": IMAGE_SIZE**2, "longest_edge": _MAX_PIXELS}
        return Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessor(size=size, **_PATCHES),
            tokenizer=tokenizer,
            video_processor=Qwen3VLVideoProcessor(size=size, **_PATCHES),
            chat_template=self.chat_template,
        )

    def build_model(self, tokenizer: PreTrainedTokenizerFast, width: int = 128, num_layers: int = 4) -> Model:
        """A Qwen3VLForConditionalGeneration."""
        vision = Qwen3VLVisionConfig(
            depth=3,
            hidden_size=96,
            intermediate_size=256,
            num_heads=3,
            patch_size=PATCH_SIZE,
            spatial_merge_size=MERGE,
            temporal_patch_size=TEMPORAL_PATCH_SIZE,
            out_hidden_size=width,
            num_position_embeddings=_GRID**2,
            deepstack_visual_indexes=[1],
        )
        text = Qwen3VLTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width * 5 // 2,
            num_hidden_layers=num_layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            head_dim=32,
            max_position_embeddings=2048,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 100000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            initializer_range=0.06,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
        ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(self.tokens.named[name]) for name in names}
        config = Qwen3VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **ids)
        config._attn_implementation = "sdpa"
        model = Qwen3VLForConditionalGeneration(config)
        initialise(model, tokenizer)
        return model

    def look(self, model: Model, pixels: torch.Tensor) -> Features:
        """Merged patches, and those of the inner layer."""
        patches, *_ = Qwen2VLImageProcessor().patchify(pixels, **_PATCHES)
        encoded = model.model.get_image_features(patches.flatten(0, 1), _grids(len(pixels)))
        return Features(torch.cat(encoded.pooler_output), encoded)

    def read(self, model: Model, ids: torch.Tensor, features: Features | None) -> torch.Tensor:
        """The model's own forward pass, the tower's output given."""
        seen: dict[str, Any] = {}
        if features is not None:
            seen = {
                "mm_encoder_outputs": {"image": features.encoded},
                "image_grid_thw": _grids(len(ids)),
                "mm_token_type_ids": (ids == model.config.image_token_id).int(),
            }
        hidden: torch.Tensor = model.model(input_ids=ids, use_cache=False, **seen).last_hidden_state
        return hidden

    def describe(self, config: Mapping[str, Any]) -> str:
        """Sizes from the saved config."""
        vision, text = config["vision_config"], config["text_config"]
        return (
            f"Qwen3-VL's tower ({vision['depth']} layers of width {vision['hidden_size']}, patches of "
            f"{vision['patch_size']} pixels with learned and rotary positions), merged two by two into\n"
            f"image tokens: {NUM_IMAGE_TOKENS} for a {IMAGE_SIZE} x {IMAGE_SIZE} scene, one for each cell, and up to "
            f"{_MAX_PIXELS // CELL**2} for other images, whose shape is kept; features of\n"
            "an inner layer are added after the language model's first (DeepStack). Qwen3's language model "
            f"({text['num_hidden_layers']} layers of width {text['hidden_size']}, normalised\n"
            f"queries and keys, interleaved M-RoPE), float32, {text['max_position_embeddings']} positions. The layout on "
            "disk is that of\n`Qwen/Qwen3-VL-4B-Instruct`, and so is the chat template (ChatML: no BOS, EOS and a line "
            "break after each turn), but\nfor tools and videos."
        )


def _grids(num_images: int) -> torch.Tensor:
    """(images, 3): time, rows and columns of patches of a scene."""
    return torch.tensor([[1, _GRID, _GRID]]).repeat(num_images, 1)
