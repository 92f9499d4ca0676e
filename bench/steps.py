"""What judging and pairing a run take in memory, and how soon they show progress, beside a run held whole.

    make bench-steps          (python -m bench.steps [--responses N] [--k K])

A ledger is filled with `--responses` responses of about 200 tokens, k to a task. Then each step, in a process of its own,
goes through it: `judge` scores every response by a program, `pair` makes the pairs, their digest and the Parquet files.
`whole` reads every response and judgment at once first, as the steps did before; it makes no pairs. Printed for each:
`peak_mb` (resident memory of the process, about 100 of them Python and its libraries), `first_progress_s`,
`responses_per_s`; and `bytes_per_response`, by which `peak_mb` exceeds that of the same step on a tenth of the run.

What remains in memory is a `Task` for each question (2.5 kB) and, in `pair`, the keys of its pair.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
from PIL import Image

from bench.ledger import MADE, make_group
from pipeline.images import ImageStore
from pipeline.judges import Judge, judgment_keys
from pipeline.judging import find_standing, judge_responses, read_judged
from pipeline.ledger import Ledger
from pipeline.pairs import build_pairs, read_pairs, split_pairs
from pipeline.publish import pairs_digest, publish_pairs
from pipeline.records import ImageRef, Judgment, Response, SamplingParams, Task, Verdict
from pipeline.sample import Groups, Plan
from pipeline.sections import JudgeSection
from pipeline.stage import batched

SECTION = JudgeSection(max_concurrency=64)
_NUM_IMAGES = 1000


class Drawing(Judge):
    """A score that the response's key decides."""

    name = "drawing/1"

    async def score(self, task: Task, response: Response, *, num_asked: int = 0) -> Verdict:
        return Verdict(score=float(random.Random(response.key).randint(1, 10)), rationale="It is drawn. " * 20)


class Timed:
    """Hands on, and remembers when it first did."""

    def __init__(self) -> None:
        self.began, self.first = time.perf_counter(), 0.0

    def watch(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.note()
            yield item

    def note(self, *_: object) -> None:
        self.first = self.first or time.perf_counter() - self.began


def make_tasks(number: int, images: Sequence[ImageRef]) -> list[Task]:
    """Questions about few images."""
    choices = ("skateboarder", "train", "delivery", "cab")
    return [
        Task(
            id=f"aokvqa/{i:022d}", question=f"What is the man by the bags number {i} awaiting?", choices=choices, answer=3,
            rationale="A train would not be on the street. " * 4, source="aokvqa", split="train",
            images=(images[i % len(images)],),
        )
        for i in range(number)
    ]  # fmt: skip


class Made:
    """The run in `folder`; nothing of its responses is held."""

    def __init__(self, folder: Path, num_tasks: int, k: int) -> None:
        self.images, self.ledger = ImageStore(folder), Ledger(folder / "ledger.sqlite")
        drawn = [self.images.put_png(Image.new("RGB", (8, 6), (i % 256, i // 256, 0))) for i in range(_NUM_IMAGES)]
        self.tasks = make_tasks(num_tasks, drawn)
        sampling = SamplingParams(temperature=0.5, max_tokens=1024, n=k, seed=0)
        self.plan = Plan(self.tasks, "thought_specific", MADE, sampling)
        self.judge = Drawing(SECTION, self.images)

    @property
    def groups(self) -> Groups:
        return Groups(self.plan, self.ledger)

    def fill(self) -> None:
        for number, requests in enumerate(batched(self.plan, 64)):
            made = []
            for offset, request in enumerate(requests):
                for response in make_group(64 * number + offset, request.sampling.n):
                    fields = {
                        "key": request.response_key(response.index),
                        "group": request.key,
                        "task": request.task.id,
                    }
                    made.append(response.model_copy(update=fields | {"sampling": request.sampling}))
            self.ledger.put(made)


async def judge(made: Made, folder: Path, timed: Timed) -> None:
    standing = find_standing(made.judge, timed.watch(iter(made.groups)), made.ledger, SECTION)
    await judge_responses(made.judge, made.groups, made.ledger, SECTION, standing=standing)


async def pair(made: Made, folder: Path, timed: Timed) -> None:
    couples = build_pairs(read_judged(made.judge, timed.watch(iter(made.groups)), made.ledger)).pairs
    splits = split_pairs(couples, 0.1, 0)
    train, validation = (read_pairs(split, made.tasks, made.ledger) for split in splits)
    pairs_digest(train, validation)
    train, validation = (read_pairs(split, made.tasks, made.ledger) for split in splits)
    publish_pairs(train, validation, made.images, folder / "pairs", card=lambda _: "")


async def whole(made: Made, folder: Path, timed: Timed) -> None:
    """What judging and pairing held before they began."""
    keys = [key for request in list(made.plan) for key in request.response_keys()]
    responses = made.ledger.get(Response, keys)
    tasks = {task.id: task for task in made.tasks}
    judged = {judgment_keys(made.judge, tasks[r.task], [r])[0]: r for r in responses.values()}
    judgments = made.ledger.get(Judgment, judged)
    timed.note()
    assert len(judgments) == len(responses)


STEPS: dict[str, Callable[[Made, Path, Timed], Any]] = {"judge": judge, "pair": pair, "whole": whole}


def measure(step: str, folder: Path, num_responses: int, k: int) -> dict[str, float]:
    import asyncio

    made, timed = Made(folder, num_responses // k, k), Timed()
    if step == "fill":
        made.fill()
        return {}
    asyncio.run(STEPS[step](made, folder, timed))
    return {
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "first_progress_s": round(timed.first, 2),
        "responses_per_s": round(num_responses / (time.perf_counter() - timed.began)),
    }


def run(num_responses: int, k: int) -> dict[str, dict[str, float]]:
    found = {}
    with tempfile.TemporaryDirectory(prefix="vcot-bench-") as folder:
        for step in ("fill", *STEPS):
            command = [sys.executable, "-m", "bench.steps", "--step", step, "--folder", folder, "--k", str(k)]
            done = subprocess.run(
                [*command, "--responses", str(num_responses)], check=True, stdout=subprocess.PIPE, text=True
            )
            found[step] = json.loads(done.stdout)
            print(f"{num_responses} responses, {step}: {done.stdout.strip()}", file=sys.stderr, flush=True)
    return {step: found[step] for step in STEPS}


def main(options: argparse.Namespace) -> None:
    if options.step:
        print(orjson.dumps(measure(options.step, Path(options.folder), options.responses, options.k)).decode())
        return
    small, found = run(options.responses // 10, options.k), run(options.responses, options.k)
    for step, figures in found.items():
        grown = figures["peak_mb"] - small[step]["peak_mb"]
        figures["bytes_per_response"] = round(grown * 1024 * 1024 / (0.9 * options.responses))
    ratio = {step: round(found[step]["peak_mb"] / found["whole"]["peak_mb"], 2) for step in ("judge", "pair")}
    head = {"responses": options.responses, "k": options.k, "cores": os.cpu_count()}
    print(orjson.dumps({**head, **found, "peak_to_whole": ratio}).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Memory of judging and pairing a large run.")
    parser.add_argument("--responses", type=int, default=100_000)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--step", choices=("fill", *STEPS), help="do one step, in this process")
    parser.add_argument("--folder", help="the run of that step")
    main(parser.parse_args())
