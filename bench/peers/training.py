"""The same DPO with LoRA by four trainers: `vcot train` beside plain TRL, ms-swift and LLaMA-Factory, as whole commands.

    make bench-peers-training        (python -m bench.peers.training [--rounds N] [--pairs N] [--epochs N])

All train nano on the pairs that `vcot pair` has published: the same rows, of the same tokens, in steps of one size, the same
adapter on the linear layers of the language model, optimizer, schedule and seed, in float32, on the CPU, on one thread, and
save: vcot by the clock as ever (every 10 s at most), the others each tenth of the steps. Nothing is evaluated, but for one
pair by vcot. Each in its own environment (bench/peers/requirements), TRL in ours, as a script of train_trl.py. Each starts
once unmeasured, with few pairs; then measured for each, in each round, in an order that turns:

    seconds        from the command's start to its end
    start_s        of that until its first step was logged
    steps_per_s    from there to the last step, saving included
    cpu_s          processor time of the command and all that it starts, whatever else the machine does
    step_cpu_s     of that a step's, between the first step and the last
    peak_mb        memory of all its processes at once, pages that they share counted once
    total_s        with kill -9 of all its processes when half of the steps and half of those between two saves were logged,
                   and the same command again, with the option to go on: from each start to the kill and the end
    steps_anew     steps that were logged before the kill and done again

and whether all did the same: `steps`, adapted `modules`, `first_loss` (log 2 before anything is learned), the `margin` of
rewards that it logs, mean of the last epoch, which has each pair once, and `difference`, the largest one of a weight between
the adapter of the undisturbed run and that of the killed one: 0 where they are equal, bit for bit.

The last line is JSON: medians over rounds, and `ratios`, the median over rounds of each trainer's figure over vcot's (for
steps_per_s vcot's over the trainer's), so that more than 1 means that vcot is ahead. Limits: nano on a CPU, where starting
Python and libraries is much of a run, and a step is mostly overhead.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import orjson
import uvloop
from safetensors.numpy import load_file

from bench.engine import cpu_seconds, descendants
from bench.peers.rounds import PeerError, children_s, compare, medians, play
from bench.peers.trainers import RUN, TRAINERS, Trainer, Training, write_pairs
from vcot.pipeline.prompts import split_thought
from vcot.pipeline.records import Response, Task
from vcot.pipeline.sample import SampleRequest
from vcot.pipeline.sources.nano.questions import render_response, render_target
from vcot.services.run.directory import open_run
from vcot.services.run.rounds import list_rounds
from vcot.services.run.session import Session
from vcot.services.run.steps import judge_stage, pair_stage
from vcot.training.protocol.train_sections import TrainSection

_HIGHER = {
    **dict.fromkeys(("seconds", "start_s", "cpu_s", "step_cpu_s", "peak_mb", "total_s"), False),
    "steps_per_s": True,
}
"""Figures that are compared, and which are better the higher they are."""
_NUM_SAVES = 10
_LOOK_S = 0.05
_WEIGH_S = 1.0
"""How often the log is looked at, and the memory."""
_ENV = {
    **dict.fromkeys(("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "USE_HF"), "1"),
    **dict.fromkeys(("OMP_NUM_THREADS", "PYTHONUNBUFFERED"), "1"),
    "CUDA_VISIBLE_DEVICES": "",
}
"""No hub (ms-swift would take its own but for USE_HF), no telemetry, one thread, no GPU."""


@dataclass(frozen=True)
class Outcome:
    """What one trainer did in one round."""

    seconds: float
    start_s: float
    steps_per_s: float
    cpu_s: float
    step_cpu_s: float
    peak_mb: float
    total_s: float
    steps_anew: int
    steps: int
    modules: int
    first_loss: float
    margin: float
    difference: float


@dataclass(frozen=True)
class Seen:
    """A step in the log."""

    step: int
    loss: float
    at: float
    """By `time.perf_counter`."""
    cpu_s: float
    """Of the command and all that it started, until then."""


@dataclass
class Course:
    """One command from its start to its end or kill."""

    began: float
    seconds: float = 0
    steps: list[Seen] = field(default_factory=list)
    peak_mb: float = 0


class Log:
    """The steps that a trainer logs from now on. Lines that an earlier command left do not count, whether the next one
    takes some of them back, as vcot does, or goes on below them.
    """

    def __init__(self, trainer: Trainer, out: Path) -> None:
        self._trainer, self._out = trainer, out
        self._before = self._read()

    def read(self) -> list[dict[str, Any]]:
        """The lines of steps, with `step` and `loss`."""
        lines = self._read()
        same = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(lines, self._before, strict=False)))
        found = [orjson.loads(line) for line in lines[same:]]
        steps = [(self._trainer.read_step(line), line) for line in found]
        return [{"step": step, "loss": line["loss"]} for step, line in steps if step is not None]

    def _read(self) -> list[bytes]:
        return [line for path in self._out.glob(self._trainer.log) for line in path.read_bytes().split(b"\n")[:-1]]


async def follow(trainer: Trainer, training: Training, limit_s: float, *, kill_at: float = math.inf) -> Course:
    """Run the command to its end, or until kill -9 of all its processes, as soon as step `kill_at` is in its log.

    Raises PeerError where it fails by itself, trains nothing, or takes more than `limit_s` seconds.
    """
    training.out.mkdir(parents=True, exist_ok=True)
    command, told, log = trainer.command(training), training.out / "log.txt", Log(trainer, training.out)
    with told.open("ab") as file:
        course = Course(time.perf_counter())
        process = await asyncio.create_subprocess_exec(
            *command, stdout=file, stderr=file, env=os.environ | _ENV | {"HOME": str(training.out)}
        )
        try:
            await _watch(process, course, log, limit_s, kill_at)
        finally:
            _kill_all(process)
            code = await process.wait()
            course.seconds = time.perf_counter() - course.began
    if code and not (course.steps and course.steps[-1].step >= kill_at):
        end = "\n".join(told.read_text("utf-8", "replace").splitlines()[-15:])
        raise PeerError(f"it ended with {code} after {course.seconds:.0f} s: {end}")
    if not course.steps:
        raise PeerError(f"it ended after {course.seconds:.0f} s, and no step is in its log")
    return course


async def _watch(process: asyncio.subprocess.Process, course: Course, log: Log, limit_s: float, kill_at: float) -> None:
    """Looks once more when it has ended, for what it logged since the look before."""
    weighed, spent_before = 0.0, children_s()
    while (now := time.perf_counter()) - course.began < limit_s:
        has_ended = process.returncode is not None
        if now - weighed > _WEIGH_S:
            weighed, course.peak_mb = now, max(course.peak_mb, _sum(_weigh, process.pid))
        if new := log.read()[len(course.steps) :]:
            cpu_s = children_s() - spent_before if has_ended else _sum(_spend, process.pid)
            course.steps += [Seen(**line, at=now, cpu_s=cpu_s) for line in new]
            if course.steps[-1].step >= kill_at:
                return
        if has_ended:
            return
        await asyncio.sleep(_LOOK_S)


def _kill_all(process: asyncio.subprocess.Process) -> None:
    """The command and all that it started, whatever sessions they are in."""
    for pid in _tree(process.pid) if process.returncode is None else ():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _tree(pid: int) -> list[int]:
    """The process alone where one of those below it ends meanwhile."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return [pid, *descendants(pid)]
    return [pid]


