"""The nano checkpoint's model card, written by the build from what it measured."""

from __future__ import annotations

import json
from pathlib import Path

from vcot.pipeline.sources.nano.questions import FAMILIES, SUBJECTS
from vcot.training.nano.architecture import Architecture
from vcot.training.nano.quiz import Measurement
from vcot.training.nano.schedule import NanoPlan

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [{model_type}, miniature, vcot]
---

# {title}

A `{model_class}` with {parameters:.1f} million parameters that answers multiple-choice questions
about the drawn scenes of vcot's *nano world* (`pipeline/sources/nano`), with or without a written thought. It exists
so that the whole loop (sample, judge, train, swap, evaluate) runs in minutes on two cores without a download. It is a
miniature of the experiment and not a language model: it knows about {num_words} words and nothing outside its world.

## Architecture
{architecture}

The tokenizer has {vocabulary} pieces: the words of the nano world, option letters such as ` (B)`, whole options such as
` (B) red`, `<R>` (an ordinary piece), each instruction sentence of `pipeline/prompts` as one piece (which makes prompts
short), and 256 bytes for everything else. Decoding gives back any text exactly.

## How it was made
`{command}` (seed {seed}, one core), five stages:

| stage | steps | rows a step | what it teaches |
|---|---|---|---|
| tower | {steps[tower]} | {rows[tower]} | tower and projector name each cell's thing, colour, price and place |
| lookup | {steps[lookup]} | {rows[lookup]} | text only: an option's word to its letter |
| describe | {steps[describe]} | {rows[describe]} | many statements or one-word answers about one scene |
| joint | {steps[joint]} | {rows[joint]} | thoughts and answers under the four prompts |
| careless | {steps[careless]} | {rows[careless]} | the same, but responses often misread the scene |

Naming cells and looking up options go on beside *describe* and all later stages, describing beside *joint*. Attention starts
as a match of like with like (keys equal queries), and an option's embedding as the sum of its letter's and its word's.

The last stage is there on purpose. Its responses read a scene wrongly in a share of rows
({misread}),
and reason rightly from the wrong reading. So the model knows better than it answers, its samples differ in quality, and
preference training has something to win, as with a large model that was taught by a noisy one. Nothing was trained on
the validation or test split.

## Measured
Accuracy on {num_tasks} held-out tasks (validation split) at temperature {temperature}; chance is 25 %.

{table}

An answer could be parsed in {formats}.

Groups of {group_size} responses to {num_groups} tasks at temperature {group_temperature} (`thought_specific`):
{mixed_answers:.0%} hold right and wrong answers, {mixed_statements:.0%} differ in the share of their statements that is
true; of all statements {true_statements:.0%} are true.

## Limits
Anything but the nano world's questions gets an answer without meaning. Figures of this model say that the machinery
works; they say nothing about a method's worth on real models. Licence: Apache-2.0.
"""


def write_card(checkpoint: Path, measured: Measurement, plan: NanoPlan, architecture: Architecture) -> None:
    """Write `README.md` into a saved nano checkpoint."""
    (checkpoint / "README.md").write_text(_render_card(checkpoint, measured, plan, architecture), "utf-8")


def _render_card(checkpoint: Path, measured: Measurement, plan: NanoPlan, architecture: Architecture) -> str:
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    vocabulary = json.loads((checkpoint / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    choice = "" if plan.architecture == "llava" else f"--architecture {plan.architecture} "
    return _CARD.format(
        parameters=(checkpoint / "model.safetensors").stat().st_size / 4e6,
        num_words=len({piece.strip().lower() for piece in vocabulary if piece.strip().isalpha()}),
        title=architecture.title,
        model_type=config["model_type"],
        model_class=config["architectures"][0],
        architecture=architecture.describe(config),
        command=f"python -m vcot.training.nano {choice}--out DIR",
        vocabulary=len(vocabulary),
        seed=plan.seed,
        steps=plan.steps,
        rows=plan.rows,
        misread=", ".join(f"{family} {share:.0%}" for family, share in plan.misread.items()),
        table=_render_table(measured),
        formats=", ".join(f"{shares['format']:.1%} ({name})" for name, shares in measured.accuracy.items()),
        **{name: value for name, value in vars(measured).items() if name != "accuracy"},
    )


def _render_table(measured: Measurement) -> str:
    prompts = list(measured.accuracy)
    lines = [f"| family | subject | {' | '.join(prompts)} |", f"|---|---|{'---|' * len(prompts)}"]
    for family in (*FAMILIES, "all"):
        shares = [measured.accuracy[prompt].get(family) for prompt in prompts]
        cells = " | ".join("" if share is None else f"{share:.0%}" for share in shares)
        lines.append(f"| {family} | {SUBJECTS.get(family, '')} | {cells} |")
    return "\n".join(lines)
