"""What a gateway of several processes costs: CPU per request of the one that decides and of those that carry.

    python -m bench.gateway_workers [--workers N] [--seconds S] [--rounds N]

Measured, with 100 KB image bodies at 64 connections to an instant upstream: `cpu_us`, microseconds of CPU per request of
the gateway's processes, by what they do; `requests_per_s`; and `most_workers`, the deciding process's share of one core's
time against a worker's: so many workers it can keep busy, however many cores there are. How: one process and several take
turns within a round; a figure is the median over rounds.

Limits: generator, upstream and gateway share the machine's cores, so that `requests_per_s` says little on few of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import orjson
import uvloop

from bench.engine import children, cpu_seconds
from bench.gateway import chat_body, free_port, gateway_command, is_answering, process, say
from bench.load import measure

_CONNECTIONS = 64


async def turn(folder: Path, body: bytes, num_workers: int, seconds: float) -> dict[str, float]:
    """CPU per request by kind of process, in microseconds, and requests per second."""
    folder.mkdir()
    upstream, port = free_port(), free_port()
    with process("direct", [sys.executable, "-m", "bench.load", "bare", str(upstream)], folder) as child:
        assert await is_answering(upstream, body, child)
        with process("vcot", gateway_command(folder, port, upstream, num_workers=num_workers), folder) as gateway:
            assert await is_answering(port, body, gateway)
            await measure(port, body, _CONNECTIONS, seconds, warm_s=1.0)
            carriers = children(gateway.pid)
            before = cpu_seconds([gateway.pid]), cpu_seconds(carriers)
            measured = await measure(port, body, _CONNECTIONS, seconds, warm_s=0.0)
            after = cpu_seconds([gateway.pid]), cpu_seconds(carriers)
    assert not measured.num_failed, measured
    count = measured.requests_per_s * seconds
    main, carrying = (1e6 * (late - early) / count for early, late in zip(before, after, strict=True))
    return {"requests_per_s": measured.requests_per_s, "main": main, "carrying": carrying}


async def main(num_workers: int, seconds: float, num_rounds: int) -> None:
    body = chat_body()
    turns: dict[int, list[dict[str, float]]] = {1: [], num_workers: []}
    with tempfile.TemporaryDirectory(prefix="vcot-bench-") as name:
        for number in range(num_rounds):
            for count, found in turns.items():
                found.append(await turn(Path(name) / f"{number}-{count}", body, count, seconds))
                say(f"round {number + 1}, {count} workers: {found[-1]}")

    def median(count: int, key: str) -> float:
        return statistics.median(each[key] for each in turns[count])

    rates = {"one_process": round(median(1, "requests_per_s")), "workers": round(median(num_workers, "requests_per_s"))}
    deciding, carrying = median(num_workers, "main"), median(num_workers, "carrying")
    figures = {
        "most_workers": round(carrying / deciding, 1),
        "cpu_us": {"one_process": round(median(1, "main")), "deciding": round(deciding), "carrying": round(carrying)},
        "requests_per_s": rates,
        "workers": num_workers,
    }
    print(orjson.dumps(figures).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="CPU per request of a gateway of several processes.")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    uvloop.run(main(given.workers, given.seconds, given.rounds))
