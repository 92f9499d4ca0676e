"""Who asks what a stage owes: this process, or workers on many machines, by shards.

Model: a step asks `Engine` and does not know which one it has. `Here` is the step itself. `Sharded` cuts what is owed into
shards (services/run/sharding.py), has a crew do them, and merges what comes into the run's ledger, in this process alone.
So a command that is killed loses what is in flight, and nothing that was left in storage: the next one merges that first.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Protocol

from vcot.pipeline.client import ChatClient
from vcot.pipeline.judges import Judge
from vcot.pipeline.judges.cost import Meter
from vcot.pipeline.judging import Standing, judge_responses
from vcot.pipeline.option_scores import list_owed_options, score_options
from vcot.pipeline.records import ImageRef, StageCount
from vcot.pipeline.report import Report, Said
from vcot.pipeline.sample import Group, Groups, Requests, SampleRequest, count_known, look, sample
from vcot.pipeline.stage import OnProgress, Tally
from vcot.services.run.directory import Run
from vcot.services.run.gateways import Gateway
from vcot.services.run.measuring import API_KEY_ENV
from vcot.services.run.sharding import (
    Answered,
    Fault,
    Shard,
    choose_size,
    cut_groups,
    cut_options,
    cut_requests,
    read_answered,
)
from vcot.services.run.shared_storage import Storage
from vcot.services.run.unmerged import find_storage, leave_storage, note_storage

_UPLOADS = 16
"""Images that are copied at once."""


class Engine(Protocol):
    """Asks what is owed; every answer is in the run's ledger before it counts. Raises as the steps do."""

    async def sample(
        self, requests: Requests, client: ChatClient, *, max_concurrency: int, on_progress: OnProgress
    ) -> StageCount:
        """As `vcot.pipeline.sample.sample`."""

    async def score_options(
        self, requests: Sequence[SampleRequest], client: ChatClient, *, max_concurrency: int, on_progress: OnProgress
    ) -> StageCount:
        """As `vcot.pipeline.option_scores.score_options`."""

    async def judge(
        self,
        judge: Judge,
        groups: Groups | Sequence[Group],
        *,
        standing: Standing,
        meter: Meter,
        on_progress: OnProgress,
    ) -> StageCount:
        """As `vcot.pipeline.judging.judge_responses`."""

    async def close(self) -> None:
        """Stop what was started here."""


@dataclass(frozen=True)
class Here:
    """This process."""

    run: Run

    async def sample(
        self, requests: Requests, client: ChatClient, *, max_concurrency: int, on_progress: OnProgress
    ) -> StageCount:
        """By its client."""
        run = self.run
        return await sample(
            requests, client, run.ledger, run.images, max_concurrency=max_concurrency, on_progress=on_progress
        )

    async def score_options(
        self, requests: Sequence[SampleRequest], client: ChatClient, *, max_concurrency: int, on_progress: OnProgress
    ) -> StageCount:
        """By its client."""
        run = self.run
        return await score_options(
            requests, client, run.ledger, run.images, max_concurrency=max_concurrency, on_progress=on_progress
        )

    async def judge(
        self,
        judge: Judge,
        groups: Groups | Sequence[Group],
        *,
        standing: Standing,
        meter: Meter,
        on_progress: OnProgress,
    ) -> StageCount:
        """By the judge's client."""
        return await judge_responses(
            judge, groups, self.run.ledger, judge.section, standing=standing, meter=meter, on_progress=on_progress
        )

    async def close(self) -> None:
        """Nothing was started."""


class Crew(Protocol):
    """Workers, on whichever machines."""

    async def muster(self) -> int:
        """How many there are. Raises MachineError where they cannot be had."""

    def reach(self, url: str) -> str:
        """The gateway's URL as the workers reach it. Raises MachineError where they do not."""

    def work(
        self, storage: Storage, names: Sequence[str], keys: Sequence[str]
    ) -> AsyncGenerator[tuple[str, Fault | None], None]:
        """Do the shards of those names; each as it is done, with what kept it from that.

        After a fault no other is begun. `keys` are the environment variables whose values the workers need. Raises
        ServerError.
        """

    async def close(self) -> None:
        """Send them home."""


