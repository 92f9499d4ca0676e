"""Drawing k responses to each of some tasks: `vcot sample` beside a plain `openai` loop, distilabel and curator.

    make bench-peers-generation        (python -m bench.peers.generation [--rounds N] [--tasks N])

All four ask the same real vLLM with nano through one gateway: the same tasks (a text and an image as a data URL), k=8,
temperature, `max_tokens` and greatest number of requests at once, each as its documentation says and in its own environment
(bench/peers/requirements). Measured for each, in each round, in an order that turns:

    seconds      from the command's start to its end, of which `start_s` before its first request
    kept         responses in its finished data set
    left         responses that its own command finds again on disk, after kill -9 of all its processes at half time, which
                 is counted from its first request, so that a slow start leaves no less
    asked_anew   requests that the same command then sent, of which `paid_twice` had been answered in full before the kill
    total_s      from the first start to the kill, and from the second start to the end
    hung         1 where the second command did not end in three times `seconds` and was killed: total_s is more, then
    kept_again   responses in its finished data set then

Requests are counted by a small server in front of the gateway (bench/peers/meter.py), which all pass. The last line is JSON:
medians over rounds (of `hung`, the mean), and the median over rounds of vcot's seconds over each peer's. A way that
fails, or takes more than `--limit-s` seconds, has what it said in place of figures.

Limits: nano on a CPU, where clients, gateway and engine share the cores, so that a client's own work counts more than where
the engine has a GPU; a vision model's answers take longer than the seconds in which a library starts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
import uvloop

from bench.engine import say
from bench.peers.meter import Meter, identify
from bench.peers.rounds import PeerError, medians, play
from bench.peers.ways import HERE, WAYS, Command, Settings, Way
from vcot.pipeline.client import user_message
from vcot.pipeline.prompts import render_prompt
from vcot.pipeline.sources.nano.questions import generate_nano
from vcot.services.run.directory import Run, open_run
from vcot.services.run.serving import running_gateway

_PROMPT = "thought_specific"
_PATIENCE = 3
"""Times the seconds of a whole run, after which a command that goes on counts as hung."""


@dataclass(frozen=True)
class Outcome:
    """What one way did in one round."""

    seconds: float
    start_s: float
    kept: int
    requests: int
    """More than tasks where something was asked twice without a kill."""
    tokens: int
    left: int
    asked_anew: int
    paid_twice: int
    total_s: float
    hung: int
    kept_again: int


@dataclass
class Course:
    """One command from its start to its end or kill."""

    seconds: float
    start_s: float
    """Until its first request; `seconds` without one."""
    has_ended: bool
    """By itself."""
    asked: Counter[str]
    answered: Counter[str]
    num_tokens: int


def write_tasks(run: Run, num_tasks: int, path: Path) -> set[str]:
    """The nano tasks that `vcot sample` draws, for the others. Returns what names each on the wire."""
    names = set()
    with path.open("wb") as file:
        for task in generate_nano("train", num_tasks, run.recipe.tasks.seed, run.images):
            text = render_prompt(_PROMPT, task)
            content = user_message(text, run.images.read_all(task.images))["content"]
            names.add(identify(content))
            (url,) = (part["image_url"]["url"] for part in content if part["type"] == "image_url")
            file.write(orjson.dumps({"id": task.id, "prompt": text, "image": url}) + b"\n")
    return names


async def follow(
    command: Command, settings: Settings, meter: Meter, limit_s: float, *, kill_after_s: float | None = None
) -> Course:
    """Run the command to its end, or until kill -9 of all its processes: so long after its first request, or in all.

    Raises PeerError where it fails by itself.
    """
    meter.reset()
    log = settings.out / "log.txt"
    with log.open("ab") as file:
        began = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            *command(settings), stdout=file, stderr=file, env=_environment(settings), start_new_session=True
        )
        await _until_end(process, meter, limit_s, kill_after_s)
        seconds = time.perf_counter() - began
        code = process.returncode
        _kill_all(process)
        await process.wait()
    if code:
        end = "\n".join(log.read_text("utf-8", "replace").splitlines()[-15:])
        raise PeerError(f"it ended with {code}: {end}")
    start_s = meter.first_at - began if meter.first_at else seconds
    return Course(seconds, start_s, code == 0, meter.asked.copy(), meter.answered.copy(), meter.num_tokens)


async def _until_end(
    process: asyncio.subprocess.Process, meter: Meter, limit_s: float, kill_after_s: float | None
) -> None:
    """Until the process ends or is to be killed."""

    async def become_due() -> None:
        await meter.has_begun.wait()
        await asyncio.sleep(limit_s if kill_after_s is None else kill_after_s)

    end, due = asyncio.create_task(process.wait()), asyncio.create_task(become_due())
    await asyncio.wait((end, due), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    end.cancel()
    due.cancel()


def _kill_all(process: asyncio.subprocess.Process) -> None:
    """The command and all that it started, which is in its own session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _environment(settings: Settings) -> dict[str, str]:
    """Caches in the way's own folder, and nothing asked of the network: no telemetry, no prices, no hub, no vocabulary."""
    quiet = {"TELEMETRY_ENABLED": "false", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1"}
    # LiteLLM brings the vocabulary that curator's openai backend counts with, and would download otherwise.
    for vocabulary in HERE.glob(".venv-curator/lib/*/site-packages/litellm/litellm_core_utils/tokenizers"):
        quiet["TIKTOKEN_CACHE_DIR"] = str(vocabulary)
    return os.environ | quiet | {"HOME": str(settings.out)}


async def measure(way: Way, settings: Settings, meter: Meter, limit_s: float) -> Outcome:
    """All figures of one way, in two new folders of `settings.out`. Raises PeerError."""
    whole, half = _in_folder(settings, "whole"), _in_folder(settings, "half")
    full = await follow(way.command, whole, meter, limit_s)
    if not full.has_ended:
        raise PeerError(f"it did not end within {limit_s:g} s")
    kept = await asyncio.to_thread(way.kept, whole.out)
    cut = await follow(way.command, half, meter, limit_s, kill_after_s=(full.seconds - full.start_s) / 2)
    left = await asyncio.to_thread(way.left, half.out)
    again = await follow(way.command, half, meter, _PATIENCE * full.seconds)
    return Outcome(
        seconds=full.seconds,
        start_s=full.start_s,
        kept=kept,
        requests=full.asked.total(),
        tokens=full.num_tokens,
        left=left,
        asked_anew=again.asked.total(),
        paid_twice=sum(num for task, num in again.asked.items() if cut.answered[task] >= settings.k),
        total_s=cut.seconds + again.seconds,
        hung=int(not again.has_ended),
        kept_again=await asyncio.to_thread(way.kept, half.out),
    )


def _in_folder(settings: Settings, name: str) -> Settings:
    out = settings.out / name
    out.mkdir(parents=True)
    return settings.model_copy(update={"out": out})


def summarise(rounds: Sequence[Mapping[str, Outcome]], faults: Mapping[str, str]) -> dict[str, object]:
    """Medians by way, and vcot's seconds over each peer's; what a way said instead, where it failed."""
    good = [way for way in WAYS if way not in faults and rounds]
    figures = {way: _median([turn[way] for turn in rounds]) for way in good}
    ratios = {
        f"{name}_vs_{way}": round(
            statistics.median(getattr(turn["vcot"], name) / getattr(turn[way], name) for turn in rounds), 3
        )
        for way in good
        for name in ("seconds", "total_s")
        if way != "vcot" and "vcot" in good
    }
    return {"ways": figures | dict(faults), "ratios": ratios}


def _median(outcomes: Sequence[Outcome]) -> dict[str, float]:
    return medians(outcomes) | {"hung": round(statistics.mean(outcome.hung for outcome in outcomes), 2)}


def _check(meter: Meter, names: set[str]) -> None:
    """Raise PeerError where something else than the tasks was asked: then the ways did different work."""
    if others := meter.asked.keys() - names:
        raise PeerError(f"{len(others)} requests asked none of the {len(names)} tasks")


async def main(num_rounds: int, num_tasks: int, limit_s: float) -> None:
    faults: dict[str, str] = {}
    meter = Meter()
    with (
        tempfile.TemporaryDirectory(prefix="vcot-bench-") as name,
        open_run(Path(name) / "server", "nano", ["serve.port=0"]) as run,
    ):
        tasks = Path(name) / "tasks.jsonl"
        names = write_tasks(run, num_tasks, tasks)
        few = Path(name) / "few.jsonl"
        few.write_bytes(b"".join(tasks.read_bytes().splitlines(keepends=True)[:8]))
        async with running_gateway(run, say) as gateway, meter.serve(gateway.url) as url:
            settings = Settings(tasks=few, out=Path(name) / "warm", base_url=f"{url}/v1")
            for way in WAYS:  # the first start of each compiles its libraries
                await follow(WAYS[way].command, _in_folder(settings, way), meter, limit_s)

            async def measure_one(way: str, out: Path) -> Outcome:
                asked = settings.model_copy(update={"tasks": tasks, "out": out})
                outcome = await measure(WAYS[way], asked, meter, limit_s)
                _check(meter, names)
                return outcome

            rounds = [await play(WAYS, number, Path(name), measure_one, faults) for number in range(num_rounds)]
    figures = summarise(rounds, faults) | {"tasks": num_tasks, "k": settings.k, "concurrency": settings.concurrency}
    print(orjson.dumps(figures | {"rounds": num_rounds, "cores": os.cpu_count()}).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="vcot sample beside a plain openai loop, distilabel and curator.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=400)
    parser.add_argument("--limit-s", type=float, default=600)
    given = parser.parse_args()
    uvloop.run(main(given.rounds, given.tasks, given.limit_s))
