"""A gateway over fake servers in one process, as the tests of routing, swapping and supervision need it."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.services.fake_vllm import FakeVllm, make_canary, write_adapter, write_checkpoint
from vcot.pipeline.errors import ServerError
from vcot.pipeline.sections import ModelSection
from vcot.services.checkpoints.registry import Checkpoint, Registry
from vcot.services.engine.serve_section import ServeSection
from vcot.services.gateway.admin import Swapped
from vcot.services.gateway.fleet.admission import Admission, Phase
from vcot.services.gateway.fleet.group import Fleet
from vcot.services.gateway.fleet.replica import Replica, Supervision
from vcot.services.gateway.fleet.roster import Roster
from vcot.services.gateway.http.app import make_deciding
from vcot.services.gateway.http.front import build_front, make_slots
from vcot.services.gateway.http.limits import Slots
from vcot.services.gateway.http.observe import Count
from vcot.services.gateway.http.ticket import Dispatch
from vcot.services.gateway.swap import rollout
from vcot.services.gateway.swap.claim import Owner
from vcot.services.gateway.swap.verified import SwapLimits
from vcot.services.gateway.workers.carrier import RemoteDispatch, TurnsElsewhere
from vcot.services.gateway.workers.desk import Desk

BASE, TUNED = 1.0, 2.0
ASK = {"model": "policy", "messages": [{"role": "user", "content": "hello"}], "logprobs": True}


def answer_of(weight: float) -> set[float]:
    """The log-probs of a server with that weight: one value, where one set of weights gave all tokens."""
    return set(make_canary(weight).logprobs)


@dataclass
class Custom:
    """How gateways are made unless they are told."""

    is_split: bool = False
    """A worker carries requests for the process that decides."""


CUSTOM = Custom()


class Bench:
    """`servers` are all lives so far, by the replica's number in `lives`."""

    def __init__(
        self,
        directory: Path,
        *,
        limits: SwapLimits | None = None,
        supervision: Supervision | None = None,
        max_wait_s: float = 5.0,
        can_sleep: bool = True,
        owner: Owner | None = None,
        **settings: Any,
    ) -> None:
        self.directory = directory
        self.registry = Registry(directory / "run")
        if not (directory / "base").is_dir():  # else it is a later gateway of the same run
            write_checkpoint(directory / "base", "seed", BASE, kind="base")
            write_checkpoint(directory / "tuned", "tuned", TUNED)
        self.base = self.registry.base(ModelSection(source=str(directory / "base")))
        self.tuned = self.registry.register(directory / "tuned")
        self.servers: list[FakeVllm] = []
        self.lives: dict[int, list[FakeVllm]] = {}
        self.prepare: Callable[[FakeVllm], None] = lambda _: None
        self.said: list[str] = []
        self.log: list[bytes] = []
        self.settings = ServeSection(**settings)
        self.fleet = Fleet(
            self.registry,
            self.settings,
            Roster(directory / "run", self.settings),
            self._launch,
            self.said.append,
            max_lora_rank=8,
            can_sleep=can_sleep,
            limits=limits,
            supervision=supervision or Supervision(first_backoff_s=0.0, lease_s=3.0),
            owner=owner,
        )
        self._deciding = own = make_deciding(self.fleet, directory / "run", self.settings, max_wait_s=max_wait_s)
        self.slots = own.slots
        self._front = self._make_front(own.dispatcher, own.others, own.slots, own.dispatcher.metrics.count)
        self._is_split = CUSTOM.is_split
        self.http = self.client("127.0.0.1")

    def client(self, host: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, client=(host, 1), raise_app_exceptions=not self._is_split)
        return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8100")

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The gateway."""
        await self._front(scope, receive, send)

    def _make_front(self, dispatch: Dispatch, others: ASGIApp, slots: Slots, count: Count) -> ASGIApp:
        return build_front(dispatch, others, slots, self.settings, count, self.log.append)

    async def _split(self) -> None:
        """Have requests carried as by a worker: all that it knows of the fleet goes over a line of its own."""
        ends, loop = socket.socketpair(), asyncio.get_running_loop()
        desk = Desk(self._deciding, lambda: desk.tell_suspicion())
        await loop.create_connection(lambda: desk, sock=ends[0])
        _, self.line = await loop.create_connection(RemoteDispatch, sock=ends[1])
        slots = make_slots(self.settings, self.slots.places.counts, TurnsElsewhere)
        self._front = self._make_front(self.line, self.line.call, slots, self.line.count)

    def _launch(self, checkpoint: Checkpoint, number: int, devices: str | None) -> FakeVllm:
        self.servers.append(FakeVllm(checkpoint))
        self.lives.setdefault(number, []).append(self.servers[-1])
        self.prepare(self.servers[-1])
        return self.servers[-1]

    @property
    def server(self) -> FakeVllm:
        return self.servers[-1]

    def server_of(self, number: int) -> FakeVllm:
        return self.lives[number][-1]

    @property
    def replica(self) -> Replica:
        return self.fleet.replicas[0]

    @property
    def admission(self) -> Admission:
        return self.replica.gate.admission

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Bench"]:
        if self._is_split:
            await self._split()
        task = asyncio.create_task(self.fleet.run())
        task.add_done_callback(lambda _: self.fleet.changes.notify())
        try:
            for replica in self.fleet.replicas:
                await self.until("live", replica, task)
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self.http.aclose()
            if self._is_split:
                self.line.close()

    async def until(self, phase: Phase, replica: Replica | None = None, task: asyncio.Task[None] | None = None) -> None:
        admission = (replica or self.replica).gate.admission
        await self.fleet.changes.wait_for(lambda: admission.phase == phase or (task is not None and task.done()), 10)
        if task is not None and task.done():
            task.result()
        assert admission.phase == phase

    async def until_so(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not is_so():
                await self.fleet.changes.wait_for(is_so, 0.01)  # servers tell nobody what changes there

    async def swap(self, alias: str, name: str) -> Swapped:
        return await rollout.swap(self.fleet, alias, name)

    async def ask(self, content: Any = "hello", headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        body = ASK | {"messages": [{"role": "user", "content": content}]} | fields
        return await self.http.post("/v1/chat/completions", json=body, headers=headers)

    async def answer(self, text: str = "hello", model: str = "policy") -> tuple[str, set[float]]:
        """Who answered, and the distinct log-probs of the answer."""
        answer = await self.ask(text, model=model)
        if answer.status_code != 200:
            raise ServerError(answer.text)
        content = answer.json()["choices"][0]["logprobs"]["content"]
        return answer.headers["x-vcot-checkpoint"], {token["logprob"] for token in content}

    def adapter(self, name: str, delta: float, **options: Any) -> Checkpoint:
        """A registered adapter of the base."""
        path = write_adapter(self.directory / name, name, delta, self.base.ref, BASE, **options)
        return self.registry.register(path)
