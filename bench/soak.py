"""A quarter of an hour of hostile and honest load on one gateway and one real vLLM: is memory flat, is nobody honest failed?

    make soak                 (python -m bench.soak [--minutes N] [--askers N] [--attacks-per-s N])

Measured: `honest` requests (plain, streamed, k=8 with images, and those of measuring trials) by `--askers` clients;
`failed`, those that were not answered whole with status 200, a client's own retries at the server's word (429 or 503 with
`Retry-After`, as every SDK has them; `retried`) included; `mis_stamped`, answers whose stamp names other weights than the
digest beside it, or changes within one answer; their latency; and, of the gateway's process and of vLLM's, the resident
memory at the start, its least, most and last, and its slope after the warm-up (the first third); open files and threads.

How: the attacks of bench/hostile.py, each kind in turn, `--attacks-per-s` at a bounded number at once; a swap of the policy
every minute, and every third minute a trial (which a client of one replica's gateway meets as 503 `checkpoint_on_trial`).

Limits: nano, one machine, shared with what it measures. A slope over minutes extrapolates: read it with `end - min`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import secrets
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson
import uvloop

from bench.engine import children, make_variant, open_session, question, say
from bench.hostile import CHAT, attacks
from vcot.pipeline.errors import VcotError
from vcot.services.engine.vllm import Endpoint
from vcot.services.gateway.admin import fetch_state, register, swap_to, try_out
from vcot.services.gateway.http.keys import API_KEYS_ENV
from vcot.services.run.directory import open_run
from vcot.services.run.serving import running_gateway

_MAX_TRIES = 20
_MAX_ATTACKS = 24
"""At once."""
_SAMPLE_EVERY_S = 2.0
_SAY_EVERY_S = 10.0
_SWAP_EVERY_S = 60.0
_TRIAL_TURN = 3
"""Every so many swaps a trial."""
_WARM_UP = 1 / 3
_NUM_QUESTIONS = 64
_MIB = 2**20


@dataclass
class Series:
    """A quantity over time. Mutated by `add` only."""

    times_s: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, time_s: float, value: float) -> None:
        """One more reading."""
        self.times_s.append(time_s)
        self.values.append(value)

    def slope_per_hour(self) -> float:
        """By least squares over what was read after the warm-up; 0 for fewer than two readings."""
        begin = self.times_s[0] + _WARM_UP * (self.times_s[-1] - self.times_s[0]) if self.times_s else 0.0
        late = [(t, v) for t, v in zip(self.times_s, self.values, strict=True) if t >= begin]
        if len({t for t, _ in late}) < 2:
            return 0.0
        return 3600 * statistics.linear_regression(*zip(*late, strict=True)).slope

    def summary(self, digits: int = 1) -> dict[str, float]:
        """For the last line."""
        ends = {"start": self.values[0], "min": min(self.values), "max": max(self.values), "end": self.values[-1]}
        return {name: round(value, digits) for name, value in ends.items()} | {
            "slope_per_hour": round(self.slope_per_hour(), digits)
        }


@dataclass
class Tally:
    """What became of the requests. Mutated by whoever asks, on one event loop."""

    num_honest: int = 0
    num_retried: int = 0
    num_failed: int = 0
    num_mis_stamped: int = 0
    latencies_s: list[float] = field(default_factory=list)
    attacks: Counter[str] = field(default_factory=Counter)
    """By kind and what came of it."""
    faults: Counter[str] = field(default_factory=Counter)
    """Of swaps and trials, and of honest requests."""

    def percentile_ms(self, percent: int) -> float:
        """Of the honest requests' latencies, retries included; 0 before there are two."""
        if len(self.latencies_s) < 2:
            return 0.0
        return round(1e3 * statistics.quantiles(self.latencies_s, n=100)[percent - 1], 1)


def is_stamped(headers: dict[str, str], models: list[str], digests: dict[str, str]) -> bool:
    """Whether every part of an answer names the weights that its headers name, and these go together."""
    name, digest = headers.get("x-vcot-checkpoint", ""), headers.get("x-vcot-digest", "")
    return digests.get(name) == digest and set(models) == {f"{name}@{digest.removeprefix('sha256:')[:12]}"}


