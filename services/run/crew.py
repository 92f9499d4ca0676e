"""A crew on the nodes of a Ray cluster, spoken to by a process of its own: what Ray prints and does stays in there.

Model: the process (services/run/ray_crew.py) joins the cluster, says which nodes it has, takes an `Order` as a line of JSON,
and tells of each shard with a line. It ends with its standard input, so with this command, however that ends; Ray ends
its workers then.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ValidationError

from vcot.pipeline.errors import MachineError, ServerError
from vcot.pipeline.hosts import is_this_machine
from vcot.pipeline.records import Record
from vcot.services.engine.logs import bound
from vcot.services.engine.serve_section import ServeSection
from vcot.services.gateway.admin import named_error
from vcot.services.run.sharding import Fault
from vcot.services.run.shared_storage import Storage

_EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
_MAX_LINE = 2**20


class Order(Record):
    """Shards to be done."""

    url: str
    folder: str
    names: tuple[str, ...]
    num_workers: int
    keys: tuple[str, ...]
    """Environment variables whose values the workers need; no value is written anywhere."""


class Told(Record):
    """What the process tells: first of the cluster, then of each shard, and of an order's end."""

    nodes: tuple[str, ...] = ()
    """Addresses of those that may work."""
    own: str = ""
    """The address of this one."""
    name: str | None = None
    """Of a shard that is done."""
    fault: Fault | None = None
    """What kept the shard, or all of them, from being done."""


@dataclass
class RayCrew:
    """A worker on each node. Mutated by the session that made it."""

    serve: ServeSection
    log: Path
    _process: asyncio.subprocess.Process | None = None
    _cluster: Told = field(default_factory=Told)

    async def muster(self) -> int:
        """How many nodes may work. Raises MachineError where there is no cluster."""
        if self._process is None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            bound(self.log)
            with self.log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "vcot.services.run.ray_crew", self.serve.ray_address or "auto"),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,
                    limit=_MAX_LINE,
                )
            self._cluster = await self._hear()
        return len(self._cluster.nodes)

    def reach(self, url: str) -> str:
        """The gateway's URL as the nodes reach it. Raises MachineError where it is for this machine only."""
        return find_reachable(url, self.serve, self._cluster.own, self._cluster.nodes)

    async def work(
        self, storage: Storage, names: Sequence[str], keys: Sequence[str]
    ) -> AsyncGenerator[tuple[str, Fault | None], None]:
        """Have the shards done. Raises ServerError where Ray gives up."""
        num_workers = min(await self.muster(), len(names))
        order = Order(
            url=storage.url, folder=storage.folder, names=tuple(names), num_workers=num_workers, keys=tuple(keys)
        )
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(order.model_dump_json().encode() + b"\n")
        await self._process.stdin.drain()
        while (told := await self._hear()).name is not None:
            yield told.name, told.fault

    async def _hear(self) -> Told:
        """The next line. Raises what ended the process's work."""
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            told = Told.model_validate_json(await self._process.stdout.readline())
        except ValidationError:
            raise ServerError(f"the process that speaks to Ray has ended; see {self.log}") from None
        if told.fault is not None and told.name is None:
            raise named_error(told.fault.kind, told.fault.message)
        return told

    async def close(self) -> None:
        """End the process, and so the workers."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()


def find_reachable(url: str, serve: ServeSection, own: str, nodes: Sequence[str]) -> str:
    """The URL of the gateway as all nodes reach it. Raises MachineError where it is for this machine only."""
    parts = urlsplit(url)
    if not is_this_machine(parts.hostname or "") or {*nodes} <= {own}:
        return url
    if serve.url is None and serve.host in _EVERYWHERE:
        return f"{parts.scheme}://{own}:{parts.port}"
    others = ", ".join(sorted({*nodes} - {own})[:3])
    field_name = f"serve.host = {serve.host}" if serve.url is None else f"serve.url = {serve.url}"
    raise MachineError(
        f"{field_name} is reached from this machine only, and the Ray cluster has other nodes ({others}); give an address "
        "that they reach, such as 0.0.0.0 on a closed network"
    )
