"""An hour of a run's own work while servers are killed: is every request accounted for, none mis-stamped, memory flat?

    make endurance            (python -m bench.endurance [--minutes N] [--kill-every S] [--askers N])

Measured, over real vLLM servers of nano behind one gateway: rounds of a swap, `vcot.sample` (k=8) and a model judge, each
into one ledger, while clients of their own ask beside them and a server is killed (SIGKILL) every `--kill-every` seconds.
`unaccounted`: responses and judgments that a finished stage counts and the ledger does not hold, or the other way round;
`mis_stamped`: answers and ledger rows whose weights are not those that were asked or that their own parts name; `broken`:
answers to the clients that are neither whole nor an error in the API's own words (`told`: those are; a stream whose server
is killed ends so). Memory as in bench/soak.py, of the gateway, and of this process, which samples and judges.

Limits: the judge is a simulated provider in this process, which has no room for every tenth request and says nothing of use;
the machine's cores are shared by servers, gateway and clients.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import uvloop
from aiohttp import web

from bench.engine import command_line, descendants, make_variant, open_session, question, say
from bench.gateway import free_port
from bench.hostile import CHAT
from bench.soak import Series, is_stamped, read_models, resident_bytes
from vcot.pipeline.client import ChatClient
from vcot.pipeline.errors import VcotError
from vcot.pipeline.judges import find_judge, judgment_keys
from vcot.pipeline.judging import judge_responses
from vcot.pipeline.records import Judgment, Response, SamplingParams, StageCount, Task
from vcot.pipeline.sample import Groups, Plan, sample
from vcot.pipeline.sections import JudgeSection
from vcot.pipeline.sources.nano.questions import generate_nano
from vcot.services.engine.vllm import Endpoint
from vcot.services.gateway.admin import fetch_state, live_checkpoint, register, swap_to
from vcot.services.run.directory import Run, open_run
from vcot.services.run.serving import running_gateway

_K, _NUM_TASKS, _CEILING = 8, 48, 32
_PROMPT = "thought_specific"
_MAX_GOES = 20
"""How often a stage that a killed server stopped is given again: the same command goes on."""
_READ_EVERY_S, _SAY_EVERY_S = 2.0, 15.0
_MIB = 2**20


@dataclass
class Account:
    """What became of everything. Mutated by whoever asks, on one event loop."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    """Of stages and swaps that were stopped, and went on or were left out."""
    memory: dict[str, Series] = field(default_factory=lambda: {"gateway": Series(), "client": Series()})


def judge_answer(status: int, headers: Mapping[str, str], text: bytes, digests: Mapping[str, str]) -> str:
    """What an answer to a client is: `answered`, `mis_stamped`, `told` or `broken`."""
    try:
        if status == 200 and b'"error"' not in text:
            return "answered" if is_stamped(dict(headers), read_models(text), dict(digests)) else "mis_stamped"
        last = [line for line in text.removesuffix(b"data: [DONE]\n\n").split(b"\n") if line][-1]
        return "told" if orjson.loads(last.removeprefix(b"data: "))["error"]["message"] else "broken"
    except (ValueError, KeyError, IndexError, TypeError):
        return "broken"


async def keep_asking(
    session: aiohttp.ClientSession, number: int, digests: Mapping[str, str], account: Account
) -> None:
    """One client, until cancelled; whatever it is told, it asks on."""
    for turn in itertools.count(number):
        body = {"model": "policy", "messages": question(turn % 64), "max_tokens": 16, "stream": turn % 2 == 1}
        headers = {"content-type": "application/json"}
        try:
            async with session.post(CHAT, data=orjson.dumps(body), headers=headers) as answer:
                text = await answer.read()
            found = judge_answer(answer.status, answer.headers, text, digests)
            if found in ("broken", "mis_stamped"):
                say(f"{found}: {answer.status} {dict(answer.headers)} {text[-400:]!r}")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            found = "broken"
            say(f"broken: {error!r}")
        account.counts[found] += 1
        await asyncio.sleep(0.1)


async def keep_killing(gateway_pid: int, every_s: float, account: Account) -> None:
    """Kill one server after another, until cancelled."""
    for turn in itertools.count():
        await asyncio.sleep(every_s)
        if servers := sorted(find_servers(gateway_pid)):
            with suppress(ProcessLookupError):
                os.kill(servers[turn % len(servers)], signal.SIGKILL)
                account.counts["kills"] += 1


def find_servers(gateway_pid: int) -> Iterator[int]:
    """The API servers below a gateway, and not those that keep them."""
    for pid in descendants(gateway_pid):
        with suppress(OSError):
            words = command_line(pid)
            if b"--uds" in words and not any(word.endswith(b"lifeline.py") for word in words):
                yield pid


async def go_on(stage: Callable[[], Awaitable[StageCount]], name: str, account: Account) -> StageCount | None:
    """Give a stage again, as a person would the command, until nothing of it failed."""
    for _ in range(_MAX_GOES):
        try:
            count = await stage()
        except VcotError as error:
            account.faults[f"{name}: {str(error)[:120]}"] += 1
            await asyncio.sleep(2)
            continue
        if not count.failed:
            return count
        account.counts[f"{name}_again"] += count.failed
    return None


@asynccontextmanager
async def provider() -> AsyncIterator[str]:
    """The URL of a judge that scores by the length of what it is shown, and has no room for every tenth request."""
    numbers = itertools.count(1)

    async def answer(request: web.Request) -> web.Response:
        text = await request.text()
        if next(numbers) % 10 == 0:
            return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"retry-after": "0.1"})
        verdict = orjson.dumps({"rationale": "by its length", "score": 1 + len(text) % 9}).decode()
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": verdict}}
        return web.json_response({"choices": [choice], "usage": {"prompt_tokens": 900, "completion_tokens": 12}})

    app = web.Application(client_max_size=2**24)
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        await runner.cleanup()


async def work(run: Run, url: str, digests: Mapping[str, str], account: Account, until: float) -> None:
    """Rounds of a swap, sampling and judging, until `until`; each is accounted for when it is done."""
    tasks: list[Task] = list(generate_nano("train", _NUM_TASKS, 0, run.images))
    async with (
        provider() as judge_url,
        ChatClient(f"{url}/v1", "none", max_connections=_CEILING, is_own=True) as client,
    ):
        section = JudgeSection(kind="pointwise", model="simulated", base_url=judge_url, max_concurrency=8)
        for number in itertools.count(1):
            if time.monotonic() > until:
                return
            try:
                await swap_to(url, "policy", ("moved", "base")[number % 2])
                account.counts["swaps"] += 1
            except VcotError as error:
                account.faults[f"swap: {str(error)[:120]}"] += 1
            live = await live_checkpoint(url)
            sampling = SamplingParams(temperature=1.0, max_tokens=64, n=_K, seed=number)
            plan = Plan(tasks, _PROMPT, live, sampling)

            async def ask(plan: Plan = plan) -> StageCount:
                return await sample(plan, client, run.ledger, run.images, max_concurrency=_CEILING)

            async def judge(plan: Plan = plan) -> StageCount:
                async with find_judge(section, run.images) as found:
                    return await judge_responses(found, Groups(plan, run.ledger), run.ledger, section)

            sampled = await go_on(ask, "sample", account)
            check_responses(plan, run, sampled, account)
            judged = await go_on(judge, "judge", account)
            check_judgments(plan, run, section, judged, account)


def check_responses(plan: Plan, run: Run, count: StageCount | None, account: Account) -> None:
    """What the stage says against what the ledger holds."""
    keys = [key for request in plan for key in request.response_keys()]
    found = run.ledger.get(Response, keys)
    wrong = sum(response.checkpoint.digest != plan.checkpoint.digest for response in found.values())
    account.counts["sampled"] += len(found)
    account.counts["mis_stamped"] += wrong
    account.counts["unaccounted"] += count_missing(count, len(keys), len(found))


def check_judgments(plan: Plan, run: Run, section: JudgeSection, count: StageCount | None, account: Account) -> None:
    """The same of judgments, unreadable ones included."""
    judge = find_judge(section, run.images)
    groups = Groups(plan, run.ledger)
    keys = [key for group in groups for key in judgment_keys(judge, group.task, group.good)]
    num_found = len(run.ledger.get(Judgment, keys))
    account.counts["judged"] += num_found
    account.counts["unaccounted"] += count_missing(count, len(keys), num_found)


def count_missing(count: StageCount | None, num_owed: int, num_found: int) -> int:
    """What stage and ledger do not agree on, and what is in neither; of a stage that never ended, all."""
    said = 0 if count is None else count.ok + count.cached + count.refused
    return abs(said - num_found) + abs(num_owed - num_found)


async def keep_reading(gateway_pid: int, account: Account) -> None:
    """Memory, and a line now and then; until cancelled."""
    began = said = time.monotonic()
    while True:
        now = time.monotonic()
        for name, pid in (("gateway", gateway_pid), ("client", os.getpid())):
            account.memory[name].add(now - began, resident_bytes(pid) / _MIB)
        if now - said >= _SAY_EVERY_S:
            said = now
            memory = ", ".join(f"{name} {series.values[-1]:.0f} MiB" for name, series in account.memory.items())
            say(f"{now - began:4.0f} s: {dict(account.counts)}; {memory}")
        await asyncio.sleep(_READ_EVERY_S)


async def main(options: Any) -> None:
    """Start everything, keep it at work, and print what was found."""
    account = Account()
    with (
        tempfile.TemporaryDirectory(prefix="vcot-endurance-") as name,
        open_run(Path(name) / "run", "nano", ["serve.port=0", "serve.replicas=2"]) as run,
    ):
        moved = make_variant(Path(name), "moved", 0.2)
        async with running_gateway(run, say) as gateway:
            state = await fetch_state(gateway.url)
            assert state.live is not None
            digests = {state.live.name: state.live.digest, "moved": (await register(gateway.url, moved)).digest}
            async with open_session(Endpoint(gateway.url)) as session:
                beside = [
                    *(asyncio.create_task(keep_asking(session, i, digests, account)) for i in range(options.askers)),
                    asyncio.create_task(keep_killing(state.pid, options.kill_every, account)),
                    asyncio.create_task(keep_reading(state.pid, account)),
                ]
                await work(run, gateway.url, digests, account, time.monotonic() + 60 * options.minutes)
                for task in beside:
                    if task.done():
                        task.result()
                    task.cancel()
                await asyncio.gather(*beside, return_exceptions=True)
        await run.ledger.finish()
    wanted = ("unaccounted", "mis_stamped", "broken", "sampled", "judged", "answered", "told", "kills", "swaps")
    figures = {
        **{name: account.counts[name] for name in wanted},
        "asked_again": account.counts["sample_again"] + account.counts["judge_again"],
        "minutes": options.minutes,
        "memory_mib": {name: series.summary() for name, series in account.memory.items()},
        "faults": dict(account.faults),
        "cores": os.cpu_count(),
    }
    print(orjson.dumps(figures).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A run's own work while its servers are killed.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--kill-every", type=float, default=120.0)
    parser.add_argument("--askers", type=int, default=2)
    uvloop.run(main(parser.parse_args()))