def read_models(text: bytes) -> list[str]:
    """The `model` of an answer, or of each event of a stream. Raises ValueError for what is not whole."""
    if not text.startswith(b"data: "):
        return [orjson.loads(text)["model"]]
    events = [line.removeprefix(b"data: ") for line in text.split(b"\n") if line]
    if events[-1] != b"[DONE]":
        raise ValueError(f"the stream ends with {events[-1][:200]!r}")
    return [orjson.loads(event)["model"] for event in events[:-1]]


class Asker:
    """An honest client."""

    def __init__(self, session: aiohttp.ClientSession, key: str, digests: dict[str, str], tally: Tally) -> None:
        self._session = session
        self._headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        self._digests = digests
        self._tally = tally

    async def ask(self, number: int, expect: str | None = None, model: str = "policy") -> None:
        """One request of the mix, asked again as long as the server says when; what became of it is counted."""
        kinds: tuple[dict[str, Any], ...] = (
            {"n": 8, "temperature": 1.0},
            {"stream": True},
            {},
            {"stream": True, "n": 2},
        )
        body = {"model": model, "messages": question(number % _NUM_QUESTIONS), "max_tokens": 16, **kinds[number % 4]}
        headers = self._headers | ({"x-vcot-expect": expect} if expect else {})
        self._tally.num_honest += 1
        began = time.monotonic()
        for _ in range(_MAX_TRIES):
            try:
                async with self._session.post(CHAT, data=orjson.dumps(body), headers=headers) as answer:
                    text = await answer.read()
                if answer.status in (429, 503) and "retry-after" in answer.headers:
                    self._tally.num_retried += 1
                    await asyncio.sleep(float(answer.headers["retry-after"]))
                    continue
                self._judge(answer, text)
                self._tally.latencies_s.append(time.monotonic() - began)
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError) as error:
                self._fail(repr(error))
            return
        self._fail(f"not answered after {_MAX_TRIES} tries")

    def _judge(self, answer: aiohttp.ClientResponse, text: bytes) -> None:
        if answer.status != 200:
            raise ValueError(f"{answer.status}: {text[:300]!r}")
        if not is_stamped(dict(answer.headers), read_models(text), self._digests):
            self._tally.num_mis_stamped += 1
            say(f"mis-stamped: {dict(answer.headers)} {text[:300]!r}")

    def _fail(self, why: str) -> None:
        self._tally.num_failed += 1
        self._tally.faults[f"request: {why[:120]}"] += 1
        say(f"failed: {why[:400]}")


@dataclass(frozen=True)
class Watch:
    """Reads the processes."""

    gateway_pid: int
    memory: dict[str, Series] = field(default_factory=lambda: {"gateway": Series(), "vllm": Series()})
    counts: dict[str, Series] = field(default_factory=lambda: {"open_files": Series(), "threads": Series()})

    def read(self, now: float) -> None:
        """One reading of each."""
        engine = sum(resident_bytes(pid) for pid in _descendants(self.gateway_pid))
        self.memory["gateway"].add(now, resident_bytes(self.gateway_pid) / _MIB)
        self.memory["vllm"].add(now, engine / _MIB)
        folder = Path(f"/proc/{self.gateway_pid}")
        self.counts["open_files"].add(now, len(list((folder / "fd").iterdir())))
        self.counts["threads"].add(now, len(list((folder / "task").iterdir())))


