"""A stage's asking in shards: each is done anywhere by the step itself, and merged into the run's one ledger by keys.

Model: the command cuts what is owed into shards of whole tasks and puts each into storage that all machines reach, as
`NAME.json`. Whoever takes a shard does it with the same step as ever, over a small ledger of its own in a temporary folder,
and leaves the records as `NAME.parquet`, whole or not at all. A name says which records are owed, so a shard whose file is
there is not asked again. The command merges each file, sees that it holds what was owed, and takes both away.
"""

from __future__ import annotations

import asyncio
import math
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal, cast

from vcot.pipeline.client import ChatClient
from vcot.pipeline.errors import RequestError, StageError, VcotError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges import Judge, find_judge, judgment_keys
from vcot.pipeline.judging import Standing, find_owed, judge_responses, look_at_judgments
from vcot.pipeline.ledger import Ledger, LedgerRecord
from vcot.pipeline.odds import OptionScores
from vcot.pipeline.option_scores import key_options, score_options
from vcot.pipeline.records import ImageRef, Judgment, Record, Reply, Response, content_key
from vcot.pipeline.sample import Group, Groups, Requests, SampleRequest, find_first, find_kept, look, sample
from vcot.pipeline.sections import JudgeSection
from vcot.pipeline.stage import Kept, batched
from vcot.services.gateway.admin import named_error
from vcot.services.run.measuring import read_gateway_key
from vcot.services.run.shared_storage import SharedImages, Storage

_KINDS: Mapping[str, type[LedgerRecord]] = {kind.__name__: kind for kind in (Response, Judgment, Reply, OptionScores)}
_SHARDS_EACH = 8
"""Shards for each worker, so that the last ones end at about the same time."""
_MAX_TASKS = 256
"""Of a shard: so many are asked again where a machine is lost."""


class Shard(Record):
    """What is asked in one go, with what the ledger holds of it already."""

    kind: Literal["sample", "options", "judge"]
    owed: tuple[str, ...]
    """Keys of the records that are to come."""
    requests: tuple[SampleRequest, ...] = ()
    groups: tuple[Group, ...] = ()
    known: tuple[Response | Judgment, ...] = ()
    url: str = ""
    """The gateway's."""
    section: JudgeSection | None = None
    """The judge's."""
    are_asked_again: bool = False
    """Whether the judge is asked again about what it gave no verdict on, as the whole stage decides."""
    max_concurrency: int = 1
    """Requests in flight, of all shards that are asked at once."""

    @property
    def name(self) -> str:
        """Says which records are owed."""
        return _name(self.kind, self.owed)

    @property
    def images(self) -> Iterator[ImageRef]:
        """Those that may be shown."""
        tasks = chain((request.task for request in self.requests), (group.task for group in self.groups))
        return (image for task in tasks for image in task.images)


def _name(kind: str, owed: Iterable[str]) -> str:
    return f"{kind}-{content_key(owed=sorted(owed))[:32]}"


class Fault(Record):
    """What kept a shard from being done, as one machine tells another."""

    kind: str
    """Name of the exception, in vcot.pipeline.errors."""
    message: str
    reason: str | None = None
    """Of the request's fault behind it, where there is one."""

    @classmethod
    def tell(cls, error: VcotError) -> Fault:
        """The fault as a record."""
        cause = error.__cause__
        reason = cause.reason if isinstance(cause, RequestError) else None
        return cls(kind=type(error).__name__, message=str(error), reason=reason)

    def restore(self) -> VcotError:
        """The exception, with its cause."""
        error = named_error(self.kind, self.message)
        if self.reason is not None:
            error.__cause__ = RequestError(self.message, scope="account", reason=self.reason)
        return error


# Cutting


def choose_size(num_tasks: int, num_requests: int, num_workers: int, max_concurrency: int) -> int:
    """Tasks of a shard: several shards for each worker, none of which leaves a worker with less than it may ask at once."""
    at_once = math.ceil(max_concurrency / num_workers * num_tasks / num_requests)
    return min(_MAX_TASKS, max(at_once, math.ceil(num_tasks / (_SHARDS_EACH * num_workers))))


