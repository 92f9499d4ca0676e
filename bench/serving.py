"""What of the engine's throughput is left behind the gateway: sampled tokens per second at k=8, direct and through it.

    make bench-serving        (python -m bench.serving [--rounds N] [--requests N])

Measured: `vs_direct`, the median over rounds of (tokens/s through the gateway) / (tokens/s on vLLM's own unix socket). How:
one real vLLM with nano below a real gateway; in each round the same requests (n=8, 64 tokens each, an image each, a seed
each, eight requests at once) go both ways, in an order that turns from round to round, and every answer must have its
512 tokens. Both ways have the same client, warmed up by a round that is not counted.

Limits: nano on a CPU, where the client and the gateway take turns with the engine on the same cores, which costs more than
where the engine has a GPU; images are small (bench/gateway.py has the large ones).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import uvloop

from bench.engine import chat, open_session, question, say, vllm_socket
from vcot.pipeline.errors import ServerError
from vcot.services.engine.command import SERVED_NAME
from vcot.services.engine.vllm import Endpoint
from vcot.services.gateway.admin import fetch_state
from vcot.services.run.directory import open_run
from vcot.services.run.serving import running_gateway

_K = 8
_MAX_TOKENS = 64
_CONCURRENCY = 8


def request(number: int, seed: int, model: str) -> dict[str, Any]:
    """k samples of question `number`, all of the full length."""
    sampled = {"n": _K, "temperature": 1.0, "seed": seed, "max_tokens": _MAX_TOKENS, "ignore_eos": True}
    return {"model": model, "messages": question(number), **sampled}


async def tokens_per_s(session: aiohttp.ClientSession, model: str, num_requests: int, first_seed: int) -> float:
    """Sampled tokens per second over that many requests, eight at a time. Raises ServerError."""
    bodies = [request(number, first_seed + number, model) for number in range(num_requests)]
    waiting = iter(bodies)

    async def work() -> int:
        total = 0
        for body in waiting:
            num_tokens = (await chat(session, body))[1]["usage"]["completion_tokens"]
            if num_tokens != _K * _MAX_TOKENS:
                raise ServerError(f"{num_tokens} tokens were answered instead of {_K * _MAX_TOKENS}")
            total += num_tokens
        return total

    began = time.perf_counter()
    total = sum(await asyncio.gather(*(work() for _ in range(_CONCURRENCY))))
    return total / (time.perf_counter() - began)


async def main(num_rounds: int, num_requests: int) -> None:
    rounds: list[dict[str, float]] = []
    with (
        tempfile.TemporaryDirectory(prefix="vcot-bench-") as name,
        open_run(Path(name) / "run", "nano", ["serve.port=0"]) as run,
    ):
        async with running_gateway(run, say) as gateway:
            direct = Endpoint("http://vllm", vllm_socket((await fetch_state(gateway.url)).pid))
            through = Endpoint(gateway.url)
            async with open_session(direct) as direct_session, open_session(through) as gateway_session:
                ways = {"direct": (direct_session, SERVED_NAME), "gateway": (gateway_session, "policy")}
                for number in range(num_rounds + 1):
                    order = list(ways) if number % 2 else list(ways)[::-1]
                    # The same seeds both ways: the same work. Fresh ones in each round.
                    turn = {way: await tokens_per_s(*ways[way], num_requests, number * num_requests) for way in order}
                    say(f"round {number}: " + ", ".join(f"{way} {turn[way]:.0f} tokens/s" for way in ways))
                    rounds += [turn] if number else []
    ratios = sorted(turn["gateway"] / turn["direct"] for turn in rounds)
    figures = {
        "vs_direct": round(statistics.median(ratios), 4),
        "vs_direct_quartiles": [round(value, 4) for value in statistics.quantiles(ratios)[::2]],
        "tokens_per_s": {way: round(statistics.median(turn[way] for turn in rounds)) for way in rounds[0]},
        "k": _K,
        "rounds": num_rounds,
        "requests_a_round": num_requests,
        "cores": os.cpu_count(),
    }
    print(orjson.dumps(figures).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Throughput through the gateway against direct.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=32)
    given = parser.parse_args()
    uvloop.run(main(given.rounds, given.requests))