def _sum(measure: Callable[[int], float], pid: int) -> float:
    """Over the process and those below it that are there."""
    total = 0.0
    for each in _tree(pid):
        with suppress(FileNotFoundError, ProcessLookupError):
            total += measure(each)
    return total


def _spend(pid: int) -> float:
    return cpu_seconds([pid])


def _weigh(pid: int) -> float:
    """Megabytes, its share of the pages that others have, too."""
    rows = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    return sum(int(row[1]) for row in rows if row[0] == "Pss:") / 1000


async def measure(trainer: Trainer, training: Training, limit_s: float) -> Outcome:
    """All figures of one trainer, in two new folders of `training.out`. Raises PeerError."""
    whole, half = (replace(training, out=training.out / name) for name in ("whole", "half"))
    before = children_s()
    full = await follow(trainer, whole, limit_s)
    cpu_s = children_s() - before
    first, last = full.steps[0], full.steps[-1]
    kill_at = last.step // 2 + training.save_steps // 2
    cut = await follow(trainer, half, limit_s, kill_at=kill_at)
    again = await follow(trainer, half, limit_s)
    weights, margins = _load(trainer, whole.out), trainer.read_margins(whole.out)
    return Outcome(
        seconds=full.seconds,
        start_s=first.at - full.began,
        steps_per_s=(last.step - first.step) / (last.at - first.at),
        cpu_s=cpu_s,
        step_cpu_s=(last.cpu_s - first.cpu_s) / (last.step - first.step),
        peak_mb=full.peak_mb,
        total_s=cut.seconds + again.seconds,
        steps_anew=cut.steps[-1].step - again.steps[0].step + 1,
        steps=last.step,
        modules=sum("lora_A" in name for name in weights),
        first_loss=first.loss,
        margin=mean(margins[-len(margins) // int(training.recipe.epochs) :]),
        difference=_compare(weights, _load(trainer, half.out)),
    )


def _load(trainer: Trainer, out: Path) -> dict[str, np.ndarray[Any, Any]]:
    (path,) = out.glob(trainer.adapter)
    return dict(load_file(path))


def _compare(one: Mapping[str, np.ndarray[Any, Any]], other: Mapping[str, np.ndarray[Any, Any]]) -> float:
    """The largest difference of a weight; infinite where others are trained."""
    if one.keys() != other.keys():
        return math.inf
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


async def prepare(data: Path, num_pairs: int, settings: Sequence[str]) -> TrainSection:
    """A run with pairs in `data`, and the same for the others. Returns its training recipe.

    To each question there is a right response, nano's target, and a wrong one, which speaks of the next question's image.
    One pair more than asked for is held out, since a run cannot do without.
    """
    sizes = [f"tasks.num_tasks={num_pairs + 1}", "sample.k=2", "pairs.validation_fraction=1e-6"]
    with open_run(data / RUN, "nano", [*sizes, "train.num_evaluations=1", *settings]) as run:
        async with Session(run, lambda event: None) as session:
            (current,) = list_rounds(session)
            requests = [*current.requests()]
            for request, other in zip(requests, [*requests[1:], requests[0]], strict=True):
                run.ledger.put(_respond(request, other.task))
            await judge_stage(current)
            await pair_stage(current)
        write_pairs(data)
        return run.recipe.train


def _respond(request: SampleRequest, other: Task) -> list[Response]:
    task, letter = request.task, "B" if request.task.answer_letter == "A" else "A"
    wrong = render_response(other.rationale or "", f"The answer is ({letter}).", request.prompt)
    made = []
    for index, text in enumerate((render_target(task, request.prompt), wrong)):
        thought, answer = split_thought(request.prompt, text)
        made.append(
            Response(
                key=request.response_key(index),
                group=request.key,
                task=task.id,
                index=index,
                checkpoint=request.checkpoint,
                prompt=request.prompt,
                sampling=request.sampling,
                text=text,
                thought=thought,
                answer=answer,
            )
        )
    return made


def summarise(rounds: Sequence[Mapping[str, Outcome]], faults: Mapping[str, str]) -> dict[str, object]:
    """Medians by trainer, and how far vcot is ahead of each; what a trainer said instead, where it failed."""
    good = [name for name in TRAINERS if name not in faults and rounds]
    figures = {name: medians([turn[name] for turn in rounds], 4) for name in good}
    return {"trainers": figures | dict(faults), "ratios": compare(rounds, good, _HIGHER)}


async def main(num_rounds: int, num_pairs: int, epochs: int, limit_s: float) -> None:
    faults: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="vcot-bench-") as name:
        folder, settings = Path(name), ["train.target_modules=language-model", f"train.epochs={epochs}"]
        few, all_pairs = folder / "few", folder / "all"
        recipe = await prepare(few, 16, settings)
        await prepare(all_pairs, num_pairs, settings)
        save_steps = math.ceil(num_pairs / recipe.batch_size) * epochs // _NUM_SAVES

        async def warm(trainer: str, out: Path) -> Course:
            return await follow(TRAINERS[trainer], Training(recipe, save_steps, few, out), limit_s)

        async def measure_one(trainer: str, out: Path) -> Outcome:
            return await measure(TRAINERS[trainer], Training(recipe, save_steps, all_pairs, out), limit_s)

        await play(TRAINERS, 0, folder, warm, faults)  # the first start of each compiles its libraries
        numbers = range(1, num_rounds + 1)
        rounds = [await play(TRAINERS, number, folder, measure_one, faults) for number in numbers]
    figures = summarise(rounds, faults) | {"pairs": num_pairs, "epochs": epochs}
    print(orjson.dumps(figures | {"rounds": num_rounds, "cores": os.cpu_count()}).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="vcot train beside plain TRL, ms-swift and LLaMA-Factory.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=900)
    given = parser.parse_args()
    uvloop.run(main(given.rounds, given.pairs, given.epochs, given.limit_s))