@dataclass
class Sharded:
    """A crew, whose work is merged here. Mutated by its stages, one at a time."""

    run: Run
    gateway: Gateway
    report: Report
    crew: Crew
    url: str | None = None
    """Of storage that the crew reaches; None for the run directory."""
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @cached_property
    def storage(self) -> Storage:
        """Where shards lie."""
        return find_storage(self.run, self.url)

    async def sample(
        self, requests: Requests, client: ChatClient, *, max_concurrency: int, on_progress: OnProgress
    ) -> StageCount:
        """By the crew, over the gateway; `client` asks nothing."""
        async with self._turn:
            ledger, tally, owed = self.run.ledger, Tally("sample", total=0), Counter[str]()
            for request, is_done in look(requests, ledger):
                tally.total += request.sampling.n
                tally.cached += count_known(request, ledger, is_done=is_done)
                owed[request.task.id] += not is_done
            size = await self._choose_size(len(+owed), owed.total(), max_concurrency)
            shards = cut_requests(requests, ledger, size)
            return await self._ask_served(shards, tally, max_concurrency, on_progress)

    async def score_options(
        self, requests: Sequence[SampleRequest], client: ChatClient, *, max_concurrency: int, on_progress: OnProgress
    ) -> StageCount:
        """By the crew, over the gateway; `client` asks nothing."""
        async with self._turn:
            owed, tally = list_owed_options(requests, self.run.ledger)
            shards = cut_options(
                owed, await self._choose_size(len({r.task.id for r in owed}), len(owed), max_concurrency)
            )
            return await self._ask_served(shards, tally, max_concurrency, on_progress)

    async def judge(
        self,
        judge: Judge,
        groups: Groups | Sequence[Group],
        *,
        standing: Standing,
        meter: Meter,
        on_progress: OnProgress,
    ) -> StageCount:
        """By the crew, unless that judge's cost or replies are to be known in one place."""
        ledger = self.run.ledger
        if (why := find_why_here(judge)) is not None or not standing.num_owed:
            if standing.num_owed:
                self.report(Said(f"{judge.name} is asked from this machine: {why}"))
            here = Here(self.run)
            return await here.judge(judge, groups, standing=standing, meter=meter, on_progress=on_progress)
        async with self._turn:
            most = judge.section.max_concurrency
            num_tasks = min(standing.num_owed, len(groups.requests if isinstance(groups, Groups) else groups))
            size = await self._choose_size(num_tasks, standing.num_owed, most)
            shards = cut_groups(judge, groups, standing, ledger, size)
            keys = [judge.section.api_key_env]
            try:
                return await self._ask(shards, standing.begin(), on_progress, keys, max_concurrency=most)
            finally:
                meter.num_requests, meter.usage = ledger.spent(judge.name)

    async def _choose_size(self, num_tasks: int, num_requests: int, max_concurrency: int) -> int:
        return choose_size(num_tasks, num_requests, await self.crew.muster(), max_concurrency) if num_tasks else 1

    async def _ask_served(
        self, shards: Iterable[Shard], tally: Tally, max_concurrency: int, on_progress: OnProgress
    ) -> StageCount:
        """Over the gateway."""
        url = self.crew.reach(await self.gateway.open()) if tally.finished < tally.total else ""
        return await self._ask(shards, tally, on_progress, [API_KEY_ENV], url=url, max_concurrency=max_concurrency)

    async def _ask(
        self,
        shards: Iterable[Shard],
        tally: Tally,
        on_progress: OnProgress,
        keys: Sequence[str],
        **settings: Any,
    ) -> StageCount:
        """Have the crew do the shards, and count what comes. Raises what kept one from being done, after those at work."""
        on_progress(tally)
        names = await asyncio.to_thread(self._publish, shards, settings)
        if not names:
            return tally.close()
        self.report(Said(f"shards: {len(names)}; nodes that ask: {await self.crew.muster()}"))
        owed, faults = {*names}, list[Fault]()
        async with aclosing(self.crew.work(self.storage, names, keys)) as done:
            async for name, fault in done:
                if name in owed:  # once: one that was lost may come again
                    owed.remove(name)
                    faults += [fault] if fault else []
                    await self._merge(name, tally, is_whole=fault is None)
                    on_progress(tally)
        await asyncio.to_thread(leave_storage, self.run, self.storage, owed)
        if faults:
            raise faults[0].restore()
        return tally.close()

    async def _merge(self, name: str, tally: Tally, *, is_whole: bool) -> None:
        """Put a shard's records into the ledger, count those that were owed, and take its files away.

        Raises StageError where it does not hold what it owed.
        """
        try:
            found = await asyncio.to_thread(read_answered, self.storage, name)
        except FileNotFoundError:
            found = Answered((), ())
        await self.run.ledger.write(found.records)
        if is_whole:
            found.check(name)
        for record in found.owed:
            tally.add_new(record)
        await asyncio.to_thread(self.storage.clear, name)

    def _publish(self, shards: Iterable[Shard], settings: Mapping[str, Any]) -> list[str]:
        """Put the shards into storage, with their images where those are not there; their names."""
        names, images = list[str](), None if self.url is None else self.storage.list_files("images")
        with ThreadPoolExecutor(_UPLOADS) as pool:
            for shard in shards:
                if not names:
                    note_storage(self.run, self.storage)
                if images is not None:
                    lacking = {ref.path: ref for ref in shard.images if PurePosixPath(ref.path).name not in images}
                    list(pool.map(self._upload, lacking.values()))
                    images |= {PurePosixPath(path).name for path in lacking}
                data = shard.model_copy(update=dict(settings)).model_dump_json().encode()
                self.storage.write(self.storage.asked(shard.name), data)
                names.append(shard.name)
        return names

    def _upload(self, ref: ImageRef) -> None:
        self.storage.write(ref.path, self.run.images.read(ref))

    async def close(self) -> None:
        """Send the crew home."""
        await self.crew.close()


def find_why_here(judge: Judge) -> str | None:
    """Why a judge is not asked by a crew; None of one that may be."""
    section = judge.section
    if section.max_cost_usd is not None:
        return "judge.max_cost_usd is counted in one place"
    if section.batch:
        return "judge.batch sends few large requests"
    if judge.keeps_replies:
        return "a verdict of several answers goes by those that the run's ledger holds"
    return None
