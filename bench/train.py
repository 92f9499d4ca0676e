"""Steps per second of our DPO beside plain TRL's: the same rows, model, batches, adapter and optimizer, in one run.

    python -m bench.train [--shape mini | nano | 7b] [--rounds 5] [--steps 6]

Three ways of one step take turns, round by round: `trl`, its unmodified DPOTrainer, which forwards the reference on the
fly; `cached`, with the reference's log-probs read from disk; `shared`, which passes image and question once for both
responses, too. Each round is a training of its own by `train()`; its first step is left out. The others see the same
batches in each round, so that a step's time is its median over the rounds; the means over steps are compared. On the CPU a
step's time is this process's own, on one thread, so that its neighbours on the machine do not count. Filling the cache is
one forward of each row, once for all runs; it is timed apart (`reference_s`, with the start).

Shapes:

    mini    LLaVA-1.5-7B in miniature: 576 image tokens, chains of about 100, and about its shares of tower (5 % of the
            weights) and adapter (3 %); 2 layers of width 512, random weights. No dropout: a CPU draws its masks so slowly
            that they hide what the passes cost (docs/lab-notes.md has both)
    nano    the nano checkpoint with its own recipe, dropout 0.1: 4 image tokens, chains of 23, an adapter half as wide
            as the model. The headline, and the last line
    7b      LLaVA-1.5-7B's shape with random weights, for a GPU: bfloat16, gradient checkpointing, the paper's adapter

On a GPU also peak memory, tokens per second, and the share of the matrix rate that a large product reaches there: 4 x
parameters x tokens operations a step, since frozen weights have no gradients; neither what is computed again counts, nor
what `trl` forwards for its reference.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PrinterCallback,
    TrainerCallback,
)
from trl import DPOTrainer

from vcot.pipeline.images import ImageStore
from vcot.pipeline.pairs import PreferencePair
from vcot.pipeline.prompts import render_prompt
from vcot.pipeline.publish import publish_pairs
from vcot.pipeline.sources.nano.questions import generate_nano, render_target
from vcot.services.recipes.recipe import load_recipe
from vcot.training.dpo.fit import adapt_model, lora_config, training_arguments
from vcot.training.dpo.reference import attach_reference
from vcot.training.dpo.rows import PairCollator, check_pairs, load_pairs
from vcot.training.model.loading import free_memory, load_model, load_processor, quiet_libraries
from vcot.training.model.template import Processor
from vcot.training.protocol.train_sections import TrainSection

NANO = Path(__file__).parents[1] / "training" / "checkpoints" / "nano"
WAYS = ("trl", "cached", "shared")
_LLAVA = {"image_size": 336, "patch_size": 14}


@dataclass(frozen=True)
class Shape:
    """What is trained."""

    make_model: Callable[[], Any]
    processor: Processor
    rows: Dataset
    recipe: TrainSection


def make_shape(name: str, folder: Path, batch_size: int, num_rows: int) -> Shape:
    processor, _ = load_processor(NANO)
    if name != "nano":
        size = _LLAVA["image_size"]
        crop = {"height": size, "width": size}
        processor = copy.deepcopy(processor)
        processor.image_processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size=crop)
        processor.patch_size = _LLAVA["patch_size"]
    settings = [f"train.batch_size={batch_size}", "train.max_length=4096", "train.epochs=1000"]
    if name in ("mini", "tiny"):
        settings += ["train.lora_r=8", "train.lora_alpha=16", "train.lora_dropout=0"]
    if name == "7b":
        settings += ["train.dtype=bfloat16", "train.gradient_checkpointing=true", "train.learning_rate=1e-5"]
    recipe = load_recipe("nano", settings).train
    num_chains = 1 if name == "nano" else 4
    rows, found = check_pairs(
        make_rows(folder, num_rows, num_chains),
        processor,
        max_length=recipe.max_length,
        max_image_side=recipe.max_image_side,
    )
    assert found.num_kept == num_rows, found.refused
    makers = {
        "nano": lambda: load_model(NANO, torch.float32),
        "mini": _mini,
        "7b": _llava_7b,
        "tiny": _tiny,
    }
    return Shape(makers[name], processor, rows, recipe)


def make_rows(folder: Path, count: int, num_chains: int) -> Dataset:
    """Pairs of the nano world: its prompts, a right chain of thought with some of other questions, and those alone."""
    store = ImageStore(folder)
    tasks = list(generate_nano("train", count + num_chains, 0, store))
    chains = [render_target(task, "thought_specific") for task in tasks]
    pairs = [
        PreferencePair(
            task=task.id,
            images=task.images,
            prompt=render_prompt("thought_specific", task),
            chosen=" ".join(chains[i : i + num_chains]),
            rejected=" ".join(chains[i + 1 : i + 1 + num_chains]) + " no",
            chosen_key=f"{task.id}/0",
            rejected_key=f"{task.id}/1",
            chosen_score=1.0,
            rejected_score=0.0,
            judge="verifier/1",
            policy="sha256:0",
        )
        for i, task in enumerate(tasks[:count])
    ]
    publish_pairs(pairs, pairs[:1], store, folder / "pairs", card=lambda _: "")
    return load_pairs(folder / "pairs" / "train.parquet")


def _mini(width: int = 512, num_layers: int = 2) -> Any:
    """Nano's classes with LLaVA's grid of patches; random weights, since only time counts."""
    config = LlavaConfig.from_pretrained(NANO)
    config.vision_config.update(_LLAVA)
    config.text_config.update(
        {
            "hidden_size": width,
            "intermediate_size": width * 5 // 2,
            "num_hidden_layers": num_layers,
            "num_attention_heads": width // 32,
            "num_key_value_heads": width // 32,
        }
    )
    config.image_seq_length = (_LLAVA["image_size"] // _LLAVA["patch_size"]) ** 2
    return LlavaForConditionalGeneration(config).eval()


def _tiny() -> Any:
    return _mini(width=32, num_layers=1)


def _llava_7b() -> Any:
    """llava-hf/llava-1.5-7b-hf from its numbers, with random weights, on the GPU in bfloat16."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            projection_dim=768,
            **_LLAVA,
        ),
        text_config=LlamaConfig(
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            max_position_embeddings=4096,
        ),
        image_token_index=load_processor(NANO)[0].image_token_id,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(before)
    return model.eval()