def cut_requests(requests: Requests, ledger: Ledger, size: int) -> Iterator[Shard]:
    """What is owed of `requests`, in shards of `size` tasks."""
    owed = (request for request, is_done in look(requests, ledger) if not is_done)
    for chunk in _by_tasks(owed, size):
        keys = chain.from_iterable(list_owed_keys(request, ledger) for request in chunk)
        firsts = [first for request in chunk if (first := find_first(request))]
        asked = [key for first in firsts for key in first.response_keys()]
        asked += [key for request in chunk if request.first_key for key in request.response_keys()]
        known = [response for response in ledger.get(Response, asked).values() if response.error is None]
        yield Shard(kind="sample", owed=tuple(keys), requests=chunk, known=tuple(known))


def list_owed_keys(request: SampleRequest, ledger: Ledger) -> list[str]:
    """Keys of the responses that an unfinished group is asked for."""
    kept = find_kept(request, ledger)
    return [key for key in request.response_keys() if key not in kept]


def cut_options(owed: Iterable[SampleRequest], size: int) -> Iterator[Shard]:
    """What is asked about options, in shards of `size` tasks."""
    for chunk in _by_tasks(owed, size):
        yield Shard(kind="options", owed=tuple(map(key_options, chunk)), requests=chunk)


def _by_tasks(requests: Iterable[SampleRequest], size: int) -> Iterator[tuple[SampleRequest, ...]]:
    tasks = (tuple(own) for _, own in groupby(requests, key=lambda request: request.task.id))
    for chunk in batched(tasks, size):
        yield tuple(chain.from_iterable(chunk))


def cut_groups(
    judge: Judge, groups: Groups | Sequence[Group], standing: Standing, ledger: Ledger, size: int
) -> Iterator[Shard]:
    """What is owed of `judge`, in shards of `size` tasks, with what it and its members have said already."""
    again, section = standing.are_asked_again, judge.section
    seen = (
        (Group(task, [each.response for each in group]), [each.key for each in owed])
        for task, group in look_at_judgments(judge, groups, ledger)
        if (owed := find_owed(group, section, are_asked_again=again))
    )
    for chunk in batched(seen, size):
        own = tuple(group for group, _ in chunk)
        said = (key for group in own for each in judge.walk() for key in judgment_keys(each, group.task, group.good))
        known = tuple(ledger.get(Judgment, said).values())
        keys = tuple(key for _, owed in chunk for key in owed)
        yield Shard(kind="judge", owed=keys, groups=own, known=known, section=section, are_asked_again=again)


# Doing


def do_shard(storage: Storage, name: str, num_workers: int) -> Fault | None:
    """Ask what a shard owes, and leave what came of it in storage; nothing is asked where that is there.

    One of `num_workers` that ask at once. What came before a fault is left there, too.
    """
    try:
        return None if _is_done(storage, name) else _do_owed(storage, name, num_workers)
    except VcotError as error:
        return Fault.tell(error)


def _is_done(storage: Storage, name: str) -> bool:
    """Whether a shard's file is there, and holds what it owes: not a part that was left at a fault."""
    try:
        read_answered(storage, name).check(name)
    except (FileNotFoundError, StageError):
        return False
    return True


def _do_owed(storage: Storage, name: str, num_workers: int) -> Fault | None:
    try:
        shard = Shard.model_validate_json(storage.read(storage.asked(name)))
    except FileNotFoundError:
        where = f"{socket.gethostname()} finds no {storage.asked(name)} in {storage.url}"
        return Fault(kind="MachineError", message=f"{where}; give --shards a URL of storage that all nodes reach")
    share = math.ceil(shard.max_concurrency / num_workers)
    with tempfile.TemporaryDirectory(prefix="vcot-shard-") as folder:
        records, fault = asyncio.run(_do(shard, share, Path(folder) / "ledger.sqlite", SharedImages(storage)))
    if records:
        storage.write(storage.answered(name), _encode(records, shard.owed))
    return fault


