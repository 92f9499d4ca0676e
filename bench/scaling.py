"""How many replicas one sampling command keeps busy: its own path through a real gateway, before simulated replicas.

    make bench-scaling       (python -m bench.scaling [--replicas N ...] [--workers N] [--seconds S])

Measured, in one go: the real vLLM with nano first, asked for k=8 with as many requests in flight as it has seats: what it
gives a second (`replica_responses_per_s`) and how long a request takes. Simulated replicas then take as long, with as many
seats (a request beyond them waits), and compute nothing. `vcot.sample` asks N of them through a gateway, into a ledger;
`efficiency` is what came a second, once enough requests were in flight, over N times what one replica gives. `cpu_ms` is
CPU per response by process; `most_replicas`, for each process, is how many such replicas fill one core of its; `saturates`
names the one with the fewest. What a replica of yours gives, in responses a second, turns `most_responses_per_s` into
replicas of yours.

Limits: client, gateway and all replicas share the machine's cores, so that `efficiency` falls where the cores are full,
before any one process is; `most_replicas` does not depend on that.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import orjson
import uvloop

from bench.engine import chat, children, cpu_seconds, open_session, question, vllm_socket
from bench.gateway import free_port, gateway_command, process, say
from bench.load import Upstream, make_response
from vcot.pipeline.client import ChatClient
from vcot.pipeline.errors import VcotError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.records import CheckpointRef, SamplingParams
from vcot.pipeline.sample import Plan, sample
from vcot.pipeline.sources.nano.questions import generate_nano
from vcot.services.engine.vllm import Endpoint
from vcot.services.gateway.admin import live_checkpoint
from vcot.services.run.announcement import Serving
from vcot.services.run.directory import open_run
from vcot.services.run.serving import running_gateway

_K = 8
_SEATS = 8
_TEXT = (
    "The picture shows a red circle left of a blue square, and the question asks for the circle. So the answer is (A). "
)
_ANSWER = make_response(
    orjson.dumps(
        {
            "id": "chatcmpl-bench",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": "vcot",
            "choices": [
                {"index": i, "message": {"role": "assistant", "content": f"{_TEXT}{i}"}, "finish_reason": "stop"}
                for i in range(_K)
            ],
            "usage": {"prompt_tokens": 600, "completion_tokens": 30 * _K, "total_tokens": 600 + 30 * _K},
        }
    )
)


class _Seats:
    """A replica's: so many requests are under way, each for the same time; the others wait in their order."""

    def __init__(self, latency_s: float) -> None:
        self.held = {"weight_version": "default"}
        self._latency_s, self._num_free = latency_s, _SEATS
        self._waiting: deque[asyncio.Transport] = deque()

    def take(self, transport: asyncio.Transport) -> None:
        if self._num_free:
            self._num_free -= 1
            asyncio.get_running_loop().call_later(self._latency_s, self._answer, transport)
        else:
            self._waiting.append(transport)

    def _answer(self, transport: asyncio.Transport) -> None:
        self._num_free += 1
        if self._waiting:
            self.take(self._waiting.popleft())
        if not transport.is_closing():
            transport.write(_ANSWER)


class _Replica(Upstream):
    """One connection of a simulated replica."""

    def __init__(self, seats: _Seats) -> None:
        super().__init__(seats.held)
        self._seats = seats

    def on_message_complete(self) -> None:
        assert self._transport is not None
        if self._path.startswith(b"/v1/chat/completions"):
            self._seats.take(self._transport)
        else:
            super().on_message_complete()


