"""Reads files of vcot with the libraries of its own environment, and prints what it found as JSON; imports nothing of vcot.

    python read_files.py FILES.json

FILES.json names `pairs` (a published data set), `checkpoints` (each with the class of its model and the folders `base`,
`merged` and `adapters`) and `cache`, an empty folder.
"""

import base64
import hashlib
import io
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from datasets import load_dataset
from huggingface_hub import DatasetCard, ModelCard
from peft import PeftModel
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

SPLITS = ("train", "validation")


def read_pairs(folder, cache):
    """Each split's rows, by both ways to load them."""
    files = {name: f"{folder}/{name}.parquet" for name in SPLITS}
    ways = {
        "folder": load_dataset(folder, cache_dir=f"{cache}/folder"),
        "files": load_dataset("parquet", data_files=files, cache_dir=f"{cache}/files"),
    }
    return {way: {name: [describe(row) for row in split] for name, split in data.items()} for way, data in ways.items()}


def describe(row):
    """The row with its image's mode and pixels as a hash."""
    return {**row, "images": [[image.mode, hashlib.sha256(image.tobytes()).hexdigest()] for image in row["images"]]}


def ask(files):
    """The canary's tokens and log-probs by the base, the merged checkpoint and each adapter on the base."""
    canary = json.loads((Path(files["merged"]) / "checkpoint.json").read_text("utf-8"))["canary"]
    build = getattr(transformers, files["class"])
    processors = {name: AutoProcessor.from_pretrained(files[name]) for name in ("base", "merged")}
    tokenizer = AutoTokenizer.from_pretrained(files["merged"])
    answers = {name: answer(build.from_pretrained(files[name]), processors[name], canary) for name in processors}
    for name, adapter in files["adapters"].items():
        policy = PeftModel.from_pretrained(build.from_pretrained(files["base"]), adapter)
        answers[name] = answer(policy, processors["merged"], canary)
    prompt = canary["prompt"]
    return {
        "answers": answers,
        "same_tokenizer": tokenizer(prompt).input_ids == processors["base"].tokenizer(prompt).input_ids,
    }


@torch.inference_mode()
def answer(model, processor, canary):
    """Greedy tokens, their log-probs and the prompt's tokens."""
    content = [{"type": "image"}, {"type": "text", "text": canary["prompt"]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = Image.open(io.BytesIO(base64.b64decode(canary["image_png_base64"])))
    inputs = processor(images=[image], text=[text], add_special_tokens=False, return_tensors="pt")
    tokens = processor.tokenizer
    out = (
        model.eval()
        .float()
        .generate(
            **inputs,
            do_sample=False,
            max_new_tokens=len(canary["tokens"]),
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
    )
    best = torch.cat(out.logits).log_softmax(-1).max(-1)
    return {
        "prompt": inputs["input_ids"][0].tolist(),
        "tokens": best.indices.tolist(),
        "logprobs": best.values.tolist(),
    }


def main():
    files = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    found = {
        "versions": {name: version(name) for name in ("datasets", "transformers", "peft", "huggingface-hub")},
        "pairs": read_pairs(files["pairs"], files["cache"]),
        "pairs_card": DatasetCard.load(f"{files['pairs']}/README.md").data.to_dict(),
        "checkpoints": {name: ask(checkpoint) for name, checkpoint in files["checkpoints"].items()},
        "cards": {
            f"{name} {kind}": ModelCard.load(f"{folder}/README.md").data.to_dict()
            for name, checkpoint in files["checkpoints"].items()
            for kind, folder in [("merged", checkpoint["merged"]), *checkpoint["adapters"].items()]
        },
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
