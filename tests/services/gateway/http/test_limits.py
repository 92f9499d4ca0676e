"""Overload, deadlines, body sizes and slow clients: the middleware before a small application, and before the gateway."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from tests.services.bench_fleet import Bench
from vcot.services.gateway.http import limits
from vcot.services.gateway.http.limits import Limits, Slots, parse_deadline

REQUEST = {"type": "http.request", "body": b"x", "more_body": False}


class Client:
    """One ASGI exchange: gives messages, then waits as a client does, and keeps what it is sent."""

    def __init__(self, *messages: Message, **headers: str) -> None:
        self.scope = {
            "type": "http",
            "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
        }
        self.sent: list[Message] = []
        self.num_read = 0
        self.gone = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        self._messages: Iterator[Message] = iter(messages or (REQUEST,))

    async def receive(self) -> Message:
        if (message := next(self._messages, None)) is not None:
            self.num_read += 1
            return message
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await self.reads.wait()
        self.sent.append(message)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.sent[1]["body"])["error"]

    def header(self, name: str) -> str | None:
        return next((v.decode() for k, v in self.sent[0]["headers"] if k.decode() == name), None)


class Work:
    """An application that answers when it is told to."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.go = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.bodies.append((await receive())["body"])
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_what_exceeds_slots_and_queue_is_turned_away_at_once() -> None:
    work, slots = Work(), Slots(1, 1, 10**6)
    limits = Limits(work, slots, 100)
    clients = [Client(), Client(), Client()]
    tasks = [asyncio.create_task(limits(c.scope, c.receive, c.send)) for c in clients]
    await settle()
    assert (slots.places.in_flight, slots.places.queued) == (1, 1)
    assert len(work.bodies) == 1
    assert clients[2].status == 429
    assert clients[2].num_read == 0
    assert int(clients[2].header("retry-after") or 0) > 0
    assert clients[2].error["code"] == "overloaded"
    work.go.set()
    await asyncio.gather(*tasks)
    assert [c.status for c in clients[:2]] == [200, 200]
    assert (slots.places.in_flight, slots.places.taken) == (0, 0)


async def test_a_client_that_hangs_up_in_the_queue_leaves_it() -> None:
    work, slots = Work(), Slots(1, 1, 10**6)
    limits = Limits(work, slots, 100)
    first, second = Client(), Client()
    tasks = [asyncio.create_task(limits(c.scope, c.receive, c.send)) for c in (first, second)]
    await settle()
    second.gone.set()
    await tasks[1]
    assert slots.places.taken == 1
    work.go.set()
    await tasks[0]
    assert len(work.bodies) == 1
    assert second.sent == []


async def test_who_was_answered_is_not_watched() -> None:
    work = Work()
    work.go.set()
    client, asked = Client(), list[None]()

    async def receive() -> Message:
        asked.append(None)
        return await client.receive()

    await Limits(work, Slots(1, 0, 10**6), 100)(client.scope, receive, client.send)
    await asyncio.sleep(2 * limits.PATIENCE_S)
    assert len(asked) == 1


async def test_a_deadline_ends_the_wait_in_the_queue() -> None:
    work, slots = Work(), Slots(1, 1, 10**6)
    limits = Limits(work, slots, 100)
    first, second = Client(), Client(x_vcot_deadline_s="0.02")
    task = asyncio.create_task(limits(first.scope, first.receive, first.send))
    await settle()
    await limits(second.scope, second.receive, second.send)
    assert (second.status, second.error["code"], second.error["type"]) == (504, "deadline_exceeded", "server_error")
    assert (len(work.bodies), slots.places.taken) == (1, 1)
    work.go.set()
    await task
    assert first.status == 200


