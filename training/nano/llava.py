"""The nano-LLaVA: the classes and the disk layout of `llava-hf/llava-1.5-7b-hf` (CLIP tower with the last layer unused,
two-layer projector, Llama), only smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vcot.pipeline.sources.nano.scene import CELL, IMAGE_SIZE
from vcot.training.model.loading import Model
from vcot.training.model.template import Processor
from vcot.training.nano.architecture import NUM_IMAGE_TOKENS, Architecture, Features, Tokens, Turns, initialise


class Llava(Architecture):
    """Patches of 28 pixels: each cell of a scene is one patch, one image token."""

    title = "nano-LLaVA"
    checkpoint_name = "nano"
    tokens = Tokens(
        special={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        named={"image_token": "<image>"},
    )
    chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['content'] is string %}{% set parts = [{'type': 'text', 'text': message['content']}] %}"
        "{% else %}{% set parts = message['content'] %}{% endif %}"
        "{{ message['role'].upper() + ':' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% for part in parts if part['type'] == 'text' %}"
        "{% generation %}{{ ' ' + part['text'] | trim + eos_token }}{% endgeneration %}{% endfor %}"
        "{% else %}{{ ' ' }}"
        "{% for part in parts if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
        "{% for part in parts if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    """`USER: <image>\\n... ASSISTANT:` as llava-hf writes it, with BOS in front and EOS after each answer."""
    turns = Turns(
        user="<s>USER: ", image="<image>" * NUM_IMAGE_TOKENS + "\n", assistant=" ASSISTANT:", begin=" ", eos="</s>"
    )
    hub_names = ("vision_tower.", "vision_tower.vision_model.")

    def build_processor(self, tokenizer: PreTrainedTokenizerFast) -> Processor:
        """LLaVA's processor at 56 pixels: CLIP's normalisation, one image token for each cell of a scene."""
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        image_processor = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
        return LlavaProcessor(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=CELL,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=self.chat_template,
        )

    def build_model(self, tokenizer: PreTrainedTokenizerFast, width: int = 128, num_layers: int = 4) -> Model:
        """A LlavaForConditionalGeneration."""
        vision = CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=CELL,
            projection_dim=96,
        )
        text = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width * 5 // 2,
            num_hidden_layers=num_layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            initializer_range=0.06,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=NUM_IMAGE_TOKENS,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        config._attn_implementation = "sdpa"
        model = LlavaForConditionalGeneration(config)
        initialise(model, tokenizer)
        return model

    def look(self, model: Model, pixels: torch.Tensor) -> Features:
        """The tower's last layer but one, without CLS, through the projector."""
        tower = model.model.vision_tower(pixels, output_hidden_states=True)
        return Features(model.model.multi_modal_projector(tower.hidden_states[-2][:, 1:]).flatten(0, 1))

    def read(self, model: Model, ids: torch.Tensor, features: Features | None) -> torch.Tensor:
        """LLaVA's own forward pass: features in the placeholders' place."""
        embeddings = model.get_input_embeddings()(ids)
        if features is not None:
            where = (ids == model.config.image_token_index).unsqueeze(-1)
            embeddings = embeddings.masked_scatter(where, features.tokens)
        hidden: torch.Tensor = model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return hidden

    def describe(self, config: Mapping[str, Any]) -> str:
        """As the shipped card has it."""
        vision, text = config["vision_config"], config["text_config"]
        return (
            f"CLIP tower (3 layers of width 96, patches of {vision['patch_size']} on {vision['image_size']} x "
            f"{vision['image_size']} pixels: {config['image_seq_length']} image\n"
            "tokens, one for each cell of a scene; features of the last layer but one without CLS), a two-layer projector, "
            f"Llama\n({text['num_hidden_layers']} layers of width {text['hidden_size']}), float32, "
            f"{text['max_position_embeddings']} positions. The layout on disk is that of\n"
            "`llava-hf/llava-1.5-7b-hf`, and so is the chat template, but for BOS and EOS, which it writes itself."
        )
