"""The nano-LLaVA's tokenizer, processor and architecture, and its canonical llava-hf layout on disk.

The classes are those of `llava-hf/llava-1.5-7b-hf` (CLIP tower with the last layer unused, two-layer projector, Llama),
only smaller. Three things are ours. The tokenizer knows the nano world word by word, and an option such as ` (B) red` and
each instruction sentence of `pipeline/prompts` as one piece, and everything else byte by byte, so that it loses nothing
of any text. `<R>` is an ordinary piece (a special one would vanish from the server's output). And the chat template
writes BOS and EOS itself, so that training and serving see the same tokens; the tokenizer therefore adds none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from pipeline.prompts import load_prompt
from pipeline.records import PromptName
from pipeline.sources.nano_scene import CHOICE_WORDS, IMAGE_SIZE

PATCH_SIZE = 28
NUM_IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
CHAT_TEMPLATE = (
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


def _instruction_sentences() -> list[str]:
    texts = (re.split(r"<question>|<options>|\{user instruction\}", load_prompt(name)) for name in get_args(PromptName))
    sentences = {s.strip() for parts in texts for part in parts for s in re.split(r"\n|(?<=\.) ", part)}
    return sorted((s for s in sentences if " " in s and len(s) > 20), key=lambda s: (-len(s), s))


def build_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """A lossless tokenizer whose pieces are the words of `corpus`; other words become bytes.

    Text is split before words, option letters such as ` (B)`, line breaks and single signs; no piece crosses such a
    border, so a prompt and its completion tokenized apart give the same tokens as together.
    """
    sentences = "|".join(re.escape(sentence) for sentence in _instruction_sentences())
    options = rf" ?\([A-D]\) (?:{'|'.join(CHOICE_WORDS)})\b"
    pattern = rf" ?(?:{sentences})|{options}| ?<R>| ?\([A-Z]\)| ?\w+|\n| ?[^\w\s]|\s"
    splitter = pre_tokenizers.Split(Regex(pattern), "isolated")
    words = {piece for text in corpus for piece, _ in splitter.pre_tokenize_str(text)}
    words |= {f" ({letter})" for letter in "ABCDEFGH"} | {" <R>", "\n"}
    words |= {f" ({letter}) {word}" for letter in "ABCD" for word in CHOICE_WORDS}
    pieces = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(words - set(SPECIAL_TOKENS))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    unknown, bos, eos, pad, image = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, ignore_merges=True, unk_token=unknown))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        pad_token=pad,
        extra_special_tokens={"image_token": image},
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=2048,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """LLaVA's processor at 56 pixels: CLIP's normalisation, one image token for each cell of a scene."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, width: int = 128, num_layers: int = 4
) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights; `width` and `num_layers` are the language model's (its heads are 32 wide)."""
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
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
    _initialise(model, tokenizer)
    return model


@torch.no_grad()
def _initialise(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Start attention as a match of like with like, and an option's piece as the sum of its letter and its word.

    Keys equal queries and output undoes value in each layer (mimetic initialisation, Trockman and Kolter 2023). With the
    default instead, binding an option's word to its letter did not come in a thousand steps; with it, in 150.
    """
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        attention.q_proj.weight.normal_(0, 0.07)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        rotation, _ = torch.linalg.qr(torch.randn_like(attention.v_proj.weight))
        attention.v_proj.weight.copy_(rotation)
        attention.o_proj.weight.copy_(rotation.T)
    embeddings = model.get_input_embeddings().weight
    for letter in "ABCD":
        for word in CHOICE_WORDS:
            option, *parts = tokenizer.convert_tokens_to_ids([f" ({letter}) {word}", f" ({letter})", f" {word}"])
            embeddings[option] = embeddings[parts].sum(0) * 0.7
    model.lm_head.weight.copy_(embeddings)


def save_checkpoint(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Write float32 weights under the hub's names, processor, chat template and a neutral generation config."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.text_config.bos_token_id,
        eos_token_id=model.config.text_config.eos_token_id,
        pad_token_id=model.config.text_config.pad_token_id,
    )
    model.save_pretrained(out)
    _restore_hub_names(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text("utf-8"))
    config["architectures"] = ["LlavaForConditionalGeneration"]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    processor.save_pretrained(out)


def _restore_hub_names(weights: Path) -> None:
    """`vision_tower.embeddings...` -> `vision_tower.vision_model.embeddings...`, the only form that vLLM loads."""
    tensors: dict[str, Any] = load_file(weights)
    old, new = "vision_tower.", "vision_tower.vision_model."
    renamed = {
        name.replace(old, new, 1) if old in name and new not in name else name: tensor.to(torch.float32).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(renamed, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