def now_s() -> float:
    """The GPU's work done and the time; without one, the CPU time of this process."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds of each step, collating and optimizer included, the first left out."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.ends.append(now_s())

    @property
    def steps(self) -> list[float]:
        return [end - begin for begin, end in itertools.pairwise(self.ends)]


def build(shape: Shape, way: str, folder: Path) -> DPOTrainer:
    """A trainer for one way of doing the same."""
    model, recipe = shape.make_model(), shape.recipe
    if way != "trl":
        arguments = training_arguments(recipe, folder, way)
        trainer = adapt_model(model, shape.rows, shape.rows.select([]), shape.processor, recipe, arguments)
        attach_reference(trainer, recipe, folder / "reference", "random", lambda done, total: None)
        assert trainer.shares_prompts, "prompts cannot be shared; the log says why"
        trainer.shares_prompts = way == "shared"
        return trainer
    return DPOTrainer(
        model=model,
        args=training_arguments(recipe, folder, way),
        data_collator=PairCollator(shape.processor, recipe.max_image_side),
        train_dataset=shape.rows,
        processing_class=shape.processor,
        peft_config=lora_config(model, recipe),
    )


def time_way(shape: Shape, way: str, folder: Path, num_steps: int) -> tuple[list[float], float]:
    """Seconds of each step, and the peak of GPU memory in GB."""
    torch.manual_seed(0)
    trainer = build(shape, way, folder)
    trainer.args.max_steps = num_steps + 1
    clock = _Clock()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    del trainer
    free_memory()
    return clock.steps, peak


def measure(name: str, rounds: int, num_steps: int, batch_size: int) -> dict[str, Any]:
    """All ways of one shape."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shape = make_shape(name, folder, batch_size, num_rows=2 * batch_size)
        begin = now_s()
        build(shape, "shared", folder)
        reference_s = now_s() - begin
        free_memory()
        times: dict[str, list[list[float]]] = {way: [] for way in WAYS}
        peaks = dict.fromkeys(WAYS, 0.0)
        for number in range(rounds):
            for way in WAYS:
                steps, peak = time_way(shape, way, folder, num_steps)
                times[way].append(steps)
                peaks[way] = max(peaks[way], peak)
                print(f"{name} round {number + 1}: {way} {statistics.median(steps):.3f} s a step", file=sys.stderr)
        return report(shape, name, times, peaks, reference_s)


def report(
    shape: Shape, name: str, times: dict[str, list[list[float]]], peaks: dict[str, float], reference_s: float
) -> dict[str, Any]:
    """The figures of one shape; `times` holds each round's steps."""
    step_s = {way: statistics.mean(map(statistics.median, zip(*rounds, strict=True))) for way, rounds in times.items()}
    batch = PairCollator(shape.processor, shape.recipe.max_image_side)(
        [*shape.rows.select(range(len(shape.rows) // 2))]
    )
    num_tokens, num_answers = int(batch["attention_mask"].sum()), int(batch["completion_mask"].sum())
    found = {
        "shape": name,
        "cached_vs_trl": round(step_s["trl"] / step_s["cached"], 3),
        "shared_prompt_vs_trl": round(step_s["trl"] / step_s["shared"], 3),
        "step_s": {way: round(value, 4) for way, value in step_s.items()},
        "prompt_share": round(1 - num_answers / num_tokens, 3),
        "tokens_a_step": num_tokens,
        "pairs_a_step": shape.recipe.batch_size,
        "reference_s": round(reference_s, 2),
    }
    if torch.cuda.is_available():
        parameters = sum(p.numel() for p in shape.make_model().parameters())
        rate = matrix_rate()
        found["peak_gb"] = {way: round(value, 1) for way, value in peaks.items()}
        found["tokens_per_s"] = {way: round(num_tokens / value) for way, value in step_s.items()}
        found["matrix_share"] = {w: round(4 * parameters * num_tokens / s / rate, 3) for w, s in step_s.items()}
    return found


def matrix_rate(size: int = 8192) -> float:
    """Operations per second of a large bfloat16 product on this GPU."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    begin = now_s()
    for _ in range(20):
        a @ a
    return 20 * 2 * size**3 / (now_s() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.train", description="Steps per second beside plain TRL.")
    parser.add_argument("--shape", choices=("nano", "mini", "7b", "tiny"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="timed steps in a round")
    options = parser.parse_args()
    if options.shape == "7b" and not torch.cuda.is_available():
        parser.error("--shape 7b needs a GPU")
    logging.disable(logging.WARNING)
    quiet_libraries()
    torch.set_num_threads(1)
    batch_sizes = {"nano": 8, "mini": 2, "7b": 4, "tiny": 2}
    for name in (options.shape,) if options.shape else ("mini", "nano"):
        print(json.dumps(measure(name, options.rounds, options.steps, batch_sizes[name])))


if __name__ == "__main__":
    main()
