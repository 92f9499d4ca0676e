"""What sampling keeps of the engine's throughput: `vcot sample`'s own path beside vLLM's offline `LLM.chat`.

    make bench-sample        (python -m bench.sampling [--rounds N] [--tasks N] [--rows N])

Measured, on the real vLLM: responses a second at k=8 on the same nano prompts, images, seeds and temperature, (a) by
`vcot.sample` through a real gateway into a ledger, (b) the same into a ledger that holds `--rows` responses to other
requests, (c) by `LLM.chat` without a server, in the server's own environment and with as many threads
(bench/offline.py). Each round asks each way once, in an order that turns, with seeds of its own; the other engine
idles meanwhile. `vs_offline` is the median over rounds of (a) over (c), `with_full_ledger` of (b) over (a); both are
also given for the best rounds, since a machine that is shared only makes a round slower.

Limits: nano on a CPU, where client, gateway and ledger take turns with the engine on the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import orjson
import uvloop

from bench.engine import say
from bench.offline import Offline
from vcot.pipeline.client import ChatClient
from vcot.pipeline.images import ImageStore
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.records import CheckpointRef, Response, SamplingParams, Task, content_key
from vcot.pipeline.sample import Plan, sample
from vcot.pipeline.sources.nano.questions import generate_nano
from vcot.pipeline.stage import batched
from vcot.services.gateway.admin import live_checkpoint
from vcot.services.run.directory import open_run
from vcot.services.run.serving import running_gateway

_K = 8
_PROMPT = "thought_specific"
_CEILING = 64


async def sampled_per_s(plan: Plan, client: ChatClient, ledger: Ledger, images: ImageStore) -> float:
    """By vcot's own path; every response is in the ledger."""
    began = time.perf_counter()
    count = await sample(plan, client, ledger, images, max_concurrency=_CEILING)
    assert count.ok == count.requested, count
    return count.ok / (time.perf_counter() - began)


def fill(ledger: Ledger, num_rows: int, checkpoint: CheckpointRef) -> None:
    """Responses to requests that are not asked here."""
    for chunk in batched(range(num_rows // _K), 2000):
        ledger.put([response for number in chunk for response in _make_group(number, checkpoint)])


def _make_group(number: int, checkpoint: CheckpointRef) -> Iterator[Response]:
    group = content_key(filled=number)
    for index in range(_K):
        yield Response(
            key=content_key(group=group, index=index),
            group=group,
            task=f"t{number}",
            index=index,
            checkpoint=checkpoint,
            prompt=_PROMPT,
            sampling=make_sampling(number),
            text=f"The circle is red, {number}. <R> (A)",
        )


def make_sampling(seed: int) -> SamplingParams:
    """k responses; each round has a seed of its own."""
    return SamplingParams(temperature=0.5, max_tokens=64, n=_K, seed=seed)


def summarise(rounds: Sequence[Mapping[str, float]], num_tasks: int, num_rows: int) -> dict[str, object]:
    """The figures, from responses a second by round and way."""
    best = {way: max(turn[way] for turn in rounds) for way in rounds[0]}
    return {
        "vs_offline": round(statistics.median(turn["vcot"] / turn["offline"] for turn in rounds), 3),
        "with_full_ledger": round(statistics.median(turn["full ledger"] / turn["vcot"] for turn in rounds), 3),
        "best_rounds": {
            "vs_offline": round(best["vcot"] / best["offline"], 3),
            "with_full_ledger": round(best["full ledger"] / best["vcot"], 3),
        },
        "responses_per_s": {way: round(statistics.median(turn[way] for turn in rounds), 1) for way in rounds[0]},
        "k": _K,
        "tasks": num_tasks,
        "rows": num_rows,
        "rounds": len(rounds),
        "cores": os.cpu_count(),
    }


async def main(num_rounds: int, num_tasks: int, num_rows: int) -> None:
    rounds: list[dict[str, float]] = []
    with (
        tempfile.TemporaryDirectory(prefix="vcot-bench-") as name,
        open_run(Path(name) / "run", "nano", ["serve.port=0"]) as run,
    ):
        tasks: list[Task] = list(generate_nano("train", num_tasks, 0, run.images))
        offline = Offline(run, Path(name) / "offline.log")
        try:
            async with running_gateway(run, say) as gateway:
                live = await live_checkpoint(gateway.url)
                ledgers = {"vcot": Ledger(Path(name) / "a.sqlite"), "full ledger": Ledger(Path(name) / "b.sqlite")}
                say(f"putting {num_rows:,} rows into a ledger")
                await asyncio.to_thread(fill, ledgers["full ledger"], num_rows, live)
                async with ChatClient(f"{gateway.url}/v1", "none", max_connections=_CEILING, is_own=True) as client:
                    ways = ["vcot", "full ledger", "offline"]
                    for number in range(num_rounds + 1):  # the first warms up
                        plan, turn = Plan(tasks, _PROMPT, live, make_sampling(number)), {}
                        for way in ways[number % 3 :] + ways[: number % 3]:
                            if way == "offline":
                                answered = await asyncio.to_thread(offline.answer, plan, run.images)
                                turn[way] = answered.num_responses / answered.took_s
                            else:
                                turn[way] = await sampled_per_s(plan, client, ledgers[way], run.images)
                        say(f"round {number}: " + ", ".join(f"{way} {turn[way]:.0f} responses/s" for way in ways))
                        rounds += [turn] if number else []
                for ledger in ledgers.values():
                    await ledger.finish()
        finally:
            offline.close()
    print(orjson.dumps(summarise(rounds, num_tasks, num_rows)).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Sampling through gateway and ledger, beside vLLM's offline engine.")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tasks", type=int, default=120)
    parser.add_argument("--rows", type=int, default=1_000_000)
    given = parser.parse_args()
    uvloop.run(main(given.rounds, given.tasks, given.rows))
