"""Builds a nano model from scratch on one core: `python -m vcot.training.nano [--architecture qwen] --out DIR`.

Five stages. *tower*: the vision tower and its projector learn to name what is in each cell (without it the whole model
learns the text and stays blind). *lookup*: the language model learns to bind an option's word to its letter. *describe*:
many looks at each image, so that a thing's name leads to its colour, price and place. *joint*: thoughts and answers under
the real prompts, with a share of the former kept in. *careless*: the same with responses that often misread the scene, so
that the model knows better than it answers, as one that was taught by a noisy teacher does, and preference training has
something to win.

A batch is a function of (seed, stage, step) and a stage is saved every so often in one atomic step, so a build that was
killed goes on where it stopped and ends with the same weights.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from vcot.pipeline.errors import CheckpointError
from vcot.pipeline.identity import write_manifest
from vcot.training.model.canary import describe_base
from vcot.training.model.loading import Model
from vcot.training.nano.architecture import Architecture, Features, build_tokenizer
from vcot.training.nano.batches import (
    CELL_WORDS,
    IGNORED,
    Batch,
    build_corpus,
    draw_conversations,
    draw_descriptions,
    draw_lookups,
)
from vcot.training.nano.llava import Llava
from vcot.training.nano.quiz import draw_examples, measure_accuracy, measure_nano, sample_responses
from vcot.training.nano.qwen import Qwen
from vcot.training.nano.readme import write_card
from vcot.training.nano.schedule import PROMPT_SHARES, STAGES, ArchitectureName, NanoPlan, make_plan

ARCHITECTURES: Mapping[ArchitectureName, Architecture] = {"llava": Llava(), "qwen": Qwen()}


def print_line(line: str) -> None:
    """To standard output at once, so that a pipe shows progress."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@dataclass
