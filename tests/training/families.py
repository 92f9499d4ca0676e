"""Tiny checkpoints of other families with random weights: the library's own classes and a chat template as the hub's has it.

Each builder takes the tokenizer's class of special tokens it needs and returns (model, processor).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.conftest import CORPUS
from vcot.training.nano.architecture import Tokens, build_tokenizer

WIDTH = 32
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'IMAGE' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def tokens(named: dict[str, str], **special: str) -> Any:
    """A tokenizer of the test corpus with these special tokens."""
    return build_tokenizer(CORPUS, Tokens(special=special, named=named))


def chatml(**named: str) -> Any:
    """The same with ChatML's."""
    return tokens({"turn_start_token": "<|im_start|>", **named}, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def vision(kind: type, image_size: int = 56, patch_size: int = 14) -> Any:
    return kind(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=WIDTH,
    )


def text(kind: type, tokenizer: Any, **more: Any) -> Any:
    return kind(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        **more,
    )


def llava_next() -> tuple[Any, Any]:
    """LLaVA-NeXT (1.6): the image whole and in tiles, with a newline feature after each row."""
    tokenizer = chatml(image_token="<image>")
    image_processor = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=[[56, 112], [112, 56]]
    )
    processor = hf.LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATML.replace("IMAGE", "<image>\n"),
    )
    config = hf.LlavaNextConfig(
        vision_config=vision(hf.CLIPVisionConfig),
        text_config=text(hf.LlamaConfig, tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[56, 112], [112, 56]],
        tie_word_embeddings=False,
    )
    return hf.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    """LLaVA-OneVision: SigLIP tower, tiles of any shape, Qwen2."""
    tokenizer = chatml(image_token="<image>", video_token="<video>")
    pinpoints = [[56, 56], [56, 112], [112, 56]]
    processor = hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(
            size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        video_processor=hf.LlavaOnevisionVideoProcessor(size={"height": 56, "width": 56}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE", "<image>\n"),
    )
    config = hf.LlavaOnevisionConfig(
        vision_config=vision(hf.SiglipVisionConfig),
        text_config=text(hf.Qwen2Config, tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def _qwen(config: type, vision_config: Any, text_config: type, model: type, processor: type) -> tuple[Any, Any]:
    names = {
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    }
    tokenizer = chatml(**names)
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    made = processor(
        image_processor=hf.Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(size=size),
        chat_template=CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    whole = config(
        vision_config=vision_config,
        text_config=text(text_config, tokenizer, rope_parameters=rope),
        tie_word_embeddings=False,
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    return model(whole), made


def qwen2_vl() -> tuple[Any, Any]:
    """Qwen2-VL."""
    tower = hf.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(
        depth=2, embed_dim=WIDTH, hidden_size=WIDTH, num_heads=2, mlp_ratio=2
    )
    return _qwen(hf.Qwen2VLConfig, tower, hf.Qwen2VLTextConfig, hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLProcessor)


def qwen2_5_vl() -> tuple[Any, Any]:
    """Qwen2.5-VL: window attention in the tower."""
    tower = hf.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(
        depth=2, hidden_size=WIDTH, intermediate_size=64, num_heads=2, out_hidden_size=WIDTH, fullatt_block_indexes=[1]
    )
    return _qwen(
        hf.Qwen2_5_VLConfig,
        tower,
        hf.Qwen2_5_VLTextConfig,
        hf.Qwen2_5_VLForConditionalGeneration,
        hf.Qwen2_5_VLProcessor,
    )


def internvl() -> tuple[Any, Any]:
    """InternVL 3 in the library's own form."""
    tokenizer = chatml(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    processor = hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=False),
        tokenizer=tokenizer,
        video_processor=hf.InternVLVideoProcessor(size={"height": 56, "width": 56}),
        image_seq_length=4,
        chat_template=CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"),
    )
    tower = hf.InternVLVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=(56, 56),
        patch_size=(14, 14),
    )
    config = hf.InternVLConfig(
        vision_config=tower,
        text_config=text(hf.Qwen2Config, tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return hf.InternVLForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    """Gemma 3: the image's tokens see each other, text around them in the processor."""
    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
        "turn_start_token": "<start_of_turn>",
    }
    tokenizer = tokens(names, pad_token="<pad>", eos_token="<end_of_turn>", bos_token="<bos>", unk_token="<unk>")
    processor = hf.Gemma3Processor(
        image_processor=hf.Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=GEMMA,
    )
    config = hf.Gemma3Config(
        vision_config=vision(hf.SiglipVisionConfig),
        text_config=text(hf.Gemma3TextConfig, tokenizer, head_dim=16),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        tie_word_embeddings=False,
    )
    return hf.Gemma3ForConditionalGeneration(config), processor


def idefics3() -> tuple[Any, Any]:
    """Idefics3: tiles with row and column marks around each."""
    marks = {f"r{i}c{j}": f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)}
    tokenizer = chatml(
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        end_of_utterance_token="<end_of_utterance>",
        global_image_token="<global-img>",
        **marks,
    )
    processor = hf.Idefics3Processor(
        hf.Idefics3ImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}),
        tokenizer,
        image_seq_len=4,
        chat_template=CHATML.replace("IMAGE", "<image>"),
    )
    tower = hf.models.idefics3.configuration_idefics3.Idefics3VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    config = hf.Idefics3Config(
        vision_config=tower,
        text_config=text(hf.LlamaConfig, tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return hf.Idefics3ForConditionalGeneration(config), processor


def paligemma() -> tuple[Any, Any]:
    """PaliGemma: no chat template on the hub; the prompt's tokens all see each other."""
    tokenizer = tokens(
        {"image_token": "<image>"}, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    image_processor = hf.SiglipImageProcessor(size={"height": 56, "width": 56})
    image_processor.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(image_processor=image_processor, tokenizer=tokenizer)
    config = hf.PaliGemmaConfig(
        vision_config=vision(hf.SiglipVisionConfig),
        text_config=text(hf.GemmaConfig, tokenizer, head_dim=16),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=WIDTH,
        tie_word_embeddings=False,
    )
    return hf.PaliGemmaForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    made.__name__: made
    for made in (llava_next, llava_onevision, qwen2_vl, qwen2_5_vl, internvl, gemma3, idefics3, paligemma)
}


def save(family: str, directory: Path) -> Path:
    """The family's checkpoint, as its classes write it."""
    torch.manual_seed(0)
    model, processor = FAMILIES[family]()
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
