"""Keeping to a provider's limits: requests and tokens a minute, as its answers tell them.

Model: each limit is a token bucket. A request takes one request and its estimated tokens before it is sent; each answer's
`x-ratelimit-*` headers say what was left when the provider admitted it, from which the level follows: what was taken since
is known here. Before the first answer, and after a 429, one request goes alone: it shows what holds for all.

`Pacer` is pure: times are handed in. `Gate` is the thin part that waits, first come, first served. Both are one client's.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from vcot.pipeline.errors import RequestError
from vcot.pipeline.faults import read_reset

_MAX_RESET_S = 24 * 3600.0
_SOON_S = 0.001
_SLOWER = 4.0
"""A reset that is so many times longer than a minute's refill shows a longer window, as a limit by the day."""


@dataclass
class Bucket:
    """One limit. Mutated by its Pacer; `rate` is None until an answer tells it."""

    rate: float | None = None
    """A second."""
    limit: float = 0.0
    level: float = 0.0
    at: float = 0.0
    taken: float = 0.0
    """In all, since the start."""

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken; more than the limit is never waited for."""
        if self.rate is None:
            return 0.0
        return max(0.0, (min(amount, self.limit) - self._level(now)) / self.rate)

    def take(self, amount: float, now: float) -> None:
        """Take it, to below zero where it is not there."""
        self.level, self.at = self._level(now) - amount, now
        self.taken += amount

    def learn(self, limit: float, remaining: float, reset_s: float | None, taken: float, now: float) -> None:
        """What was left after a request, at whose sending `taken` had been taken in all.

        Now it is at most that, and at least that less all that was taken since; between the two the own count decides. (What
        came in while the request was answered is left out: a reserve does no harm.)
        """
        least = remaining - (self.taken - taken)
        counted = least if self.rate is None else self._level(now)
        self.limit, self.rate = limit, limit / 60
        missing = limit - remaining
        if reset_s and missing > 0 and missing / reset_s < self.rate / _SLOWER:
            self.rate = missing / reset_s
        self.level, self.at = min(max(counted, least), remaining), now

    def _level(self, now: float) -> float:
        return min(self.limit, self.level + (now - self.at) * (self.rate or 0.0))


@dataclass(frozen=True)
class Ticket:
    """A request that was let in."""

    taken: Mapping[str, float]
    """By bucket, in all and this request included."""


@dataclass
class Pacer:
    """When the next request may go. Mutated by its Gate."""

    buckets: dict[str, Bucket] = field(default_factory=lambda: {"requests": Bucket(), "tokens": Bucket()})
    paused_until: float = 0.0
    is_known: bool = False
    """Whether an answer came since the start, or since the last 429."""
    num_running: int = 0
    tokens: float = 0.0
    """What a request costs, as the last ones did."""

    def wait_s(self, floor: float, now: float) -> float | None:
        """Seconds until a request may go that costs at least `floor` tokens; None: until another has ended."""
        if not self.is_known and self.num_running:
            return None
        waits = (bucket.wait_s(amount, now) for bucket, amount in self._needs(floor))
        return max(self.paused_until - now, *waits)

    def admit(self, floor: float, now: float) -> Ticket:
        """Take what a request costs."""
        for bucket, amount in self._needs(floor):
            bucket.take(amount, now)
        self.num_running += 1
        return Ticket({name: bucket.taken for name, bucket in self.buckets.items()})

    def _needs(self, floor: float) -> list[tuple[Bucket, float]]:
        return [(self.buckets["requests"], 1.0), (self.buckets["tokens"], max(self.tokens, floor))]

    def learn(self, ticket: Ticket, headers: Mapping[str, str], now: float) -> None:
        """Read an answer's headers."""
        for name, bucket in self.buckets.items():
            limit, remaining = (_number(headers.get(f"x-ratelimit-{word}-{name}")) for word in ("limit", "remaining"))
            reset_s = read_reset(headers.get(f"x-ratelimit-reset-{name}", ""))
            if limit is None or remaining is None or limit <= 0:
                continue
            reset_s = reset_s if reset_s is not None and reset_s < _MAX_RESET_S else None
            bucket.learn(limit, remaining, reset_s, ticket.taken[name], now)

    def count(self, num_tokens: int) -> None:
        """A request was answered, and cost so many."""
        self.is_known = True
        if num_tokens:
            self.tokens += (num_tokens - self.tokens) / (8 if self.tokens else 1)

    def pause(self, until: float) -> None:
        """The provider wants no request before that; then one, to see."""
        self.paused_until = max(self.paused_until, until)
        self.is_known = False


def _number(text: str | None) -> float | None:
    """What a header says, where that is a number that can be counted with."""
    try:
        number = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


class Gate:
    """Lets one client's requests go at the provider's pace."""

    def __init__(self) -> None:
        self.pacer = Pacer()
        self._turn = asyncio.Lock()
        self._ended = asyncio.Condition()
        self._fault: RequestError | None = None

    @asynccontextmanager
    async def passing(self, floor: float) -> AsyncIterator[Ticket]:
        """A request of at least `floor` tokens, from when it may go. Raises the fault of the account that ended all."""
        loop = asyncio.get_running_loop()
        async with self._turn:
            while (wait_s := self.pacer.wait_s(floor, loop.time())) is None or wait_s > _SOON_S:
                self._check()
                await self._wait(wait_s)
            self._check()
            ticket = self.pacer.admit(floor, loop.time())
        try:
            yield ticket
        finally:
            self.pacer.num_running -= 1
            async with self._ended:
                self._ended.notify_all()

    async def _wait(self, wait_s: float | None) -> None:
        """For so long, or until a request ends, which may change how long."""
        async with self._ended:
            try:
                async with asyncio.timeout(wait_s):
                    await self._ended.wait()
            except TimeoutError:
                pass

    def note(self, ticket: Ticket, headers: Mapping[str, str], num_tokens: int, fault: RequestError | None) -> None:
        """Learn from an answer. A pause that the server asks for holds for all; a fault of the account ends all."""
        now = asyncio.get_running_loop().time()
        self.pacer.learn(ticket, headers, now)
        if fault is None or fault.scope == "item":
            self.pacer.count(num_tokens)
        elif fault.reason == "rate_limit" and fault.scope == "attempt":
            self.pacer.pause(now + (fault.retry_after_s or 0.0))
        elif fault.scope == "account" and fault.param is None:
            self._fault = fault

    def _check(self) -> None:
        if self._fault is not None:
            raise self._fault
