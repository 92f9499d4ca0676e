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
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import uvloop
from aiohttp import web
from safetensors.numpy import load_file, save_file

from bench.engine import NANO, chat, make_variant, open_session, question, say
from bench.mutations import Score, Target, mutations
from pipeline.errors import ServerError, VcotError
from pipeline.identity import compute_digest, read_manifest, write_manifest
from pipeline.run import Run, open_run
from services.checkpoints.registry import Checkpoint
from services.engine.vllm import Endpoint, VllmServer
from services.gateway.admin import GatewayState, fetch_state, register, swap_to
from services.run.serving import running_gateway

_MAX_RECOVERY_S = 8.0
"""A gateway that can load the right weights again has done so by then."""
_QUESTIONS = [question(number) for number in range(16)]
# In processes of their own: torch stays out of this one.
_ADAPTER = """
import sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from pipeline.identity import compute_digest, read_manifest, write_manifest
from pipeline.records import CheckpointManifest, CheckpointRef
from training.model.canary import build_canary
from training.model.loading import load_model, load_processor, quiet_libraries
quiet_libraries()
nano, out = Path(sys.argv[1]), Path(sys.argv[2])
torch.manual_seed(0)
layers = r".*language_model.*\\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
config = LoraConfig(r=8, lora_alpha=16, target_modules=layers, init_lora_weights=False)
model = get_peft_model(load_model(nano, torch.float32), config).eval()
model.save_pretrained(out)
ref = CheckpointRef(name=out.name, digest=compute_digest(out), kind="adapter", parent=read_manifest(nano).checkpoint.digest)
write_manifest(out, CheckpointManifest(checkpoint=ref, canary=build_canary(model, load_processor(nano)[0])))
"""
_SAME = """
import json, sys
from pathlib import Path
import torch
from training.model.canary import _image_side, _prompt_batch, draw_canary
from training.model.loading import load_model, load_processor, quiet_libraries
quiet_libraries()
right, wrongs = Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]]
processor, _ = load_processor(right)
batch = _prompt_batch(processor, draw_canary(_image_side(processor)))
draw = torch.Generator().manual_seed(0)
pixels = [batch["pixel_values"], *(torch.randn(batch["pixel_values"].shape, generator=draw) for _ in range(7))]

def logits(directory, dtype):
    model = load_model(directory, torch.float32).to(dtype)
    with torch.inference_mode():
        return torch.stack([model(**(batch | {"pixel_values": image.to(dtype)})).logits for image in pixels])

def are_same(wrong):
    if torch.equal(logits(wrong, torch.float32), logits(right, torch.float32)):
        return True
    return bool((logits(wrong, torch.float64) - logits(right, torch.float64)).abs().max() < 1e-12)

print(json.dumps([are_same(wrong) for wrong in wrongs]))
"""


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
    body = {"model": "policy", "messages": _QUESTIONS[number], "temperature": 0.0, "max_tokens": 16, "logprobs": True}
    response, found = await chat(session, body)
    return response.headers["x-vcot-digest"], tuple(t["token"] for t in found["choices"][0]["logprobs"]["content"])


async def learn(session: aiohttp.ClientSession, tally: Tally) -> str:
    """Write down the answers of what is live; its digest."""
    answers = [await answer(session, number) for number in range(len(_QUESTIONS))]
    digest = answers[0][0]
    tally.expected.setdefault(digest, [tokens for _, tokens in answers])
    return digest


@asynccontextmanager
async def load(session: aiohttp.ClientSession, tally: Tally, num_askers: int) -> AsyncIterator[None]:
    """Requests in flight, always."""
    numbers = itertools.count()

    async def keep_asking() -> None:
        while True:
            await tally.ask(session, next(numbers) % len(_QUESTIONS))

    askers = [asyncio.create_task(keep_asking()) for _ in range(num_askers)]
    try:
        yield
    finally:
        for asker in askers:
            asker.cancel()
        await asyncio.gather(*askers, return_exceptions=True)


@dataclass
class Between:
    """The proxy before the engine. Its fields say what it does wrong."""

    socket: Path
    instead: dict[str, Path] = field(default_factory=dict)
    """What is loaded in place of a directory of that name."""
    skipped: frozenset[str] = frozenset()
    """Calls that it answers by itself."""
    url: str = ""
    _session: aiohttp.ClientSession | None = None

    async def pass_on(self, request: web.Request) -> web.Response:
        body, path = await request.read(), request.path
        if path in self.skipped:
            return web.json_response({"success": True})
        if path in ("/collective_rpc", "/v1/load_lora_adapter") and self.instead:
            for right, wrong in self.instead.items():
                body = body.replace(right.encode(), str(wrong).encode())
        assert self._session is not None
        headers = {"content-type": "application/json"}
        try:
            async with self._session.request(request.method, request.path_qs, data=body, headers=headers) as answered:
                kind = answered.headers.get("content-type", "").partition(";")[0] or "application/json"
                return web.Response(body=await answered.read(), status=answered.status, content_type=kind)
        except aiohttp.ClientError:
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=502)

    async def reach(self, socket: Path) -> None:
        """From now on, the engine there."""
        old, self.socket = self._session, socket
        self._session = open_session(Endpoint("http://vllm", socket))
        if old is not None:
            await old.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{tail:.*}", self.pass_on)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        await self.reach(self.socket)
        try:
            yield
        finally:
            await runner.cleanup()
            assert self._session is not None
            await self._session.close()


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
                found = [await answer(session, number) for number in range(len(_QUESTIONS))]
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


def make_adapter(folder: Path) -> Path:
    subprocess.run([sys.executable, "-c", _ADAPTER, str(NANO), str(folder / "light")], check=True)
    return folder / "light"


def retemplated(target: Path, folder: Path) -> Path:
    """The same weights and another chat template, as a checkpoint of its own."""
    shutil.copytree(target, folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text("utf-8") + "{{ ' ' }}", "utf-8")
    manifest = read_manifest(folder)
    ref = manifest.checkpoint.model_copy(update={"name": folder.name, "digest": compute_digest(folder)})
    write_manifest(folder, manifest.model_copy(update={"checkpoint": ref}))
    return folder


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


def sort_out(score: Score, made: dict[str, Target], folder: Path) -> tuple[list[str], list[str]]:
    """Names of what was missed, and of what was equivalent."""
    missed = [name for _, name, mutation in score.passed if mutation is None]
    doubtful = [(name, mutation) for way, name, mutation in score.passed if mutation and way != "adapter"]
    missed += [name for way, name, mutation in score.passed if mutation and way == "adapter"]
    if not doubtful:
        return missed, list(score.harmless)
    target = made["tuned"]
    old, weights = load_file(NANO / target.file), target.weights
    wrongs = []
    for number, (_, mutation) in enumerate(doubtful):
        changed = mutation.of(weights, sorted(weights))
        assert changed is not None
        wrongs.append(str(target.write(folder / f"doubtful-{number}", old | changed)))
    command = [sys.executable, "-c", _SAME, str(target.directory), *wrongs]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    same = orjson.loads(done.stdout.splitlines()[-1])
    equivalent = [name for (name, _), is_same in zip(doubtful, same, strict=True) if is_same]
    return missed + [name for name, _ in doubtful if name not in equivalent], equivalent + score.harmless


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
