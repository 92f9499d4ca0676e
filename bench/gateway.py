"""What the gateway costs: the same requests with a 100 KB image, direct and through three proxies, to one instant upstream.

    make bench-gateway        (python -m bench.gateway [--rounds N] [--seconds S])

Measured: `added_ms`, the median latency that vcot's gateway adds at one connection; `vs_vllm_router` and `vs_litellm`, its
requests per second over theirs at 32 connections. How: every target takes its turn in each round, in an order that shifts
by one from round to round; a figure is the median over rounds, a ratio is taken within a round first. All of it first
against an upstream on aiohttp, whose figures are the headline, then against one that costs next to nothing
(`bare_upstream`), where a proxy's own cost shows undiluted. The gateway is the ASGI application under uvicorn as
`vcot serve` runs it (request log included), with one engine that is live and whose server is the upstream, over TCP as
for the others (with vLLM it is a unix socket). vllm-router (Rust, its threads as it likes, round robin, the cheapest of
its policies) and LiteLLM's proxy (one worker) come from bench/requirements.txt, in an environment of their own,
bench/.venv-proxies.

Limits: one machine, whose cores the generator (bench/load.py), the proxy and the upstream share; the fewer the cores, the
smaller the differences between proxies come out. A proxy that cannot be installed or does not answer is null.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import math
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson
import uvloop
from PIL import Image

from bench.load import KEY, MIN_BODY_BYTES, Measured, http_request, measure

_HERE = Path(__file__).parent
_NANO = _HERE.parent / "training" / "checkpoints" / "nano"
_VENV = _HERE / ".venv-proxies"
_REQUIREMENTS = _HERE / "requirements.txt"
_MODEL = "base"
"""What each target calls the model."""
_LITELLM = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": KEY}
"""Variables without which it asks the network for prices, and does not start."""
_CONNECTIONS = 32
_START_S = 60.0


def say(message: str) -> None:
    """Progress, for people."""
    print(message, file=sys.stderr, flush=True)


def chat_body() -> bytes:
    """A chat completion whose image, a PNG of noise, makes it a little over 100 KB."""
    side = math.isqrt(MIN_BODY_BYTES // 4) + 1
    buffer = io.BytesIO()
    Image.frombytes("RGB", (side, side), random.Random(0).randbytes(3 * side * side)).save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "text", "text": "What is the colour of the circle?"},
    ]
    return orjson.dumps({"model": _MODEL, "messages": [{"role": "user", "content": parts}], "max_tokens": 16})


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def install_proxies() -> None:
    """Make bench/.venv-proxies from the pinned requirements, once; what is not there is said later."""
    mark = _VENV / ".ready"
    if mark.is_file() and mark.read_bytes() == _REQUIREMENTS.read_bytes():
        return
    say(f"installing {_REQUIREMENTS.name} into {_VENV}")
    uv = str(Path(sys.executable).parent / "uv")
    make = [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(_VENV)]
    install = [uv, "pip", "sync", "--quiet", "--require-hashes", "--python", str(_VENV / "bin" / "python")]
    if all(subprocess.run(command, check=False).returncode == 0 for command in (make, [*install, str(_REQUIREMENTS)])):
        shutil.copyfile(_REQUIREMENTS, mark)


@contextmanager
def process(name: str, command: list[str], folder: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A child, its output in a file, killed at the end with what it started."""
    with (folder / f"{name}.log").open("wb") as log:
        child = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | environment, cwd=_HERE.parent, start_new_session=True
        )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, 15)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)
            child.wait()


