"""Wrong weights on purpose: which guard of a swap sees them, and how often a right checkpoint is refused.

    make bench-swap-mutations       (python -m bench.swap_mutations [--ways reload adapter] [--every N])

Between a real gateway and the real vLLM with nano stands a proxy that does what a broken engine does. While `--askers`
requests are always in flight, a checkpoint (nano with noise of 2 % on every tensor, or a random LoRA on its language
model) is swapped in for nano, wrong in one thing each time:

    files      one tensor of the registered files missing, zeroed, scaled by 1.01, exchanged with the next one of its shape,
               or rounded to bfloat16, in place and with the file's old time; the manifest is kept
    engine     the same, but only what the engine loads: the files and the manifest are right
    skipped    the load, or the reset of the prefix, multimodal or encoder cache, is answered with 200 and not done
               (without the last of them vLLM's engine ends with the next image)
    template   the same weights with another chat template
    restart    the engine is started anew behind the gateway's back, and holds nano again

Printed: `detected`, mutations that were refused, and `by_guard`, `by_way`, `by_mutation`; `missed`, those that were swapped
in; `equivalent`, those that were swapped in and cannot change an answer, since Hugging Face's logits for them are equal to
the last bit in float32, or within 1e-12 in float64 (`missed_names` and `equivalent_names` list both); `false_alarms`,
refusals of a right checkpoint among `right_swaps`; `unjudged`, attempts while nothing was live, which say nothing of any
guard; `ruined_engines`, those that had to be started anew, since right weights did not answer rightly on them any more;
and of the load `answered`, `failed`, `refused` (while nothing was live) and `mis_stamped`, answers whose tokens are those
of other weights than they are stamped with.

Limits: nano, one machine, float32. What is missing keeps the values of nano, which differ by 2 %. A random LoRA moves
answers by more than a trained one does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import uvloop
from safetensors.numpy import save_file

from bench.broken_engine import Between
from bench.engine import NANO, make_variant, open_session, say
from bench.mutations import Score, Target, mutations
from bench.stamped_load import QUESTIONS, Tally, answer, learn, load
from bench.swapped_checkpoints import make_adapter, retemplated, sort_out
from vcot.pipeline.errors import VcotError
from vcot.pipeline.identity import read_manifest
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.engine.vllm import Endpoint, VllmServer
from vcot.services.gateway.admin import GatewayState, fetch_state, register, swap_to
from vcot.services.run.directory import Run, open_run
from vcot.services.run.serving import running_gateway

_MAX_RECOVERY_S = 8.0
"""A gateway that can load the right weights again has done so by then."""


@dataclass
class Attempts:
    """One way to swap, before a gateway that is up with nano."""

    way: str
    name: str
    """Of the right checkpoint."""
    swap: Callable[[str], Any]
    """Points `policy` at a checkpoint of that name. Raises VcotError."""
    ready: Callable[[], Any]
    """Waits until something is live: weights that make no numbers leave some in the engine's cache of keys and values."""
    score: Score

    async def refusal(self) -> str | None:
        """Why the checkpoint was not swapped in; None where it was, and nano is live again."""
        await self.ready()
        try:
            await self.swap(self.name)
        except VcotError as error:
            return str(error)
        await self.swap("base")
        return None

    async def right(self, times: int = 1) -> None:
        """With nothing wrong."""
        for _ in range(times):
            self.score.count_right(self.way, await self.refusal())

    async def files(self, target: Target, every: int) -> None:
        """Wrong files under the registered name."""
        path = target.directory / target.file
        right, times = path.read_bytes(), path.stat()
        for mutation, weights in mutations(target.weights, every):
            save_file(weights, path, metadata={"format": "pt"})
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            self.score.count(self.way, "files", mutation, await self.refusal())
            path.write_bytes(right)
        await self.right()

    async def engine(self, target: Target, between: Between, wrong: Path, every: int) -> None:
        """Right files, and an engine that loads others."""
        for number, (mutation, weights) in enumerate(mutations(target.weights, every)):
            between.instead = {self.instead_of(target): target.write(wrong, weights)}
            self.score.count(self.way, "engine", mutation, await self.refusal())
            between.instead = {}
            if number % 25 == 0:
                await self.right()
                say(f"{self.way}: {number + 1} mutations, {len(self.score.passed)} swapped in")

    def instead_of(self, target: Target) -> str:
        """The path that the engine is told to load."""
        if self.way != "adapter":
            return str(target.directory)
        digest = read_manifest(target.directory).checkpoint.digest.removeprefix("sha256:")
        return str(self.served / digest)

    served: Path = Path()

    async def skipped(self, between: Between, session: aiohttp.ClientSession, tally: Tally) -> None:
        """Calls that are answered and not done. Where that let no wrong answer through, it was no fault."""
        for what, call in (
            ("load", "/collective_rpc"),
            ("prefix cache", "/reset_prefix_cache"),
            ("image cache", "/reset_mm_cache"),
        ):
            between.skipped = frozenset((call,))
            refusal = None
            try:
                await self.swap(self.name)
                found = [await answer(session, number) for number in range(len(QUESTIONS))]
                if [tokens for _, tokens in found] == tally.expected[found[0][0]]:
                    self.score.harmless.append(f"{self.way}/skipped {what}")
                else:
                    self.score.count(self.way, f"skipped {what}", None, None)
                await self.swap("base")
            except VcotError as error:
                self.score.count(self.way, f"skipped {what}", None, refusal := str(error))
            between.skipped = frozenset()
            say(f"skipped {what}: {refusal}")
        await self.right()


