"""Worker processes, real ones, before a fleet of fake servers: one registry, one swap, one set of limits and figures."""

import asyncio
import os
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message

from tests.services.bench_fleet import ASK, Bench
from tests.services.engine.test_vllm import processes
from vcot.services.gateway.fleet.replica import Supervision
from vcot.services.gateway.workers.carrier import RemoteDispatch
from vcot.services.gateway.workers.processes import Workers

pytestmark = pytest.mark.timeout(120)
NUM_WORKERS = 3
CALL = {"type": "http", "method": "POST", "path": "/admin/wake", "query_string": b"", "headers": []}


class Served:
    """A gateway of several processes, with a connection of its own for each request: whoever is free takes it.

    On a busy machine one worker may be free long before the others are up. A test that needs to know who took what asks
    within `only`.
    """

    def __init__(self, bench: Bench, url: str) -> None:
        self.bench = bench
        self.url = url

    async def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=60) as client:
            return await client.request(method, path, **options)

    async def ask(self, text: str = "hello", **fields: Any) -> httpx.Response:
        body = ASK | {"messages": [{"role": "user", "content": text}]} | fields
        return await self.call("POST", "/v1/chat/completions", json=body)

    async def figure(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = (await self.call("GET", "/metrics")).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.partition("{")[0].split(" ")[0] == name)

    @property
    def pids(self) -> set[int]:
        """Of the workers of this process."""
        pids = processes("vcot.services.gateway.workers")
        return {pid for pid in pids if f"PPid:\t{os.getpid()}\n" in Path(f"/proc/{pid}/status").read_text()}

    @contextmanager
    def only(self, *pids: int) -> Iterator[None]:
        """Nobody else of the workers takes a request in here."""
        others = self.pids - set(pids)
        for pid in others:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in others:
                os.kill(pid, signal.SIGCONT)

    async def until_all_are_up(self) -> None:
        while len(self.pids) < NUM_WORKERS:  # noqa: ASYNC110 - others'
            await asyncio.sleep(0.05)
        for pid in self.pids:
            with self.only(pid):
                assert (await self.call("GET", "/health")).status_code == 200


@asynccontextmanager
async def serving(bench: Bench) -> AsyncIterator[Served]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        workers = Workers(bench.fleet, bench.directory / "run", bench.settings, listener, bench.said.append)
        async with bench.running():
            front = asyncio.create_task(workers.serve())
            try:
                served = Served(bench, f"http://127.0.0.1:{listener.getsockname()[1]}")
                await served.until_all_are_up()
                yield served
            finally:
                front.cancel()
                await asyncio.gather(front, return_exceptions=True)
    assert not served.pids


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, gateway_workers=NUM_WORKERS)


def stamps(answers: list[httpx.Response]) -> Counter[tuple[int, str, float]]:
    """Status, stamp, and the log-prob that tells the weights."""
    return Counter(
        (a.status_code, a.headers["x-vcot-checkpoint"], a.json()["choices"][0]["logprobs"]["content"][0]["logprob"])
        for a in answers
    )


async def test_all_answer_and_all_are_counted_in_one_place(bench: Bench) -> None:
    async with serving(bench) as served:
        answers = await asyncio.gather(*(served.ask(f"{number}") for number in range(40)))
        assert {answer.status_code for answer in answers} == {200}
        assert len(served.pids) == NUM_WORKERS
        assert await served.figure("vcot_requests_total") >= 40
        assert await served.figure("vcot_in_flight") == 0
        assert (await served.call("GET", "/nothing")).json()["error"]["code"] == "not_found"
        assert (await served.ask(model="nobody")).json()["error"]["code"] == "model_not_found"
        listed = (await served.call("GET", "/v1/models")).json()
        assert {card["id"] for card in listed["data"]} >= {"policy", "base"}


async def test_swaps_under_load_mix_nothing_and_fail_nothing(bench: Bench) -> None:
    async with serving(bench) as served:
        answers: list[httpx.Response] = []
        done = asyncio.Event()

        async def keep_asking(number: int) -> None:
            while not done.is_set():
                answers.append(await served.ask(f"{number}"))

        askers = [asyncio.create_task(keep_asking(number)) for number in range(12)]
        for name in ("tuned", "base", "tuned"):
            swapped = await served.call("POST", "/admin/swap", json={"alias": "policy", "checkpoint": name})
            assert swapped.json()["live"]["name"] == name, swapped.text
            await asyncio.sleep(0.1)
        done.set()
        await asyncio.gather(*askers)
        found = stamps(answers)
        assert {(status, name) for status, name, _ in found} == {(200, "base"), (200, "tuned")}
        assert len(found) == 2, "each stamp has one log-prob"


async def test_a_swap_waits_for_the_requests_of_all_workers(bench: Bench) -> None:
    async with serving(bench) as served:
        bench.server.hold.clear()
        held = [asyncio.create_task(served.ask("hold on")) for _ in range(9)]
        await bench.until_so(lambda: bench.admission.in_flight == 9)
        swap = asyncio.create_task(bench.swap("policy", "tuned"))
        await bench.until("draining")
        late = asyncio.create_task(served.ask("late"))
        await asyncio.sleep(0.1)
        assert (bench.admission.phase, bench.admission.in_flight) == ("draining", 9)
        bench.server.hold.set()
        assert {answer.headers["x-vcot-checkpoint"] for answer in await asyncio.gather(*held)} == {"base"}
        await swap
        assert (await late).headers["x-vcot-checkpoint"] == "tuned"


