"""Whether what is served is what was trained, and what each type leaves of it: real TRL, real merges, the real vLLM.

    make parity        (python -m bench.parity [--pairs DIR] [--learning-rates LR ...] [--epochs N])

Trains an adapter on nano's language model (so that vLLM serves it exactly) for each learning rate, on pairs drawn from
nano's world, or on those of a run (`<run>/pairs/<digest>`). For each type it writes the checkpoint, merged and as the
adapter alone, serves base, merged and adapter through the gateway in that type, and asks all for the same responses.

Printed, for the last learning rate: `max_abs_logp`, the largest difference of a token's log-prob for each pair of models,
in float32; `differs_from_base`, the same between policy and base as served; `retention`, the share of the reward margins
on validation pairs that each type leaves, merged (weights rounded, computed in float32), served, and served as an adapter.
`by_learning_rate` holds the retention for each. No merge is refused here: what a type loses is the result.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import orjson

from bench.engine import NANO, say
from vcot.pipeline.client import ChatClient
from vcot.pipeline.errors import VcotError
from vcot.pipeline.identity import read_manifest, write_manifest
from vcot.pipeline.images import ImageStore
from vcot.pipeline.pairs import PreferencePair
from vcot.pipeline.prompts import render_prompt
from vcot.pipeline.publish import publish_pairs
from vcot.pipeline.records import CheckpointRef, content_key
from vcot.pipeline.sources.nano.questions import generate_nano, render_target
from vcot.services.gateway.admin import swap_to, try_out
from vcot.services.jobs import trainer
from vcot.services.recipes.recipe import load_recipe
from vcot.services.run.directory import open_run
from vcot.services.run.parity import ask_served
from vcot.services.run.serving import running_gateway
from vcot.training.merge.build import Build
from vcot.training.protocol.agreement import Answers, Probe, compare_served, read_probe
from vcot.training.protocol.job import ADAPTER, Retention, TrainJob
from vcot.training.protocol.train_sections import Dtype

_NUM_TRAIN, _NUM_VALIDATION = 96, 16
_FIXED = ("train.target_modules=language-model", "serve.port=0")
_CONCURRENCY = 16


@dataclass(frozen=True)
class Made:
    """One checkpoint on disk."""

    ref: CheckpointRef
    directory: Path
    probe: Probe
    merged: Retention


def draw_pairs(folder: Path) -> Path:
    """Pairs of a true and a false description of nano's scenes."""
    store = ImageStore(folder)

    def draw(count: int, seed: int) -> list[PreferencePair]:
        tasks = list(generate_nano("train", count + 1, seed, store))
        return [
            PreferencePair(
                task=task.id,
                images=task.images,
                prompt=render_prompt("thought_specific", task),
                chosen=render_target(task, "thought_specific"),
                rejected=render_target(other, "thought_specific"),
                chosen_key=f"{task.id}/0",
                rejected_key=f"{task.id}/1",
                chosen_score=1.0,
                rejected_score=0.0,
                judge="none",
                policy="none",
            )
            for task, other in itertools.pairwise(tasks)
            if render_target(task, "thought_specific") != render_target(other, "thought_specific")
        ]

    publish_pairs(draw(_NUM_TRAIN, 0), draw(_NUM_VALIDATION, 1), store, folder / "pairs", card=lambda _: "")
    return folder / "pairs"


async def train(pairs: Path, learning_rate: float, epochs: float, folder: Path) -> tuple[TrainJob, Path]:
    """An adapter by the nano recipe, but for the settings given; the job, and its directory."""
    settings = (f"train.learning_rate={learning_rate}", f"train.epochs={epochs}", "train.num_evaluations=1")
    recipe = load_recipe("nano", (*_FIXED, *settings))
    job = TrainJob(
        base=read_manifest(NANO).checkpoint,
        base_path=str(NANO),
        pairs_path=str(pairs),
        pairs_digest=content_key(pairs=str(pairs)),
        train=recipe.train,
        merge=recipe.merge,
    )
    directory = folder / f"job-{learning_rate:g}"
    status = await trainer.train(job, directory, lambda *_: None)
    say(f"trained at {learning_rate:g}: {status.num_steps} steps")
    return job, directory


def make(job: TrainJob, job_directory: Path, dtype: Dtype, kind: str, folder: Path) -> Made:
    """The job's checkpoint for serving in `dtype`."""
    merge = job.merge.model_copy(update={"dtype": dtype, "serve_as": kind})
    job = job.model_copy(update={"merge": merge, "serve_dtype": dtype})
    out = folder / f"{kind}-{dtype}-{job.train.learning_rate:g}"
    build = Build(job, job_directory / ADAPTER, out)
    built = build.adapter_alone() if kind == "adapter" else build.merged()
    write_manifest(out, build.describe(built))
    probe = read_probe(out)
    assert probe is not None
    return Made(built.report.checkpoint, out, probe, built.report.retention)