# Servers


@asynccontextmanager
async def gateway_over(run: Run, between: Between) -> AsyncIterator[str]:
    """A gateway of the run, whose only engine is behind the proxy; its URL."""
    async with between.running():
        with open_run(run.directory, None, [f"serve.upstreams=['{between.url}']"]) as opened:
            async with running_gateway(opened, say) as gateway:
                yield gateway.url


async def start_engine(run: Run, number: int) -> VllmServer:
    """A vLLM that holds nano and takes adapters."""
    checkpoint = Checkpoint(NANO, read_manifest(NANO))
    log = run.path("logs", f"engine-{number}.log")
    server = VllmServer(checkpoint, run.recipe.serve, log, max_lora_rank=run.recipe.train.lora_r)
    await server.start(say)
    return server


@dataclass
class Engine:
    """The server behind the proxy, and those that take its place. Mutated by itself only."""

    run: Run
    between: Between
    url: str
    """The gateway's."""
    server: VllmServer
    num_started: int = 1
    num_ruined: int = 0

    async def renew(self) -> None:
        """Start another in its place, behind the gateway's back."""
        await self.server.stop()
        self.server = await start_engine(self.run, self.num_started)
        self.num_started += 1
        await self.between.reach(_socket(self.server))

    async def ready(self) -> None:
        """Have something live.

        Weights whose results are no numbers leave such in the cache of keys and values, and no call empties that.
        """
        if (await until(self.url, _is_live, _MAX_RECOVERY_S)).live is None:
            self.num_ruined += 1
            await self.renew()
            await until(self.url, _is_live)


def _is_live(state: GatewayState) -> bool:
    return state.live is not None


async def shared_server(
    run: Run, made: dict[str, Target], options: argparse.Namespace, score: Score, tally: Tally
) -> list[float]:
    """The ways that one server does; the pauses of right swaps with nothing in flight."""
    between = Between(_socket(server := await start_engine(run, 0)))
    engine: Engine | None = None
    try:
        async with gateway_over(run, between) as url, open_session(Endpoint(url)) as session:
            engine = Engine(run, between, url, server)

            async def swap(name: str) -> float:
                return (await swap_to(url, "policy", name)).pause_s

            await learn(session, tally)
            for target in made.values():
                await register(url, target.directory)
                await swap(target.directory.name)
                await learn(session, tally)
                await swap("base")
            pauses = [await swap(name) for name in ("tuned", "base", "tuned", "base")] if "tuned" in made else []
            async with load(session, tally, options.askers):
                for way, target in made.items():
                    name = target.directory.name
                    attempts = Attempts("adapter" if name == "light" else "reload", name, swap, engine.ready, score)
                    attempts.served = run.directory / "checkpoints" / "served"
                    await attempts.right(options.rights)
                    await attempts.engine(target, between, run.path("wrong", way), options.every)
                    await attempts.files(target, options.every)
                    if name == "tuned":
                        await attempts.skipped(between, session, tally)
                        await register(url, retemplated(target.directory, run.path("templated")))
                        templated = Attempts("reload", "templated", swap, engine.ready, score)
                        score.count("reload", "template", None, await templated.refusal())
                        await attempts.right()
                await lose(engine, Attempts("reload", next(iter(made)), swap, engine.ready, score))
    finally:
        await (engine.server if engine else server).stop()
    score.num_ruined = engine.num_ruined
    return pauses


