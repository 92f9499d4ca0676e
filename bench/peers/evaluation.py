"""One evaluation by three harnesses: `vcot eval` beside inspect_ai and lmms-eval, on one server and the same questions.

    make bench-peers-evaluation        (python -m bench.peers.evaluation [--rounds N] [--questions N])

All ask the same real vLLM with nano through one gateway: the same questions (a text and an image), one prompt, greedily, as
many requests at once at most, each as its documentation says and in its own environment (bench/peers/requirements). Each
starts once unmeasured, then once a round, in an order that turns:

    seconds      from the command's start to its end: scores and files included
    start_s      of that before its first request
    answers_per_s  while it asks, from its first request to the last answer
    cpu_s        processor time of the command and all that it starts, whatever else the machine does; not the server's

Requests are counted by a small server in front of the gateway (bench/peers/meter.py), which all pass; a harness that asks
anything else, or not each question once, is an error. The last line is JSON: medians over rounds, and `ratios`, the median
over rounds of each harness's figure over vcot's (for answers_per_s vcot's over the harness's), so that more than 1 means
that vcot is ahead.

Limits: nano on a CPU, where harness, gateway and engine share the cores; lmms-eval writes each image anew as PNG.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
import uvloop

from bench.engine import say
from bench.peers.generation import follow
from bench.peers.harnesses import HARNESSES, PROMPT
from bench.peers.meter import Meter, identify_text
from bench.peers.rounds import PeerError, children_s, compare, medians, play
from bench.peers.ways import Command, Settings
from vcot.pipeline.prompts import render_prompt
from vcot.pipeline.sources.nano.questions import generate_nano
from vcot.services.run.directory import Run, open_run
from vcot.services.run.serving import running_gateway

_HIGHER = {"seconds": False, "start_s": False, "answers_per_s": True, "cpu_s": False}
"""Which figures are better the higher they are."""


@dataclass(frozen=True)
class Outcome:
    """What one harness did in one round."""

    seconds: float
    start_s: float
    answers_per_s: float
    cpu_s: float


def write_questions(run: Run, num_questions: int, path: Path) -> Counter[str]:
    """The nano questions that `vcot eval` draws, for the others. Returns how often what names each comes on the wire."""
    section, names = run.recipe.eval, Counter[str]()
    with path.open("wb") as file:
        for task in generate_nano(section.split, num_questions, section.seed, run.images):
            text, image = render_prompt(PROMPT, task), run.directory / task.images[0].path
            names[identify_text([{"type": "text", "text": text}])] += 1
            row = {"id": task.id, "prompt": text, "image": str(image), "target": task.answer_letter}
            file.write(orjson.dumps(row) + b"\n")
    return names


async def measure(command: Command, settings: Settings, meter: Meter, names: Counter[str], limit_s: float) -> Outcome:
    """One harness, once, in a new folder. Raises PeerError where it failed, or did not ask each question once."""
    settings.out.mkdir(parents=True)
    before = children_s()
    course = await follow(command, settings, meter, limit_s)
    if not course.has_ended:
        raise PeerError(f"it did not end within {limit_s:g} s")
    if not course.asked == course.answered == names:
        asked, answered, num = course.asked.total(), course.answered.total(), names.total()
        raise PeerError(f"it sent {asked} requests for {num} questions, and {answered} were answered")
    assert meter.first_at is not None
    assert meter.last_at is not None
    rate = course.answered.total() / (meter.last_at - meter.first_at)
    return Outcome(course.seconds, course.start_s, rate, children_s() - before)


def summarise(rounds: Sequence[Mapping[str, Outcome]], faults: Mapping[str, str]) -> dict[str, object]:
    """Medians by harness, and how far vcot is ahead of each; what a harness said instead, where it failed."""
    good = [name for name in HARNESSES if name not in faults and rounds]
    figures = {name: medians([turn[name] for turn in rounds]) for name in good}
    return {"harnesses": figures | dict(faults), "ratios": compare(rounds, good, _HIGHER)}


async def main(num_rounds: int, num_questions: int, concurrency: int, limit_s: float) -> None:
    rounds: list[dict[str, Outcome]] = []
    faults: dict[str, str] = {}
    meter = Meter(identify_text)
    with (
        tempfile.TemporaryDirectory(prefix="vcot-bench-") as folder,
        open_run(Path(folder) / "server", "nano", ["serve.port=0"]) as run,
    ):
        tasks = Path(folder) / "questions.jsonl"
        names = write_questions(run, num_questions, tasks)
        async with running_gateway(run, say) as gateway, meter.serve(gateway.url) as url:
            settings = Settings(
                tasks=tasks, out=Path(folder), base_url=f"{url}/v1", k=1, temperature=0.0, concurrency=concurrency
            )

            async def measure_one(name: str, out: Path) -> Outcome:
                asked = settings.model_copy(update={"out": out})
                return await measure(HARNESSES[name], asked, meter, names, limit_s)

            for number in range(num_rounds + 1):  # the first start of each compiles its libraries
                turn = await play(HARNESSES, number, Path(folder), measure_one, faults)
                rounds += [turn] if number else []
    figures = summarise(rounds, faults) | {"questions": num_questions, "concurrency": concurrency}
    print(orjson.dumps(figures | {"rounds": num_rounds, "cores": os.cpu_count()}).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="vcot eval beside inspect_ai and lmms-eval.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=900)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--limit-s", type=float, default=600)
    given = parser.parse_args()
    uvloop.run(main(given.rounds, given.questions, given.concurrency, given.limit_s))
