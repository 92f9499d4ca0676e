"""Ten swaps of nano's weights under load: how long requests wait, and whether any answer is wrong.

    make bench-swap           (python -m bench.swap [--askers N] [--swaps N] [--workers N])

Measured, on the real vLLM below a real gateway: `pause_s`, the longest of the swaps as the gateway reports it, from the
moment that no new request is let in until the next one is (what is in flight then ends first, so the load counts);
`requests`, those in flight at the beginning of a swap, summed over the swaps; `failed`; `mis_stamped`, answers whose
stamps contradict each other or name unknown weights, or whose tokens are not those of the stamped weights but those of
the other ones; `not_token_identical`, answers whose tokens are not those of the stamped weights; `asked_again`, requests
that the gateway sent once more, by reason.

How: `--askers` requests are always in flight, greedy, over 32 questions, every third of them a stream, which must name the
same weights in each event and be whole to its [DONE]; the reference are the tokens that a fresh server
gave for each question, one at a time: the gateway's own engine before the first swap for nano, and a vLLM of its own for
the variant (noise on every weight).

Limits: nano, one machine, two checkpoints; an answer to a question that both answer alike cannot tell them apart
(`questions_that_differ` says how many do).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import re
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import uvloop

from bench.engine import chat, chat_streamed, make_variant, open_session, question, say
from vcot.pipeline.errors import ServerError
from vcot.services.checkpoints.registry import Registry
from vcot.services.engine.command import SERVED_NAME
from vcot.services.engine.vllm import Endpoint, VllmServer
from vcot.services.gateway.admin import live_checkpoint, register, swap_to
from vcot.services.run.directory import Run, open_run
from vcot.services.run.serving import running_gateway

_NUM_QUESTIONS = 32
_QUESTIONS = [question(number) for number in range(_NUM_QUESTIONS)]
_MAX_TOKENS = 16
_BETWEEN_S = 1.0
"""From the end of a swap to the next, so that every asker is at it again."""

_EVERY = 3
"""One request in so many is a stream."""

Tokens = tuple[str, ...]


def request(number: int, model: str) -> dict[str, Any]:
    """The body of question `number`."""
    greedy = {"temperature": 0.0, "max_tokens": _MAX_TOKENS, "logprobs": True}
    return {"model": model, "messages": _QUESTIONS[number], **greedy}


def tokens_of(answer: dict[str, Any]) -> Tokens:
    return tuple(part["token"] for part in answer["choices"][0]["logprobs"]["content"])


async def references(session: aiohttp.ClientSession, model: str) -> list[Tokens]:
    """Each question's answer, one at a time."""
    return [tokens_of((await chat(session, request(number, model)))[1]) for number in range(_NUM_QUESTIONS)]


async def references_of_fresh(run: Run, name: str) -> list[Tokens]:
    """What a vLLM of its own answers with that checkpoint."""
    checkpoint = Registry(run.directory).resolve(name)
    server = VllmServer(checkpoint, run.recipe.serve, run.path("logs", "fresh.log"))
    await server.start(say)
    try:
        async with open_session(server.endpoint) as fresh:
            return await references(fresh, SERVED_NAME)
    finally:
        await server.stop()


@dataclass
class Tally:
    """What became of the answers. Mutated by `ask` only."""

    expected: dict[str, list[Tokens]]
    """By digest."""
    answered: int = 0
    streamed: int = 0
    """Of the answers."""
    in_flight: int = 0
    failed: int = 0
    mis_stamped: int = 0
    not_token_identical: int = 0
    by_digest: dict[str, int] = field(default_factory=dict)

    async def ask(self, session: aiohttp.ClientSession, number: int, *, streamed: bool) -> None:
        """Ask once, and judge the answer."""
        self.in_flight += 1
        try:
            response, answer = await (chat_streamed if streamed else chat)(session, request(number, "policy"))
        except (aiohttp.ClientError, TimeoutError, OSError, ServerError) as error:
            self.failed += 1
            say(f"failed: {error!r}")
            return
        finally:
            self.in_flight -= 1
        self.answered += 1
        self.streamed += streamed
        headers = response.headers
        self.judge(number, headers["x-vcot-checkpoint"], headers["x-vcot-digest"], answer)

    def judge(self, number: int, name: str, digest: str, answer: dict[str, Any]) -> None:
        """Hold one answer against its stamps."""
        self.by_digest[digest] = self.by_digest.get(digest, 0) + 1
        tokens = tokens_of(answer)
        own = self.expected.get(digest)
        others = [known[number] for other, known in self.expected.items() if other != digest]
        if own is None or answer["model"] != f"{name}@{digest[7:19]}" or (tokens != own[number] and tokens in others):
            self.mis_stamped += 1
        if own is None or tokens != own[number]:
            self.not_token_identical += 1
            say(f"question {number} under {name}: {''.join(tokens)!r}, expected {own and ''.join(own[number])!r}")


