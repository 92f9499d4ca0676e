"""Bounded concurrency and the one retry layer.

Limits are made by the runner and handed down; nothing here is global. SDK retries are off everywhere else.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TypeVar

from vcot.pipeline.errors import RequestError

T = TypeVar("T")
R = TypeVar("R")

Limit = int | Callable[[], int]
"""How many may run at once: always, or at the moment that it is called."""
MAX_ATTEMPTS = 6
BASE_DELAY_S = 0.5
MAX_DELAY_S = 30.0
MAX_PATIENCE_S = 900.0
"""How long one call may be put off by a server that says when to return."""


async def map_bounded(function: Callable[[T], Awaitable[R]], items: Iterable[T], *, limit: Limit) -> AsyncIterator[R]:
    """Results of `function` over `items` as they complete, at most `limit` running at a time.

    A limit that falls lets what runs end, and begins nothing until there is room.

    Items are drawn only when there is room, so 100,000 of them cost no more memory than `limit`. The first exception is
    raised after the running calls have been cancelled; so is closing the iterator early.
    """
    source = iter(items)
    running: set[asyncio.Task[R]] = set()
    exhausted = False
    try:
        while True:
            while not exhausted and len(running) < (limit if isinstance(limit, int) else limit()):
                try:
                    item = next(source)
                except StopIteration:
                    exhausted = True
                else:
                    running.add(asyncio.ensure_future(function(item)))
            if not running:
                return
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                result = task.result()
                running.discard(task)
                yield result
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def with_retry(
    call: Callable[[], Awaitable[R]],
    *,
    on_failure: Callable[[RequestError], None] = lambda _: None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    rng: random.Random | None = None,
) -> R:
    """`call`, repeated while its RequestError is of the attempt, at most MAX_ATTEMPTS times; the last error is raised.

    A 429 with the server's own wish is no attempt: it may pause the call for MAX_PATIENCE_S in all. `on_failure` sees each
    error that is followed by another attempt. Only for calls without an effect upstream, as an unanswered generation is:
    repeating one costs time, never a record.
    """
    rng = rng or random.Random()
    attempt, patience_s = 1, MAX_PATIENCE_S
    while True:
        try:
            return await call()
        except RequestError as error:
            if error.scope != "attempt":
                raise
            if error.reason == "rate_limit" and error.retry_after_s is not None:
                patience_s -= max(BASE_DELAY_S, error.retry_after_s)
            else:
                attempt += 1
            if attempt > MAX_ATTEMPTS or patience_s < 0:
                raise
            on_failure(error)
            await sleep(retry_delay_s(attempt - 1, error.retry_after_s, rng))


def retry_delay_s(attempt: int, retry_after_s: float | None, rng: random.Random) -> float:
    """Seconds before the attempt after `attempt` (from 1): the server's wish, or exponential with full jitter.

    A server's wish gets up to a quarter on top, so that callers that were told the same do not return together.
    """
    if retry_after_s is not None:
        return max(BASE_DELAY_S, retry_after_s) * (1 + rng.random() / 4)
    return rng.uniform(BASE_DELAY_S / 2, min(MAX_DELAY_S, BASE_DELAY_S * 2.0**attempt))
