"""The canary: a fixed image and question and how the Hugging Face model answers, to recognise served weights by.

The image is drawn here, in code; the question is one that a small and a large model can both answer. Tokens are greedy,
log-probs are computed in float32 from the checkpoint's stored weights, so that they do not depend on what serves it. What
is written down are token ids: how one decodes by itself depends on the tokenizer and on who decodes.

    python -m vcot.training.model.canary CHECKPOINT_DIR --out FILE [--name base]

writes a base checkpoint's manifest, and beside it `chat_template.jinja` where the checkpoint's own had to be mended.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import GenerationConfig

from vcot.pipeline.errors import VcotError
from vcot.pipeline.files import replace_file, write_record
from vcot.pipeline.identity import compute_digest
from vcot.pipeline.manifest import Canary, CheckpointManifest
from vcot.pipeline.records import CheckpointRef
from vcot.training.model.loading import Batch, Model, load_model, load_processor, quiet_libraries
from vcot.training.model.template import Processor, render

PROMPT = (
    "Please select the correct answer from one of the following options based on the question and the image.\n"
    "First, write down your internal thoughts. This must include your draft response and its evaluations.\n"
    "Then write your final response in the 'The answer is (answer)' format.\n"
    "Question: What is the colour of the circle?\n"
    "Options: (A) red (B) blue (C) green (D) yellow"
)
MAX_TOKENS = 16
_MAX_SIDE = 336
_COLOURS = {"red": (205, 30, 40), "blue": (35, 80, 205), "green": (30, 145, 60), "yellow": (235, 205, 40)}


def draw_canary(side: int) -> Image.Image:
    """Circle, square, diamond and cross in a 2 x 2 grid, as an RGB image of `side` pixels."""
    image = Image.new("RGB", (side, side), (246, 246, 240))
    draw, half, pad = ImageDraw.Draw(image), side // 2, side // 14
    low, high, middle, bar = pad, half - pad - 1, half // 2, max(1, side // 20)
    draw.ellipse((low, low, high, high), fill=_COLOURS["red"])
    draw.rectangle((half + low, low, half + high, high), fill=_COLOURS["blue"])
    diamond = [(middle, half + low), (high, half + middle), (middle, half + high), (low, half + middle)]
    draw.polygon(diamond, fill=_COLOURS["green"])
    draw.rectangle((half + low, half + middle - bar, half + high, half + middle + bar), fill=_COLOURS["yellow"])
    draw.rectangle((half + middle - bar, half + low, half + middle + bar, half + high), fill=_COLOURS["yellow"])
    return image


def build_canary(model: Model, processor: Processor) -> Canary:
    """Ask `model` (float32) the fixed question and write down its greedy answer, at most MAX_TOKENS long."""
    image = draw_canary(_image_side(processor))
    batch = _prompt_batch(processor, image)
    tokens, logprobs, leads = _answer(model, processor, batch)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Canary(
        image_png_base64=base64.b64encode(buffer.getvalue()).decode(),
        prompt=PROMPT,
        prompt_tokens=tuple(batch["input_ids"][0].tolist()),
        tokens=tuple(tokens),
        logprobs=tuple(logprobs),
        leads=tuple(leads),
    )


def _prompt_batch(processor: Processor, image: Image.Image) -> Batch:
    """The prompt as vLLM's chat endpoint tokenizes it, with the image's tensors."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}
    text = render(processor, [turn], prompt=True)
    return dict(processor(images=[[image]], text=[text], add_special_tokens=False, return_tensors="pt"))


def _answer(model: Model, processor: Processor, batch: Batch) -> tuple[list[int], list[float], list[float]]:
    """Greedy token ids, their log-probs, and by how much each leads the runner-up."""
    inputs = {key: value.to(model.device) for key, value in batch.items()}
    tokenizer = processor.tokenizer
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with torch.inference_mode(), _without_defaults(model):
        output = model.generate(**inputs, generation_config=settings)
    best = torch.cat(output.logits).float().log_softmax(dim=-1).topk(2)
    ids = best.indices[:, 0].tolist()
    return ids, best.values[:, 0].tolist(), (best.values[:, 0] - best.values[:, 1]).tolist()


@contextmanager
def _without_defaults(model: Model) -> Iterator[None]:
    """Without the checkpoint's own generation config: what a call leaves open, as a repetition penalty, comes from there."""
    defaults, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = defaults


def _image_side(processor: Processor) -> int:
    crop = getattr(processor.image_processor, "crop_size", None)
    return min(int(crop["height"]), _MAX_SIDE) if crop else _MAX_SIDE


def describe_base(directory: Path, name: str) -> tuple[CheckpointManifest, str | None]:
    """A base checkpoint's manifest, and the chat template to serve it with where its own had to be mended.

    Raises CheckpointError for a directory that is not a servable checkpoint.
    """
    digest = compute_digest(directory)
    processor, mended = load_processor(directory)
    canary = build_canary(load_model(directory, torch.float32, "spread"), processor)
    ref = CheckpointRef(name=name, digest=digest, kind="base")
    return CheckpointManifest(checkpoint=ref, canary=canary), processor.chat_template if mended else None


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="vcot.training.model.canary", description="Write a base checkpoint's manifest."
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="base")
    options = parser.parse_args(arguments)
    quiet_libraries()
    try:
        manifest, template = describe_base(options.checkpoint, options.name)
    except VcotError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if template is not None:
        replace_file(options.out.with_name("chat_template.jinja"), template)
    write_record(options.out, manifest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