async def simulate(latency_s: float, ports: list[int]) -> None:
    """Be several replicas, until killed."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as servers:
        for port in ports:
            replica = partial(_Replica, _Seats(latency_s))
            server = await loop.create_server(replica, "127.0.0.1", port, backlog=1024)
            await servers.enter_async_context(server)
        await asyncio.Event().wait()


async def measure_server(folder: Path, seconds: float) -> tuple[float, float]:
    """Seconds that the real server takes for a request with all its seats taken, and its responses a second."""
    with open_run(folder, "nano", ["serve.port=0"]) as run:
        async with running_gateway(run, say):
            serving = Serving.model_validate_json(run.path("serving.json").read_bytes())
            endpoint = Endpoint("http://localhost", vllm_socket(serving.pid))
            async with open_session(endpoint) as session:
                latencies: list[float] = []
                deadline = time.monotonic() + seconds

                async def ask(number: int) -> None:
                    while time.monotonic() < deadline:
                        began = time.monotonic()
                        body = {"model": "vcot", "messages": question(number), "n": _K, "temperature": 0.5}
                        await chat(session, body | {"max_tokens": 64})
                        latencies.append(time.monotonic() - began)
                        number += _SEATS

                await asyncio.gather(*(ask(seat) for seat in range(_SEATS)))
    latency_s = sum(latencies) / len(latencies)
    return latency_s, _SEATS * _K / latency_s


async def turn(folder: Path, num_replicas: int, latency_s: float, num_workers: int, seconds: float) -> dict[str, float]:
    """What came a second, and CPU seconds per response by process."""
    folder.mkdir()
    port, ports = free_port(), [free_port() for _ in range(num_replicas)]
    replicas = [sys.executable, "-m", "bench.scaling", "--simulate", str(latency_s), *map(str, ports)]
    command = gateway_command(folder, port, *ports, num_workers=num_workers)
    with process("replicas", replicas, folder), process("gateway", command, folder) as gateway:
        live = await _until_live(f"http://127.0.0.1:{port}")
        images, ledger = ImageStore(folder), Ledger(folder / "ledger.sqlite")
        num_tasks = max(2 * _SEATS, round(seconds / latency_s * _SEATS)) * num_replicas
        tasks = list(generate_nano("train", num_tasks, 0, images))
        sampling = SamplingParams(temperature=0.5, max_tokens=64, n=_K, seed=0)
        plan, ceiling = Plan(tasks, "thought_specific", live, sampling), 2 * _SEATS * num_replicas
        async with ChatClient(f"http://127.0.0.1:{port}/v1", "none", max_connections=ceiling, is_own=True) as client:
            carriers = children(gateway.pid)
            came: list[tuple[float, int]] = []
            before = _cpu(gateway.pid, carriers)
            count = await sample(
                plan,
                client,
                ledger,
                images,
                max_concurrency=ceiling,
                on_progress=lambda tally: came.append((time.monotonic(), tally.finished)),
            )
            after = _cpu(gateway.pid, carriers)
        await ledger.finish()
    if count.ok != count.requested:
        log = (folder / "gateway.log").read_text("utf-8", "replace").splitlines()
        raise SystemExit("\n".join([str(count), *(line for line in log if '"status":200' not in line)][:20]))
    return {"per_s": steady_rate(came)} | {name: (after[name] - before[name]) / count.ok for name in after}


def steady_rate(came: Sequence[tuple[float, int]]) -> float:
    """Responses a second between four and nine tenths of all, from moments and how many had come by then.

    Before that the command finds out how many requests to keep in flight, which takes some turns of the replicas; after it
    the last ones run out.
    """
    total = came[-1][1]
    begin, end = (next(point for point in came if point[1] >= share * total) for share in (0.4, 0.9))
    return (end[1] - begin[1]) / (end[0] - begin[0])


def _cpu(gateway: int, carriers: list[int]) -> dict[str, float]:
    used = {"client": time.process_time(), "gateway": cpu_seconds([gateway])}
    return used | ({"worker": cpu_seconds(carriers) / len(carriers)} if carriers else {})


async def _until_live(url: str) -> CheckpointRef:
    deadline = time.monotonic() + 60
    while True:
        try:
            return await live_checkpoint(url)
        except VcotError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)


def summarise(
    turns: Mapping[int, Mapping[str, float]], replica_per_s: float, latency_s: float, num_workers: int
) -> dict[str, object]:
    """The figures. CPU per response is taken from the largest number of replicas, where batches are fullest."""
    largest = turns[max(turns)]
    cpu = {name: value for name, value in largest.items() if name != "per_s"}
    most = {name: 1 / value for name, value in cpu.items()}
    return {
        "saturates": min(most, key=lambda name: most[name]),
        "most_responses_per_s": {name: round(value) for name, value in most.items()},
        "most_replicas": {name: round(value / replica_per_s, 1) for name, value in most.items()},
        "efficiency": {num: round(turn["per_s"] / (num * replica_per_s), 3) for num, turn in sorted(turns.items())},
        "responses_per_s": {num: round(turn["per_s"], 1) for num, turn in sorted(turns.items())},
        "cpu_ms": {name: round(1e3 * value, 3) for name, value in cpu.items()},
        "replica_responses_per_s": round(replica_per_s, 1),
        "latency_s": round(latency_s, 3),
        "seats": _SEATS,
        "k": _K,
        "workers": num_workers,
        "cores": os.cpu_count(),
    }


async def main(numbers: list[int], num_workers: int, seconds: float) -> None:
    with tempfile.TemporaryDirectory(prefix="vcot-bench-") as name:
        latency_s, replica_per_s = await measure_server(Path(name) / "run", 2 * seconds)
        say(f"the real server: {latency_s:.3f} s a request of {_K}, {replica_per_s:.0f} responses a second")
        turns: dict[int, dict[str, float]] = {}
        for number in numbers:
            turns[number] = await turn(Path(name) / str(number), number, latency_s, num_workers, seconds)
            say(f"{number} replicas: {turns[number]}")
    summary = summarise(turns, replica_per_s, latency_s, num_workers)
    print(orjson.dumps(summary, option=orjson.OPT_NON_STR_KEYS).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How many replicas one sampling command keeps busy.")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--simulate", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.simulate:
        uvloop.run(simulate(float(given.simulate[0]), [int(port) for port in given.simulate[1:]]))
    else:
        uvloop.run(main(given.replicas, given.workers, given.seconds))