def _socket(server: VllmServer) -> Path:
    assert server.endpoint.socket is not None
    return server.endpoint.socket


async def lose(engine: Engine, attempts: Attempts) -> None:
    """Let the engine end with its encoder cache, then start it anew behind the gateway while another checkpoint is live."""
    if attempts.name == "tuned":  # an adapter of the language model changes nothing that is cached there
        engine.between.skipped = frozenset(("/reset_encoder_cache",))
        attempts.score.count("reload", "skipped encoder cache", None, await attempts.refusal())
        engine.between.skipped = frozenset()
    await engine.renew()
    await engine.ready()
    await attempts.swap(attempts.name)
    num_restarts = (await fetch_state(engine.url)).num_restarts
    await engine.renew()
    state = await until(engine.url, lambda now: now.num_restarts > num_restarts and now.live is not None)
    await asyncio.sleep(5.0)  # of load, whose answers are held against their stamps
    is_seen = state.num_restarts > num_restarts
    attempts.score.count("reload", "restart", None, "the engine was started anew" if is_seen else None)


async def until(url: str, is_so: Callable[[GatewayState], bool], timeout_s: float = 120.0) -> GatewayState:
    """The gateway's state, when it is so or the time is over."""
    for _ in range(int(timeout_s / 0.2)):
        if is_so(state := await fetch_state(url)):
            break
        await asyncio.sleep(0.2)
    return state


async def main(options: argparse.Namespace) -> None:
    score, tally = Score(), Tally()
    with tempfile.TemporaryDirectory(prefix="vcot-bench-") as name:
        folder = Path(name)
        made = {}
        if "reload" in options.ways:
            made["tuned"] = Target(make_variant(folder, "tuned", 0.02), "model.safetensors")
        if "adapter" in options.ways:
            made["light"] = Target(make_adapter(folder), "adapter_model.safetensors")
        settings = ["serve.port=0", "train.target_modules=language-model", "train.lora_r=8"]
        with open_run(folder / "run", "nano", settings) as run:
            pauses = await shared_server(run, made, options, score, tally) if made else []
        missed, equivalent = sort_out(score, made, folder)
    figures = {
        "detected": sum(score.by_way.values()),
        "missed": len(missed),
        "false_alarms": score.false_alarms,
        "right_swaps": score.right_swaps,
        "unjudged": len(score.unjudged),
        "equivalent": len(equivalent),
        "by_guard": dict(score.by_guard),
        "by_way": dict(score.by_way),
        "by_mutation": dict(score.by_mutation),
        "answered": tally.answered,
        "failed": tally.failed,
        "refused": tally.refused,
        "ruined_engines": score.num_ruined,
        "mis_stamped": tally.mis_stamped,
        "idle_pause_s": round(max(pauses, default=0.0), 3),
        "missed_names": missed,
        "equivalent_names": equivalent,
        "cores": os.cpu_count(),
    }
    print(orjson.dumps(figures).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Wrong weights on purpose.")
    parser.add_argument("--ways", nargs="+", choices=("reload", "adapter"), default=["reload", "adapter"])
    parser.add_argument("--every", type=int, default=1, help="take one mutation in so many")
    parser.add_argument("--rights", type=int, default=10, help="right swaps to begin with, each there and back")
    parser.add_argument("--askers", type=int, default=4)
    uvloop.run(main(parser.parse_args()))
