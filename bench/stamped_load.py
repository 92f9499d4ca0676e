"""Load on a gateway whose answers are held against their stamps: tokens under a digest must be that checkpoint's."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

from bench.engine import chat, question, say
from vcot.pipeline.errors import ServerError

QUESTIONS = [question(number) for number in range(16)]


@dataclass
class Tally:
    """What became of the load's requests. Mutated by `ask` only."""

    expected: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    """By digest, what each question's answer is."""
    answered: int = 0
    failed: int = 0
    refused: int = 0
    """While nothing was live."""
    mis_stamped: int = 0

    async def ask(self, session: aiohttp.ClientSession, number: int) -> None:
        try:
            digest, tokens = await answer(session, number)
        except (aiohttp.ClientError, TimeoutError, OSError, ServerError) as error:
            if "no checkpoint is live" in str(error):
                self.refused += 1
            else:
                self.failed += 1
                say(f"failed: {error!r}")
            await asyncio.sleep(0.1)
            return
        self.answered += 1
        own = self.expected.get(digest)
        others = [d[:19] for d, expected in self.expected.items() if d != digest and tokens == expected[number]]
        if own is None or (tokens != own[number] and others):
            self.mis_stamped += 1
            say(f"mis-stamped: question {number} under {digest[:19]}, as {others}: {tokens}")


async def answer(session: aiohttp.ClientSession, number: int) -> tuple[str, tuple[str, ...]]:
    """Whose weights answered a question to `policy`, and how."""
    body = {"model": "policy", "messages": QUESTIONS[number], "temperature": 0.0, "max_tokens": 16, "logprobs": True}
    response, found = await chat(session, body)
    return response.headers["x-vcot-digest"], tuple(t["token"] for t in found["choices"][0]["logprobs"]["content"])


async def learn(session: aiohttp.ClientSession, tally: Tally) -> str:
    """Write down the answers of what is live; its digest."""
    answers = [await answer(session, number) for number in range(len(QUESTIONS))]
    digest = answers[0][0]
    tally.expected.setdefault(digest, [tokens for _, tokens in answers])
    return digest


@asynccontextmanager
async def load(session: aiohttp.ClientSession, tally: Tally, num_askers: int) -> AsyncIterator[None]:
    """Requests in flight, always."""
    numbers = itertools.count()

    async def keep_asking() -> None:
        while True:
            await tally.ask(session, next(numbers) % len(QUESTIONS))

    askers = [asyncio.create_task(keep_asking()) for _ in range(num_askers)]
    try:
        yield
    finally:
        for asker in askers:
            asker.cancel()
        await asyncio.gather(*askers, return_exceptions=True)