def resident_bytes(pid: int) -> int:
    """0 for a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _descendants(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for child in children(pid):
            yield child
            yield from _descendants(child)


async def attack(url: str, key: str, tally: Tally, per_s: float) -> None:
    """Start so many attacks a second, until cancelled; while too many are on, none."""
    address = urlsplit(url)
    running: set[asyncio.Task[None]] = set()

    async def one(kind: str, result: Any) -> None:
        try:
            tally.attacks[f"{kind}: {await result}"] += 1
        except OSError as error:
            tally.attacks[f"{kind}: {type(error).__name__}"] += 1

    for each in attacks(address.netloc, key, question):
        while len(running) >= _MAX_ATTACKS:
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.create_task(one(each.kind, each.run(str(address.hostname), int(address.port or 80))))
        running.add(task)
        task.add_done_callback(running.discard)
        await asyncio.sleep(1 / per_s)


async def steer(url: str, asker: Asker, digests: dict[str, str], tally: Tally) -> None:
    """Swap the policy every minute, now and then after a trial of the other; until cancelled."""
    numbers = itertools.count()
    for turn in itertools.count(1):
        await asyncio.sleep(_SWAP_EVERY_S)
        target = ("moved", "base")[(turn - 1) % 2]
        try:
            if turn % _TRIAL_TURN == 0:
                await try_out(url, target)
                await asyncio.gather(*(asker.ask(next(numbers), digests[target], target) for _ in range(8)))
            await swap_to(url, "policy", target)
        except VcotError as error:
            tally.faults[f"swap: {error}"[:200]] += 1
            say(f"swap to {target} failed: {error}")
        else:
            tally.attacks[f"(swaps to {target})"] += 1


async def soak(url: str, key: str, digests: dict[str, str], watch: Watch, tally: Tally, options: Any) -> None:
    """The load, for its time."""
    began, numbers = time.monotonic(), itertools.count()
    async with open_session(Endpoint(url)) as session:
        asker = Asker(session, key, digests, tally)

        async def keep_asking() -> None:
            while time.monotonic() - began < 60 * options.minutes:
                await asker.ask(next(numbers))
                await asyncio.sleep(0.05)

        others = [
            asyncio.create_task(attack(url, key, tally, options.attacks_per_s)),
            asyncio.create_task(steer(url, asker, digests, tally)),
            asyncio.create_task(_keep_reading(watch, tally, began)),
        ]
        await asyncio.gather(*(keep_asking() for _ in range(options.askers)))
        for task in others:
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


async def _keep_reading(watch: Watch, tally: Tally, began: float) -> None:
    said = began
    while True:
        now = time.monotonic()
        watch.read(now - began)
        if now - said >= _SAY_EVERY_S:
            said = now
            memory = ", ".join(f"{name} {series.values[-1]:.0f} MiB" for name, series in watch.memory.items())
            say(
                f"{now - began:4.0f} s: {tally.num_honest} honest, {tally.num_failed} failed, {tally.num_retried} retried, "
                f"p50 {tally.percentile_ms(50)} ms; {tally.attacks.total()} attacks; {memory}; "
                f"{watch.counts['open_files'].values[-1]:.0f} files"
            )
        await asyncio.sleep(_SAMPLE_EVERY_S)


async def main(options: Any) -> None:
    """Start everything, load it, and print what was found."""
    key = os.environ[API_KEYS_ENV] = "sk-" + secrets.token_hex(16)
    tally = Tally()
    with (
        tempfile.TemporaryDirectory(prefix="vcot-soak-") as name,
        open_run(Path(name) / "run", "nano", ["serve.port=0"]) as run,
    ):
        moved = make_variant(Path(name), "moved", 0.2)
        async with running_gateway(run, say) as gateway:
            state = await fetch_state(gateway.url)
            assert state.live is not None
            digests = {state.live.name: state.live.digest, "moved": (await register(gateway.url, moved)).digest}
            watch = Watch(state.pid)
            await soak(gateway.url, key, digests, watch, tally, options)
            state = await fetch_state(gateway.url)
        logs = sum(path.stat().st_size for path in run.path("logs").iterdir())
    for what, count in sorted(tally.attacks.items()):
        say(f"{count:6} {what}")
    figures = {
        "minutes": options.minutes,
        "honest": tally.num_honest,
        "failed": tally.num_failed,
        "mis_stamped": tally.num_mis_stamped,
        "retried": tally.num_retried,
        "p50_ms": tally.percentile_ms(50),
        "p99_ms": tally.percentile_ms(99),
        "attacks": tally.attacks.total(),
        "vllm_restarts": state.num_restarts,
        "memory_mib": {name: series.summary() for name, series in watch.memory.items()},
        **{name: series.summary(0) for name, series in watch.counts.items()},
        "logs_mib": round(logs / _MIB, 1),
        "faults": dict(tally.faults),
        "cores": os.cpu_count(),
    }
    print(orjson.dumps(figures).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Hostile and honest load on one gateway.")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--askers", type=int, default=6)
    parser.add_argument("--attacks-per-s", type=float, default=8.0)
    uvloop.run(main(parser.parse_args()))