async def test_limits_are_those_of_all_workers_together(tmp_path: Path) -> None:
    bench = Bench(tmp_path, gateway_workers=NUM_WORKERS, max_in_flight=2, max_queued=2)
    async with serving(bench) as served:
        bench.server.hold.clear()
        held = [asyncio.create_task(served.ask("hold on")) for _ in range(4)]
        await bench.until_so(lambda: bench.admission.in_flight == 2)
        while await served.figure("vcot_queued") < 2:  # noqa: ASYNC110 - others'
            await asyncio.sleep(0.01)
        assert bench.admission.in_flight == 2
        refused = [(await served.ask()).status_code for _ in range(6)]
        assert refused == [429] * 6
        bench.server.hold.set()
        assert {answer.status_code for answer in await asyncio.gather(*held)} == {200}
        assert (await served.ask()).status_code == 200


async def test_a_worker_that_is_killed_takes_only_its_own_requests(bench: Bench) -> None:
    """What it held is free again, a swap waits for nothing of it, and another one is started."""
    async with serving(bench) as served:
        bench.server.hold.clear()
        before = served.pids
        victim, *others = before
        with served.only(victim):
            lost = [asyncio.create_task(served.ask("hold on")) for _ in range(5)]
            await bench.until_so(lambda: bench.admission.in_flight == 5)
        with served.only(*others):
            kept = [asyncio.create_task(served.ask("hold on")) for _ in range(7)]
            await bench.until_so(lambda: bench.admission.in_flight == 12)
        os.kill(victim, signal.SIGKILL)
        errors = await asyncio.gather(*lost, return_exceptions=True)
        assert all(isinstance(error, httpx.HTTPError) for error in errors), errors
        await bench.until_so(lambda: bench.admission.in_flight == 7)
        bench.server.hold.set()
        assert {answer.status_code for answer in await asyncio.gather(*kept)} == {200}
        await bench.swap("policy", "tuned")
        await served.until_all_are_up()
        assert served.pids >= set(others)
        assert any("ended with status -9; starting another" in line for line in bench.said)
        assert (await served.ask()).headers["x-vcot-checkpoint"] == "tuned"
        assert await served.figure("vcot_in_flight") == await served.figure("vcot_queued") == 0


async def test_a_client_that_hangs_up_frees_its_request(bench: Bench) -> None:
    async with serving(bench) as served:
        bench.server.hold.clear()
        asked = asyncio.create_task(served.ask("hold on"))
        await bench.server.holding.wait()
        asked.cancel()
        await bench.until_so(lambda: bench.admission.in_flight == 0)
        bench.server.hold.set()


async def test_a_request_that_ends_engines_is_known_to_all_workers(tmp_path: Path) -> None:
    supervision = Supervision(first_backoff_s=0.0, lease_s=3.0)
    bench = Bench(tmp_path, gateway_workers=NUM_WORKERS, replicas=2, supervision=supervision)
    bench.prepare = lambda server: server.odd.update(kill="kill")
    async with serving(bench) as served:
        for _ in range(12):
            answer = await served.ask("kill")
            for replica in bench.fleet.replicas:
                await bench.until("live", replica)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "engines_died")
        assert sum(server.died.is_set() for server in bench.servers) == 3
        assert (await served.ask("hello")).status_code == 200


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_keys_hold_at_every_worker(bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setenv("VCOT_ADMIN_KEY", "right")
    async with serving(bench) as served:
        for key, status in ((None, 401), ("wrong", 401), ("right", 200 if method == "GET" else 202)):
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            body = {"json": {}} if method == "POST" else {}
            assert (await served.call(method, "/admin/replicas", headers=headers, **body)).status_code == status


async def test_a_body_that_is_too_large_for_the_operator_is_refused(bench: Bench) -> None:
    async with serving(bench) as served:
        answer = await served.call("POST", "/admin/swap", json={"alias": "x" * 200_000, "checkpoint": "base"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


async def test_a_request_whose_client_left_in_the_middle_of_it_is_not_done() -> None:
    """Half of a body may read as a whole one, and none of it as the empty one of /admin/wake."""
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    _, line = await loop.create_connection(RemoteDispatch, sock=ours)
    messages = iter(({"type": "http.request", "body": b"{}", "more_body": True}, {"type": "http.disconnect"}))

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        raise AssertionError(message)

    async with asyncio.timeout(5):
        await line.call(CALL, receive, send)
    line.close()
    theirs.setblocking(False)
    with theirs:
        await asyncio.sleep(0)
        assert await loop.sock_recv(theirs, 1) == b""  # nothing was asked of the deciding process


async def test_a_call_while_the_gateway_ends_is_told_so() -> None:
    ours, theirs = socket.socketpair()
    _, line = await asyncio.get_running_loop().create_connection(RemoteDispatch, sock=ours)
    theirs.close()
    await line.ended.wait()
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await line.call(CALL, receive, send)
    assert sent[0]["status"] == 503
    assert b"the gateway is ending" in sent[1]["body"]