async def ask_all(made: Sequence[Made], dtype: Dtype, folder: Path) -> tuple[Answers, list[Answers]]:
    """What the base answers, and each checkpoint, served in `dtype` through the gateway."""
    with open_run(folder / f"run-{dtype}", "nano", (*_FIXED, f"serve.dtype={dtype}")) as run:
        async with running_gateway(run, lambda _: None) as gateway:
            url = f"{gateway.url}/v1"
            async with ChatClient(url, os.environ.get("VCOT_API_KEY", "none"), max_connections=_CONCURRENCY) as client:
                base = (await swap_to(gateway.url, "policy", run.recipe.model.name)).live
                of_base = await ask_served(client, base, made[0].probe, _CONCURRENCY)
                answers = []
                for each in made:
                    await try_out(gateway.url, each.directory)
                    answers.append(await ask_served(client, each.ref, each.probe, _CONCURRENCY))
                return of_base, answers


def compare(merged: Made, served: tuple[Answers, Answers, Answers]) -> dict[str, Any]:
    """The figures of one learning rate in one type; `served` are base, merged and adapter."""
    base, policy, stored = (Answers.of(a) for a in (merged.probe.base, merged.probe.policy, merged.probe.stored))
    of_base, of_merged, of_adapter = served
    kept = {
        "merged": merged.merged,
        "served": compare_served(of_merged, of_base, merged.probe),
        "adapter": compare_served(of_adapter, of_base, merged.probe),
    }
    return {
        "max_abs_logp": {
            "HF base + adapter, HF merged": policy.difference(stored),
            "HF merged, vLLM merged": stored.difference(of_merged),
            "HF base + adapter, vLLM base + adapter": policy.difference(of_adapter),
            "vLLM merged, vLLM base + adapter": of_merged.difference(of_adapter),
            "HF base, vLLM base": base.difference(of_base),
        },
        "differs_from_base": of_merged.difference(of_base),
        "margin": kept["merged"].before,
        "retention": {name: round(retention.kept, 4) for name, retention in kept.items()},
        "error": {name: round(retention.error, 4) for name, retention in kept.items()},
    }


async def measure(jobs: Sequence[tuple[TrainJob, Path]], dtype: Dtype, folder: Path) -> dict[str, Any]:
    """The figures of every learning rate in one type, or what kept vLLM from serving in it."""
    made = [make(job, directory, dtype, kind, folder) for job, directory in jobs for kind in ("merged", "adapter")]
    try:
        base, answers = await ask_all(made, dtype, folder)
    except VcotError as error:
        if dtype == "float32":
            raise
        say(f"{dtype}: {error}")
        return {"unsupported": str(error).splitlines()[0]}
    pairs = zip(made[0::2], answers[0::2], answers[1::2], strict=True)
    figures = [compare(merged, (base, of_merged, of_adapter)) for merged, of_merged, of_adapter in pairs]
    for (job, _), found in zip(jobs, figures, strict=True):
        say(f"{dtype}, {job.train.learning_rate:g}: {found['retention']}")
    return {f"{job.train.learning_rate:g}": found for (job, _), found in zip(jobs, figures, strict=True)}


async def main(pairs: Path | None, learning_rates: Sequence[float], epochs: float) -> None:
    """Print the figures as one JSON object."""
    with tempfile.TemporaryDirectory(prefix="vcot-parity-") as name:
        folder = Path(name)
        pairs = pairs or draw_pairs(folder)
        jobs = [await train(pairs, rate, epochs, folder) for rate in learning_rates]
        found = {dtype: await measure(jobs, dtype, folder) for dtype in get_args(Dtype)}
    last = f"{learning_rates[-1]:g}"
    exact = found["float32"][last]
    figures = {
        "max_abs_logp": exact["max_abs_logp"],
        "differs_from_base": exact["differs_from_base"],
        "retention": {dtype: each.get(last, each).get("retention", each) for dtype, each in found.items()},
        "by_learning_rate": found,
        "cores": os.cpu_count(),
    }
    print(orjson.dumps(figures).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Served = trained, and what each type leaves of it.")
    parser.add_argument("--pairs", type=Path, help="a directory of published pairs (default: drawn)")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-5, 1e-4])
    parser.add_argument("--epochs", type=float, default=1)
    given = parser.parse_args()
    asyncio.run(main(given.pairs and given.pairs.absolute(), given.learning_rates, given.epochs))