async def asked_again(session: aiohttp.ClientSession) -> dict[str, int]:
    """How many requests the gateway sent to an engine once more, by reason."""
    async with session.get("/metrics") as response:
        text = await response.text()
    found = re.findall(r'^vcot_retries_total\{reason="(.*?)"\} (\S+)', text, re.MULTILINE)
    return {reason: int(float(count)) for reason, count in found}


async def swap_under_load(
    url: str, session: aiohttp.ClientSession, tally: Tally, num_askers: int, num_swaps: int
) -> tuple[list[float], int]:
    """The pauses, and the requests in flight at the beginning of each swap."""
    done, numbers = asyncio.Event(), itertools.count()

    async def keep_asking() -> None:
        while not done.is_set():
            number = next(numbers)
            await tally.ask(session, number % _NUM_QUESTIONS, streamed=number % _EVERY == 0)

    askers = [asyncio.create_task(keep_asking()) for _ in range(num_askers)]
    pauses, met = [], 0
    for turn in range(num_swaps):
        await asyncio.sleep(_BETWEEN_S)
        met += tally.in_flight
        before = tally.in_flight
        pauses.append((await swap_to(url, "policy", ("moved", "base")[turn % 2])).pause_s)
        say(f"swap {turn + 1}: {before} in flight, pause {pauses[-1]:.2f} s, {tally.answered} answered so far")
    await asyncio.sleep(_BETWEEN_S)
    done.set()
    await asyncio.gather(*askers)
    return pauses, met


async def main(num_askers: int, num_swaps: int, num_workers: int) -> None:
    with tempfile.TemporaryDirectory(prefix="vcot-bench-") as name:
        folder = Path(name)
        moved = make_variant(folder, "moved", 0.2)
        with open_run(folder / "run", "nano", ["serve.port=0", f"serve.gateway_workers={num_workers}"]) as run:
            async with (
                running_gateway(run, say) as gateway,
                open_session(Endpoint(gateway.url)) as session,
            ):
                base = await live_checkpoint(gateway.url)
                expected = {base.digest: await references(session, "policy")}
                variant = await register(gateway.url, moved)
                expected[variant.digest] = await references_of_fresh(run, "moved")
                idle = [(await swap_to(gateway.url, "policy", which)).pause_s for which in ("moved", "base")]
                say(f"pauses with nothing in flight: {', '.join(f'{pause:.2f} s' for pause in idle)}")
                tally = Tally(expected)
                pauses, met = await swap_under_load(gateway.url, session, tally, num_askers, num_swaps)
                again = await asked_again(session)
    figures = {
        "pause_s": round(max(pauses), 3),
        "requests": met,
        "swaps": len(pauses),
        "failed": tally.failed,
        "mis_stamped": tally.mis_stamped,
        "not_token_identical": tally.not_token_identical,
        "answered": tally.answered,
        "streamed": tally.streamed,
        "asked_again": again,
        "answered_by_each": sorted(tally.by_digest.values()),
        "questions_that_differ": sum(a != b for a, b in zip(*expected.values(), strict=True)),
        "median_pause_s": round(statistics.median(pauses), 3),
        "idle_pause_s": round(max(idle), 3),
        "gateway_workers": num_workers,
        "cores": os.cpu_count(),
    }
    print(orjson.dumps(figures).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ten swaps under load.")
    parser.add_argument("--askers", type=int, default=110)
    parser.add_argument("--swaps", type=int, default=10)
    parser.add_argument("--workers", type=int, default=1, help="processes of the gateway (serve.gateway_workers)")
    given = parser.parse_args()
    uvloop.run(main(given.askers, given.swaps, given.workers))