async def test_a_deadline_in_an_answer_cuts_it_off() -> None:
    async def drip(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.Event().wait()

    client = Client(x_vcot_deadline_s="0.02")
    await Limits(drip, Slots(1, 0, 10**6), 100)(client.scope, client.receive, client.send)
    assert len(client.sent) == 1


async def test_a_deadline_in_a_stream_ends_it_with_an_error_event() -> None:
    async def drip(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: {}\n", "more_body": True})
        await asyncio.Event().wait()

    client = Client(x_vcot_deadline_s="0.02")
    await Limits(drip, Slots(1, 0, 10**6), 100)(client.scope, client.receive, client.send)
    *_, last = client.sent
    assert not last.get("more_body")
    assert json.loads(last["body"].strip().removeprefix(b"data: "))["error"]["type"] == "deadline_exceeded"


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf"])
async def test_a_deadline_that_is_no_number_of_seconds_is_refused(value: str) -> None:
    client = Client(x_vcot_deadline_s=value)
    await Limits(Work(), Slots(1, 0, 10**6), 100)(client.scope, client.receive, client.send)
    assert (client.status, client.error["code"]) == (400, "invalid_deadline")


def test_deadlines_are_seconds() -> None:
    assert parse_deadline(None) is None
    assert parse_deadline("1.5") == 1.5


async def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    client = Client(content_length="101")
    await Limits(Work(), Slots(1, 0, 10**6), 100)(client.scope, client.receive, client.send)
    assert (client.status, client.error["code"], client.num_read) == (413, "body_too_large", 0)


@pytest.mark.parametrize("headers", [{}, {"content_length": "1"}, {"content_length": "-5"}, {"content_length": "many"}])
async def test_a_body_is_counted_while_it_is_read_whatever_it_says(headers: dict[str, str]) -> None:
    chunk = {"type": "http.request", "body": b"x" * 40, "more_body": True}
    client = Client(*[chunk] * 9, **headers)
    await Limits(Work(), Slots(1, 0, 10**6), 100)(client.scope, client.receive, client.send)
    assert (client.status, client.num_read) == (413, 3)


async def test_a_body_of_just_the_size_arrives_whole() -> None:
    work = Work()
    work.go.set()
    parts = [{"type": "http.request", "body": b"ab" * 25, "more_body": more} for more in (True, False)]
    client = Client(*parts)
    await Limits(work, Slots(1, 0, 10**6), 100)(client.scope, client.receive, client.send)
    assert (client.status, work.bodies) == (200, [b"ab" * 50])


async def test_a_slow_body_holds_no_slot() -> None:
    work, slots = Work(), Slots(1, 1, 10**6)
    work.go.set()
    limits = Limits(work, slots, 100)
    slow = Client({"type": "http.request", "body": b"x", "more_body": True})
    task = asyncio.create_task(limits(slow.scope, slow.receive, slow.send))
    await settle()
    quick = Client()
    await asyncio.wait_for(limits(quick.scope, quick.receive, quick.send), 0.04)
    assert quick.status == 200
    slow.gone.set()
    await task
    assert (slow.sent, slots.places.taken) == ([], 0)


@pytest.fixture
async def narrow(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path, max_in_flight=1, max_queued=0, max_body_mb=0.001)
    async with bench.running():
        yield bench


async def test_the_recipe_bounds_the_gateway(narrow: Bench) -> None:
    narrow.server.hold.clear()
    first = asyncio.create_task(narrow.ask("hold on"))
    await narrow.server.holding.wait()
    assert (await narrow.ask()).status_code == 429
    narrow.server.hold.set()
    assert (await first).status_code == 200
    assert (await narrow.ask("x" * 1000)).status_code == 413
    assert (await narrow.ask()).status_code == 200


async def test_a_deadline_cancels_the_engines_work(narrow: Bench) -> None:
    narrow.server.hold.clear()
    answer = await narrow.ask("hold on", headers={"x-vcot-deadline-s": "0.1"})
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    await asyncio.wait_for(narrow.server.cancelled.wait(), 10)
    await narrow.until_so(lambda: narrow.admission.in_flight == 0)
    narrow.server.hold.set()
    assert (await narrow.ask(headers={"x-vcot-deadline-s": "10"})).status_code == 200


async def test_a_deadline_ends_the_wait_for_a_swap(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with bench.running():
        bench.server.hold.clear()
        first = asyncio.create_task(bench.ask("hold on"))
        await bench.server.holding.wait()
        swap = asyncio.create_task(bench.swap("policy", "tuned"))
        await bench.until("draining")
        assert (await bench.ask(headers={"x-vcot-deadline-s": "0.02"})).status_code == 504
        bench.server.hold.set()
        assert (await first).status_code == 200
        await swap


async def test_bodies_that_are_too_large_together_are_turned_away() -> None:
    work, slots = Work(), Slots(2, 2, 150)
    limits = Limits(work, slots, 100)
    big: Message = {"type": "http.request", "body": b"x" * 80, "more_body": False}
    clients = [Client(big), Client(big), Client()]
    tasks = [asyncio.create_task(limits(c.scope, c.receive, c.send)) for c in clients]
    await settle()
    assert (clients[1].status, clients[1].error["code"]) == (429, "overloaded")
    assert int(clients[1].header("retry-after") or 0) > 0
    assert slots.places.held_bytes == 81
    work.go.set()
    await asyncio.gather(*tasks)
    assert [clients[0].status, clients[2].status] == [200, 200]
    assert slots.places.held_bytes == 0
