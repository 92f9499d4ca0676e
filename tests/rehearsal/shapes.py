"""Checkpoints in the shape of the real ones, with random weights in sizes that two cores can serve and train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save

from tests.training.families import CHATML, chatml

FILES_OF_LLAVA = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
NARROW_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
NARROW_TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
"""24 layers at 336 pixels as in the real one: an image is 576 tokens."""
SAMPLING_TRAP = {"do_sample": True, "temperature": 0.1, "top_p": 0.05, "repetition_penalty": 2.0, "max_new_tokens": 3}
"""What nobody who asks for a temperature of his own may be answered with."""
OLD_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
"""Names of today's classes, and of the hub's files."""


def llava_files(small_files: Path) -> dict[str, bytes]:
    """The hub's files of LLaVA-1.5-7B: its own tokenizer, processor and template; narrow random weights in three shards."""
    config = json.loads((small_files / "config.json").read_text())
    config["text_config"] |= NARROW_TEXT
    config["vision_config"] |= NARROW_TOWER
    generation = json.loads((small_files / "generation_config.json").read_text()) | SAMPLING_TRAP
    files = {name: (small_files / name).read_bytes() for name in FILES_OF_LLAVA}
    files["config.json"] = json.dumps(config, indent=2).encode()
    files["generation_config.json"] = json.dumps(generation, indent=2).encode()
    return files | _shards(_old_names(_draw_llava(config)))


def _draw_llava(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(**config))
    _shape_answers(model, eos=2, stopping=3.0)
    return model.half().state_dict()


def _shape_answers(model: Any, eos: int, stopping: float) -> None:
    """Without this every token is as likely as any other, and no answer ends: some do now, and some are cut off."""
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.2)
        model.lm_head.weight[eos] *= stopping


def _old_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        new, old = next(pair for pair in OLD_NAMES if name.startswith(pair[0]))
        renamed[old + name.removeprefix(new)] = tensor.contiguous()
    return renamed


def _shards(tensors: dict[str, torch.Tensor], count: int = 3) -> dict[str, bytes]:
    """safetensors files of about a third of the tensors each, and their index."""
    names, size = list(tensors), -(-len(tensors) // count)
    files, weight_map = {}, {}
    for number in range(count):
        shard = f"model-{number + 1:05}-of-{count:05}.safetensors"
        held = names[number * size : (number + 1) * size]
        weight_map |= dict.fromkeys(held, shard)
        files[shard] = save({name: tensors[name] for name in held}, {"format": "pt"})
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return files | {"model.safetensors.index.json": json.dumps(index, indent=2).encode()}


def save_qwen2_5_vl(directory: Path) -> Path:
    """Qwen2.5-VL's structure: window attention in the tower, M-RoPE, ChatML, images of any shape; byte by byte a word."""
    names = {
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    }
    tokenizer = chatml(**names)
    size = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
    processor = hf.Qwen2_5_VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(size=size),
        chat_template=CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    tower = hf.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(
        depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128, fullatt_block_indexes=[1]
    )
    text = hf.Qwen2_5_VLTextConfig(
        **NARROW_TEXT,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = hf.Qwen2_5_VLConfig(
        vision_config=tower,
        text_config=text,
        tie_word_embeddings=False,
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    torch.manual_seed(0)
    model = hf.Qwen2_5_VLForConditionalGeneration(config)
    _shape_answers(model, tokenizer.eos_token_id, stopping=4.0)
    model.half().save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