class Build:
    """What a build changes as it goes."""

    model: Model
    tokenizer: PreTrainedTokenizerFast
    plan: NanoPlan

    @property
    def architecture(self) -> Architecture:
        """What the model is an example of."""
        return ARCHITECTURES[self.plan.architecture]

    def look(self, batch: Batch) -> Features:
        """What the tower makes of the batch's scenes."""
        return self.architecture.look(self.model, batch.pixels)

    def naming_loss(self, features: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """How badly each image token names the thing, colour, price and place of its cell.

        It is compared with the words' own embeddings (which get no gradient), so that what the tower sees arrives in the
        language model's terms. features (rows x 4, width) in reading order; cells (rows, 4, 3).
        """
        places = torch.arange(4).repeat(len(cells))
        named = [*zip(CELL_WORDS, cells.flatten(0, 1).T, strict=True)]
        named += [(("top", "bottom"), places // 2), (("left", "right"), places % 2)]
        loss = torch.zeros(())
        for words, labels in named:
            ids = self.tokenizer.convert_tokens_to_ids([f" {word}" for word in words])
            logits = features @ self.model.get_input_embeddings().weight[ids].detach().T
            if (labels != IGNORED).any():
                loss = loss + functional.cross_entropy(logits, labels, ignore_index=IGNORED)
        return loss

    def response_loss(self, batch: Batch, features: Features | None) -> torch.Tensor:
        """Weighted mean cross-entropy of the labelled tokens: the model's own forward pass, heads where a label is only."""
        hidden = self.architecture.read(self.model, batch.ids, features)
        labelled = batch.labels != IGNORED
        logits = self.model.lm_head(hidden[labelled])
        losses = functional.cross_entropy(logits, batch.labels[labelled], reduction="none")
        weights = batch.weights[labelled]
        mean: torch.Tensor = (losses * weights).sum() / weights.sum()
        return mean

    def loss(self, stage: str, step: int) -> torch.Tensor:
        """Of the batch that (seed, stage, step) determines."""
        rng = random.Random(f"{self.plan.seed}/{stage}/{step}")
        rows, source = self.plan.rows[stage], (rng, self.tokenizer, self.architecture.turns)
        if stage == "lookup":
            return self.response_loss(draw_lookups(*source, rows), None)
        if stage in ("tower", "describe"):
            batch = draw_descriptions(*source, rows)
        else:
            misread = self.plan.misread if stage == "careless" else {}
            batch = draw_conversations(*source, rows, PROMPT_SHARES, misread)
        features = self.look(batch)
        named = self.naming_loss(features.tokens, batch.cells)
        if stage == "tower":
            return named
        lookups = self.response_loss(draw_lookups(*source, max(2, rows // 4)), None)
        loss = self.response_loss(batch, features) + 0.1 * named + lookups
        if stage != "joint":
            return loss
        kept = draw_descriptions(*source, max(2, rows // 4))
        return loss + 0.5 * self.response_loss(kept, self.look(kept))


class Progress:
    """The saved state of an unfinished build: one file, replaced in one step, so that there is always a whole one."""

    def __init__(self, work: Path) -> None:
        self._path = work / "progress.pt"

    def save(self, build: Build, stage: str, step: int, optimizer: torch.optim.Optimizer) -> None:
        """After `step` steps of `stage`. The batches need no random state: (seed, stage, step) determines them."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        state = {
            "plan": repr(build.plan),
            "stage": stage,
            "step": step,
            "model": build.model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        torch.save(state, partial)
        partial.replace(self._path)

    def load(self, build: Build) -> tuple[str, int, dict[str, Any]]:
        """Fill `build` and return (stage, steps done, optimizer state); the very beginning where nothing is saved."""
        if not self._path.exists():
            return STAGES[0], 0, {}
        state = torch.load(self._path, weights_only=True)
        if state["plan"] != repr(build.plan):
            raise CheckpointError(f"{self._path} belongs to another plan; delete it, or give another --work")
        build.model.load_state_dict(state["model"])
        return state["stage"], state["step"], state["optimizer"]


def build_nano(
    out: Path,
    plan: NanoPlan,
    *,
    work: Path | None = None,
    report: Callable[[str], None] = print_line,
) -> None:
    """Train a nano model and save it with its card to `out`; the same call again goes on where a killed one stopped.

    `work` (by default `<out>.work`) keeps the state of an unfinished build. `report` gets one line at a time. Raises
    CheckpointError where `work` belongs to a build with another plan.
    """
    torch.set_num_threads(1)
    begun = time.monotonic()
    progress = Progress(work or out.with_name(f"{out.name}.work"))
    torch.manual_seed(plan.seed)
    architecture = ARCHITECTURES[plan.architecture]
    tokenizer = build_tokenizer(build_corpus(architecture, plan.seed), architecture.tokens)
    model = architecture.build_model(tokenizer)
    build = Build(model, tokenizer, plan)
    stage, step, optimizer_state = progress.load(build)
    for name in STAGES[STAGES.index(stage) :]:
        _train_stage(build, name, step, optimizer_state, progress, report)
        step, optimizer_state = 0, {}
    model.eval()
    processor = architecture.build_processor(tokenizer)
    architecture.save(model, processor, out)
    report(f"saved {out} after {time.monotonic() - begun:.0f} s; measuring it")
    write_card(out, measure_nano(model, processor, plan.num_eval_tasks), plan, architecture)
    write_manifest(out, describe_base(out, architecture.checkpoint_name)[0])


def _train_stage(
    build: Build,
    stage: str,
    first_step: int,
    optimizer_state: dict[str, Any],
    progress: Progress,
    report: Callable[[str], None],
) -> None:
    plan, num_steps = build.plan, build.plan.steps[stage]
    parameters = list(build.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate[stage], betas=(0.9, 0.98), weight_decay=0.01)
    if optimizer_state:
        optimizer.load_state_dict(optimizer_state)
    begun = time.monotonic()
    for step in range(first_step, num_steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate[stage] * _schedule(step, num_steps)
        loss = build.loss(stage, step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        done = step + 1
        if done % 50 == 0 or done == num_steps:
            left_s = (time.monotonic() - begun) / (done - first_step) * (num_steps - done)
            report(f"{stage} {done}/{num_steps} loss {loss.item():.3f}, {left_s:.0f} s to go")
        if done % plan.save_every == 0 or done == num_steps:
            progress.save(build, stage, done, optimizer)
        if done % plan.eval_every == 0 and stage in ("joint", "careless"):
            _report_accuracy(build, done, report)


def _schedule(step: int, num_steps: int) -> float:
    """Share of the peak learning rate: 50 steps of warm-up, then a cosine down to a tenth."""
    return min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / num_steps))


def _report_accuracy(build: Build, step: int, report: Callable[[str], None]) -> None:
    examples = draw_examples("validation", 90, seed=1)
    build.model.eval()
    processor = build.architecture.build_processor(build.tokenizer)
    for prompt in ("zero_shot", "cot"):
        texts = sample_responses(build.model, processor, examples, prompt, temperature=0)
        shares = ", ".join(f"{name} {share:.0%}" for name, share in measure_accuracy(examples, texts).items())
        report(f"  step {step} {prompt}: {shares}")
    build.model.train()


def main() -> None:
    """`python -m vcot.training.nano --out DIR [--architecture NAME] [--work DIR] [--seed N]`."""
    parser = argparse.ArgumentParser(description="Build a nano model from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoint goes")
    parser.add_argument("--architecture", choices=get_args(ArchitectureName), default="llava")
    parser.add_argument("--work", type=Path, help="where the state of an unfinished build is kept (OUT.work)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build_nano(arguments.out, make_plan(arguments.architecture, arguments.seed), work=arguments.work)