async def _do(shard: Shard, share: int, path: Path, images: ImageStore) -> tuple[list[LedgerRecord], Fault | None]:
    """What came of asking, and what ended it early."""
    ledger, fault = _NotedLedger(path), None
    ledger.put(shard.known)
    ledger.noted.clear()
    try:
        await _ASK[shard.kind](shard, share, ledger, images)
    except VcotError as error:
        fault = Fault.tell(error)
    await ledger.finish()
    return ledger.read_noted(), fault


class _NotedLedger(Ledger):
    """Knows the keys of what was put."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._where = path
        self.noted: dict[type[LedgerRecord], set[str]] = {}

    def put(self, records: Sequence[LedgerRecord]) -> None:
        """As the ledger, and noted."""
        super().put(records)
        for record in records:
            self.noted.setdefault(type(record), set()).add(record.key)

    def read_noted(self) -> list[LedgerRecord]:
        """What was put, as the file holds it."""
        kept = Ledger(self._where, is_read=True)
        try:
            found = (kept.get(cast("type[Response]", kind), keys) for kind, keys in self.noted.items())
            return [record for records in found for record in records.values()]
        finally:
            kept.close()


async def _ask_requests(shard: Shard, share: int, ledger: Ledger, images: ImageStore) -> None:
    ask = sample if shard.kind == "sample" else score_options
    async with ChatClient(f"{shard.url}/v1", read_gateway_key(), max_connections=share, is_own=True) as client:
        await ask(shard.requests, client, ledger, images, max_concurrency=share)


async def _ask_judge(shard: Shard, share: int, ledger: Ledger, images: ImageStore) -> None:
    assert shard.section is not None
    decided = (
        {"max_unjudged": 0.0} if shard.are_asked_again else {"max_asks": 1}
    )  # whatever is refused of this shard alone
    section = shard.section.model_copy(update={"max_concurrency": share})
    async with find_judge(section, images) as judge:
        await judge_responses(judge, shard.groups, ledger, section.model_copy(update=decided))


_ASK: Mapping[str, Callable[[Shard, int, Ledger, ImageStore], Awaitable[None]]] = {
    "sample": _ask_requests,
    "options": _ask_requests,
    "judge": _ask_judge,
}


# Merging


def _encode(records: Sequence[LedgerRecord], owed: Iterable[str]) -> bytes:
    """The records as a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted, sink = set(owed), pa.BufferOutputStream()
    columns: dict[str, list[Any]] = {
        "kind": [type(record).__name__ for record in records],
        "key": [record.key for record in records],
        "is_owed": [record.key in wanted for record in records],
        "record": [record.model_dump_json() for record in records],
    }
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue())


@dataclass(frozen=True)
class Answered:
    """What a shard's file holds."""

    records: Sequence[LedgerRecord]
    owed: Sequence[Kept]
    """Those of them that were asked for; others are kept so that nothing is asked twice."""

    def check(self, name: str) -> None:
        """Raise StageError where they are not what the shard owed."""
        if _name(name.partition("-")[0], (record.key for record in self.owed)) != name:
            raise StageError(
                f"shard {name} does not hold what it owed; what it holds is kept, and the same command asks for the rest"
            )


def read_answered(storage: Storage, name: str) -> Answered:
    """What a shard's file holds. Raises FileNotFoundError, and StageError for a file that is none of ours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = storage.answered(name)
    data = storage.read(path)
    try:
        rows = pq.read_table(pa.BufferReader(data)).to_pylist()
        records = [_KINDS[row["kind"]].model_validate_json(row["record"]) for row in rows]
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise StageError(
            f"{path} in {storage.url} cannot be read ({str(error).splitlines()[0][:200]}); delete it, and the same command "
            "asks again"
        ) from None
    owed = {row["key"] for row in rows if row["is_owed"]}
    return Answered(records, [each for each in records if each.key in owed and not isinstance(each, Reply)])
