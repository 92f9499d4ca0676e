"""What an evaluation keeps of the engine's throughput: `vcot eval`'s own path beside vLLM's offline `LLM.chat`.

    make bench-eval        (python -m bench.evaluation [--rounds N] [--questions N] [--set SECTION.FIELD=VALUE ...])

Measured, on the real vLLM: responses a second to the same nano questions under both prompts at both temperatures, one
response each, with the same images, seeds and limits, (a) by `Questions.requests_by_task` and `vcot.pipeline.sample.sample`
through a real gateway into a ledger, (b) by `LLM.chat` without a server, in the server's own environment and with as many
threads (bench/offline.py). Each round has questions that neither has seen, so that every image is decoded and prepared by
both, and asks each way once, in an order that turns; the other engine idles meanwhile. `vs_offline` is the median over
rounds of (a) over (b).

`cpu_ms` says how much processor time a response took in each process, which other work on the machine changes less than
the clock: of (a) the client (with ledger), the gateway, vLLM's API server and its engine, and of (b). `cpu_vs_offline` is
the whole of (b) over the whole of (a).

Limits: nano on a CPU, where client, gateway and API server take turns with the engine on the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import orjson
import uvloop

from bench.engine import cpu_seconds, descendants, say, vllm_process
from bench.offline import Offline
from vcot.eval.evaluate import Questions, load_questions
from vcot.pipeline.client import ChatClient
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.sample import SampleRequest, sample
from vcot.services.gateway.admin import fetch_state, live_checkpoint
from vcot.services.run.directory import Run, open_run
from vcot.services.run.serving import running_gateway


@dataclasses.dataclass
class Turn:
    """One round."""

    rate: dict[str, float] = dataclasses.field(default_factory=dict)
    """Responses a second, by way."""
    cpu_ms: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """Processor time of a response, by way and process."""


def find_processes(gateway_pid: int, offline_pid: int) -> dict[str, dict[str, list[int]]]:
    """Who works on the answers, by way and by the name that the figures have."""
    server = vllm_process(gateway_pid)
    served = {"client": [os.getpid()], "gateway": [gateway_pid], "server": [server], "engine": descendants(server)}
    return {"vcot": served, "offline": {"offline": [offline_pid, *descendants(offline_pid)]}}


def split_questions(questions: Questions, num_rounds: int) -> list[Questions]:
    """As many questions for each round, none in two."""
    size = len(questions.tasks) // num_rounds
    parts = [questions.tasks[number * size : (number + 1) * size] for number in range(num_rounds)]
    return [dataclasses.replace(questions, tasks=part) for part in parts]


async def evaluate_served(requests: Sequence[SampleRequest], client: ChatClient, ledger: Ledger, run: Run) -> float:
    """Responses a second by vcot's own path; every response is in the ledger."""
    began = time.perf_counter()
    count = await sample(requests, client, ledger, run.images, max_concurrency=run.recipe.eval.max_concurrency)
    assert count.ok == count.requested, count
    return count.ok / (time.perf_counter() - began)


async def evaluate_offline(requests: Sequence[SampleRequest], offline: Offline, run: Run) -> float:
    """Responses a second of the engine alone."""
    answered = await asyncio.to_thread(offline.answer, requests, run.images)
    return answered.num_responses / answered.took_s


async def measure(
    requests: Sequence[SampleRequest],
    ways: Mapping[str, Callable[[Sequence[SampleRequest]], Awaitable[float]]],
    processes: Mapping[str, Mapping[str, Sequence[int]]],
) -> Turn:
    """One round, each way in turn."""
    turn = Turn()
    for way, answer in ways.items():
        before = {name: cpu_seconds(pids) for name, pids in processes[way].items()}
        turn.rate[way] = await answer(requests)
        turn.cpu_ms[way] = {
            name: 1e3 * (cpu_seconds(pids) - before[name]) / len(requests) for name, pids in processes[way].items()
        }
    return turn


def summarise(rounds: Sequence[Turn]) -> dict[str, object]:
    """The figures, from all rounds."""
    ratios = sorted(turn.rate["vcot"] / turn.rate["offline"] for turn in rounds)
    spent = [sum(turn.cpu_ms["offline"].values()) / sum(turn.cpu_ms["vcot"].values()) for turn in rounds]
    rates = {way: statistics.median(turn.rate[way] for turn in rounds) for way in rounds[0].rate}
    cpu_ms = {
        name: statistics.median(turn.cpu_ms[way][name] for turn in rounds)
        for way, names in rounds[0].cpu_ms.items()
        for name in names
    }
    return {
        "vs_offline": round(statistics.median(ratios), 3),
        "vs_offline_by_round": [round(ratio, 3) for ratio in ratios],
        "cpu_vs_offline": round(statistics.median(spent), 3),
        "responses_per_s": {way: round(rate, 1) for way, rate in rates.items()},
        "cpu_ms": {name: round(value, 2) for name, value in cpu_ms.items()},
    }


async def main(num_rounds: int, num_questions: int, overrides: Sequence[str]) -> None:
    rounds: list[Turn] = []
    needed = [f"eval.num_tasks={(num_rounds + 1) * num_questions}", "serve.port=0"]
    with (
        tempfile.TemporaryDirectory(prefix="vcot-bench-") as name,
        open_run(Path(name) / "run", "nano", [*needed, *overrides]) as run,
    ):
        section = run.recipe.eval
        parts = split_questions(load_questions(section, section.split, run.directory, run.images), num_rounds + 1)
        offline = Offline(run, Path(name) / "offline.log")
        try:
            async with running_gateway(run, say) as gateway:
                live = await live_checkpoint(gateway.url)
                processes = find_processes((await fetch_state(gateway.url)).pid, offline.pid)
                ledger, most = Ledger(Path(name) / "ledger.sqlite"), section.max_concurrency
                async with ChatClient(f"{gateway.url}/v1", "none", max_connections=most, is_own=True) as client:
                    ways = {
                        "vcot": partial(evaluate_served, client=client, ledger=ledger, run=run),
                        "offline": partial(evaluate_offline, offline=offline, run=run),
                    }
                    for number, questions in enumerate(parts):  # the first warms up
                        ways = dict(reversed(ways.items()))
                        turn = await measure(questions.requests_by_task(live), ways, processes)
                        say(f"round {number}: {turn}")
                        rounds += [turn] if number else []
                await ledger.finish()
        finally:
            offline.close()
    figures = summarise(rounds) | {"questions": num_questions, "rounds": num_rounds}
    print(orjson.dumps(figures | {"engine_threads": offline.num_threads, "cores": os.cpu_count()}).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="An evaluation through gateway and ledger, beside vLLM's offline engine."
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    given = parser.parse_args()
    uvloop.run(main(given.rounds, given.questions, given.set))