async def is_answering(port: int, body: bytes, child: subprocess.Popen[bytes]) -> bool:
    """Wait until the upstream's own answer comes through; False where it never does."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and child.poll() is None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(5):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(http_request(port, body))
                answer = await reader.read(65_536)
                writer.close()
                if answer.startswith(b"HTTP/1.1 200") and (
                    b"The answer is (A)." in answer or b"The answer is (A)." in await reader.read(65_536)
                ):
                    return True
        await asyncio.sleep(0.5)
    return False


def serve_gateway(folder: Path, port: int, num_workers: int, *upstream_ports: int) -> None:
    """Be the gateway: `vcot serve`, but for the servers that it starts. Imported here: only the child needs it."""
    from vcot.pipeline.errors import ServerError
    from vcot.pipeline.identity import read_manifest, write_manifest
    from vcot.pipeline.sections import ModelSection
    from vcot.services.checkpoints.registry import Checkpoint, Registry
    from vcot.services.engine.serve_section import ServeSection
    from vcot.services.engine.vllm import Endpoint
    from vcot.services.gateway.fleet.group import Fleet
    from vcot.services.gateway.fleet.roster import Roster
    from vcot.services.run import serving

    class InstantServer:
        """The upstream, which runs already."""

        def __init__(self, checkpoint: Checkpoint, port: int) -> None:
            self.checkpoint = checkpoint
            self.endpoint = Endpoint(f"http://127.0.0.1:{port}")

        async def start(self, progress: Any) -> None:
            """It does."""

        async def wait(self) -> ServerError:
            await asyncio.Event().wait()
            raise AssertionError

        async def stop(self) -> None:
            """Others use it, too."""

    checkpoint = folder / "nano"
    shutil.copytree(_NANO, checkpoint)
    manifest = read_manifest(checkpoint)
    write_manifest(checkpoint, manifest.model_copy(update={"canary": None}))  # the upstream computes nothing

    async def serve() -> None:
        settings = ServeSection(port=port, gateway_workers=num_workers, replicas=len(upstream_ports))
        with serving._listening(settings) as listener:
            registry = Registry(folder / "run")
            registry.base(ModelSection(source=str(checkpoint), name=_MODEL))

            def launch(checkpoint: Checkpoint, number: int, _: str | None) -> InstantServer:
                return InstantServer(checkpoint, upstream_ports[number])

            fleet = Fleet(registry, settings, Roster(folder / "run", settings), launch, say)
            front = serving._front(fleet, folder / "run", settings, listener, say)
            await serving._serve_until_stopped(fleet, front, folder, withdraw=lambda: None)

    uvloop.run(serve())


def gateway_command(folder: Path, port: int, *upstream_ports: int, num_workers: int = 1) -> list[str]:
    """The command of a gateway of so many processes before servers that run already."""
    numbers = map(str, (port, num_workers, *upstream_ports))
    return [sys.executable, "-m", "bench.gateway", "--gateway", str(folder), *numbers]


def router_command(port: int, upstream_port: int) -> list[str]:
    command = [str(_VENV / "bin" / "vllm-router"), "--host", "127.0.0.1", "--port", str(port), "--policy"]
    return [
        *command,
        "round_robin",
        "--worker-urls",
        f"http://127.0.0.1:{upstream_port}",
        "--prometheus-port",
        str(free_port()),
        "--log-level",
        "error",
    ]


def litellm_command(folder: Path, port: int, upstream_port: int) -> list[str]:
    config = folder / "litellm.yaml"
    config.write_text(
        f"model_list:\n  - model_name: {_MODEL}\n    litellm_params:\n      model: openai/{_MODEL}\n"
        f"      api_base: http://127.0.0.1:{upstream_port}/v1\n      api_key: none\n"
    )
    command = [str(_VENV / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    return [*command, "--num_workers", "1"]


@asynccontextmanager
async def targets(upstream: str, body: bytes) -> AsyncIterator[dict[str, int]]:
    """The ports of what answers: the upstream as `direct`, and the proxies before it."""
    with tempfile.TemporaryDirectory(prefix="vcot-bench-") as name, contextlib.ExitStack() as stack:
        folder, ports = Path(name), {"direct": free_port()}
        command = [sys.executable, "-m", "bench.load", upstream, str(ports["direct"])]
        child = stack.enter_context(process("direct", command, folder))
        if not await is_answering(ports["direct"], body, child):
            raise SystemExit((folder / "direct.log").read_text())
        for proxy in ("vcot", "vllm_router", "litellm"):
            ports[proxy] = port = free_port()
            command = {
                "vcot": lambda port=port: gateway_command(folder, port, ports["direct"]),
                "vllm_router": lambda port=port: router_command(port, ports["direct"]),
                "litellm": lambda port=port: litellm_command(folder, port, ports["direct"]),
            }[proxy]()
            began = time.monotonic()
            if Path(command[0]).is_file():
                environment = (
                    {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": KEY} if proxy == "litellm" else {}
                )
                child = stack.enter_context(process(proxy, command, folder, **environment))
                if await is_answering(port, body, child):
                    say(f"{proxy} answers after {time.monotonic() - began:.1f} s")
                    continue
                say((folder / f"{proxy}.log").read_text("utf-8", "replace")[-2000:])
            say(f"{proxy} is left out: it is not installed, or does not answer")
            del ports[proxy]
        yield ports


Rounds = list[dict[str, tuple[Measured, Measured]]]


async def run_rounds(ports: dict[str, int], body: bytes, num_rounds: int, seconds: float) -> Rounds:
    """Each target in turn, at one connection and at 32."""
    rounds: Rounds = []
    names = list(ports)
    for number in range(num_rounds):
        turn = number % len(names)
        rounds.append({})
        for name in names[turn:] + names[:turn]:
            one = await measure(ports[name], body, 1, seconds, warm_s=0.3)
            many = await measure(ports[name], body, _CONNECTIONS, seconds, warm_s=2.0 if name == "litellm" else 0.5)
            rounds[-1][name] = (one, many)
            failed = f", {one.num_failed + many.num_failed} FAILED" if one.num_failed + many.num_failed else ""
            say(
                f"round {number + 1} {name:12} {one.median_ms:7.2f} ms at 1, "
                f"{many.requests_per_s:7.0f} requests/s at {_CONNECTIONS}{failed}"
            )
    return rounds


def summarize(rounds: Rounds) -> dict[str, Any]:
    """The figures; null for what was not there."""

    def rate(turn: dict[str, tuple[Measured, Measured]], name: str) -> float:
        return turn[name][1].requests_per_s

    def versus(name: str) -> float | None:
        if name not in rounds[0] or "vcot" not in rounds[0]:
            return None
        return round(statistics.median(rate(turn, "vcot") / rate(turn, name) for turn in rounds), 3)

    def added(name: str) -> float | None:
        if name not in rounds[0]:
            return None
        return round(statistics.median(turn[name][0].median_ms - turn["direct"][0].median_ms for turn in rounds), 3)

    return {
        "added_ms": added("vcot"),
        "vs_vllm_router": versus("vllm_router"),
        "vs_litellm": versus("litellm"),
        "direct_ms": round(statistics.median(turn["direct"][0].median_ms for turn in rounds), 3),
        "added_ms_of": {name: added(name) for name in ("vllm_router", "litellm")},
        "requests_per_s": {name: round(statistics.median(rate(turn, name) for turn in rounds)) for name in rounds[0]},
        "num_failed": sum(m.num_failed for turn in rounds for pair in turn.values() for m in pair),
    }


def setting(num_rounds: int) -> dict[str, Any]:
    """What the figures were measured with."""
    versions = {"uvicorn": metadata.version("uvicorn"), **_pinned("vllm-router", "litellm")}
    return {"rounds": num_rounds, "cores": os.cpu_count(), "generator": "bench/load.py", "versions": versions}


def _pinned(*names: str) -> dict[str, str]:
    """The pinned versions, out of lines such as `name==1.2.3 \\`."""
    pins = (line.removesuffix(" \\").split("==") for line in _REQUIREMENTS.read_text().splitlines() if "==" in line)
    return {name: version for name, version in pins if name in names}


async def main(num_rounds: int, seconds: float) -> None:
    body = chat_body()
    figures: dict[str, dict[str, Any]] = {}
    for upstream in ("aiohttp", "bare"):
        say(f"upstream: {upstream}")
        async with targets(upstream, body) as ports:
            figures[upstream] = summarize(await run_rounds(ports, body, num_rounds, seconds))
    print(orjson.dumps(figures["aiohttp"] | {"bare_upstream": figures["bare"]} | setting(num_rounds)).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Gateway overhead against an instant upstream.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--gateway", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.gateway:
        serve_gateway(Path(given.gateway[0]), *map(int, given.gateway[1:]))
    else:
        install_proxies()
        uvloop.run(main(given.rounds, given.seconds))
