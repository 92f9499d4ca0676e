"""OpenAI's Batch API: judging at half the price, answered within a day (https://platform.openai.com/docs/guides/batch).

Model: a judge is asked as ever, by a client that answers from the batches that are done. A request that is in none is
written to a queue, and what needs its answer fails for now, as `queued`. When all was asked once, the queue is submitted
and waited for, and the judge is asked again, until nothing is queued. So a verdict of several requests takes several
batches, and nothing is held in memory but which request was answered where.

    <run>/batches/queue.jsonl          requests that are not submitted yet
    <run>/batches/<digest>.jsonl       a batch's requests; <digest> is of this file (and of how many batches with the same
                                       requests ended before), and stands in the batch's metadata
    <run>/batches/<digest>.json        its id, as soon as the API has told it
    <run>/batches/<digest>.out.jsonl   its answers

A stop at any moment loses nothing: a batch whose id is not on disk is looked for by its digest before it is submitted
again, and an answer counts whichever command asked. An item's error is a fault like any other; what the API did not come to
is queued again.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vcot.pipeline.client import ChatClient, fit_request
from vcot.pipeline.concurrency import with_retry
from vcot.pipeline.errors import AccountError, RequestError
from vcot.pipeline.faults import explain_status
from vcot.pipeline.files import naming, read_record, replace_file, write_record
from vcot.pipeline.judges import Judge
from vcot.pipeline.judges.cost import Meter
from vcot.pipeline.judging import judge_responses
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.records import Record, StageCount, canonical_json
from vcot.pipeline.sample import Group, Groups
from vcot.pipeline.sections import JudgeSection
from vcot.pipeline.stage import QUEUED, OnProgress

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types import Batch

MAX_REQUESTS, MAX_BYTES = 50_000, 190_000_000
"""Of one batch; the API takes 50,000 and 200 MB."""
_MAX_TRIES = 3
"""Of a request whose attempt failed, by one command."""
_OVER = ("completed", "failed", "expired", "cancelled")
_QUEUE = "queue.jsonl"
T = TypeVar("T")
OnStates = Callable[[int, int, str], None]
"""Takes how many requests are answered, how many there are in all, and the batches' states."""


class Submitted(Record):
    """A batch that the API has."""

    id: str
    num_requests: int


@dataclass(frozen=True)
class _Place:
    """Where an answer is."""

    path: Path
    offset: int
    is_good: bool
    """Whether a completion stands there."""


@dataclass
class Batches:
    """A run's batches; mutated by the client that queues, and by `work_off_queue`."""

    folder: Path
    _answers: dict[bytes, _Place] = field(default_factory=dict)
    _queued: set[bytes] = field(default_factory=set)
    _tries: Counter[bytes] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Read what is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("*.out.jsonl")):
            self._index(path)
        self._queue.unlink(missing_ok=True)  # what is still owed is asked for again

    @property
    def _queue(self) -> Path:
        return self.folder / _QUEUE

    @property
    def num_queued(self) -> int:
        """Requests that are not submitted yet."""
        return len(self._queued)

    def _index(self, path: Path) -> None:
        """Note where the answers in a file are. A completion counts, whatever other batches say of the same request."""
        offset = 0
        with path.open("rb") as file:
            for line in file:
                found = json.loads(line)
                key = bytes.fromhex(found["custom_id"])
                is_good = (found.get("response") or {}).get("status_code") == 200
                if key not in self._answers or not self._answers[key].is_good:
                    self._answers[key] = _Place(path, offset, is_good)
                offset += len(line)

    def take(self, body: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The completion that answers `body`. Raises RequestError: of scope `later` where there is none yet."""
        key = hashlib.sha256(canonical_json(body)).digest()
        place = self._answers.get(key)
        if place is None:
            raise self._put(key, body)
        fault = None
        found = _read_line(place)
        response, error = found.get("response") or {}, found.get("error") or {}
        if place.is_good:
            return dict(response["body"])
        if response:
            fault = explain_status(response["status_code"], (response.get("body") or {}).get("error"), {}, where)
        if fault is None or fault.scope == "attempt":
            if self._tries[key] < _MAX_TRIES:
                self._tries[key] += 1
                del self._answers[key]
                raise self._put(key, body)
            message = str(fault or f"{where} did not come to the request: {error.get('message', 'no reason given')}")
            raise RequestError(message, scope="later", reason=fault.reason if fault else "expired")
        raise fault

    def _put(self, key: bytes, body: Mapping[str, Any]) -> RequestError:
        """Queue a request, once; gives the fault that says so."""
        if key not in self._queued:
            self._queued.add(key)
            line = {"custom_id": key.hex(), "method": "POST", "url": "/v1/chat/completions", "body": body}
            with naming(self._queue), self._queue.open("ab") as file:
                file.write(canonical_json(line) + b"\n")
        return RequestError("it waits for a batch", scope="later", reason=QUEUED)

    def list_pending(self) -> list[Path]:
        """Files of requests whose answers are not there."""
        paths = (path for path in sorted(self.folder.glob("*.jsonl")) if "." not in path.stem and path != self._queue)
        return [path for path in paths if not path.with_suffix(".out.jsonl").exists()]

    def cut_queue(self, max_requests: int | None) -> None:
        """Make files of what is queued, each of which a batch may be; the rest beyond `max_requests` is let go."""
        lines: list[bytes] = []
        num_bytes = 0
        for number, line in enumerate(_read_lines(self._queue)):
            if max_requests is not None and number >= max_requests:
                break
            if len(lines) == MAX_REQUESTS or num_bytes + len(line) > MAX_BYTES:
                self._write(lines)
                lines, num_bytes = [], 0
            lines.append(line)
            num_bytes += len(line)
        if lines:
            self._write(lines)
        self._queue.unlink(missing_ok=True)
        self._queued.clear()

    def _write(self, lines: Sequence[bytes]) -> None:
        """Write a batch's requests under a name that no ended batch has."""
        content = b"".join(lines)
        names = (hashlib.sha256(content + b"again" * times).hexdigest()[:32] for times in itertools.count())
        name = next(name for name in names if not (self.folder / f"{name}.out.jsonl").exists())
        replace_file(self.folder / f"{name}.jsonl", content)

    def keep(self, path: Path, answers: bytes) -> None:
        """Keep a batch's answers, on disk before they count."""
        out = path.with_suffix(".out.jsonl")
        replace_file(out, answers)
        self._index(out)

    def forget(self, path: Path) -> None:
        """A batch that the API refused: its requests are asked for again."""
        for each in (path, path.with_suffix(".json")):
            each.unlink(missing_ok=True)


def _read_line(place: _Place) -> dict[str, Any]:
    with place.path.open("rb") as file:
        file.seek(place.offset)
        return dict(json.loads(file.readline()))


def _read_lines(path: Path) -> Iterator[bytes]:
    if path.exists():
        with path.open("rb") as file:
            yield from file


class BatchClient(ChatClient):
    """Answers from the batches that are done, and queues what is in none."""

    def __init__(self, base_url: str | None, api_key: str, batches: Batches, **options: Any) -> None:
        """`options` are ChatClient's."""
        super().__init__(base_url, api_key, **options)
        self.batches = batches

    async def _send(self, request: dict[str, Any], expect: str | None) -> dict[str, Any]:
        return self.batches.take(fit_request(request, self._unsupported), str(self._openai.base_url))

    async def work_off_queue(
        self,
        on_states: OnStates,
        *,
        max_requests: int | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        poll_s: float = 30.0,
    ) -> None:
        """Submit what is queued, at most `max_requests`, and wait until all batches are over.

        Raises AccountError where the API refuses a batch, or does not answer.
        """
        self.batches.cut_queue(max_requests)
        pending = self.batches.list_pending()
        while pending:
            states = [await self._advance(path) for path in pending]
            done, total = (sum(numbers) for numbers in zip(*(numbers for _, numbers in states), strict=True))
            counted = Counter(state for state, _ in states)
            on_states(done, total, ", ".join(f"{number} {state}" for state, number in sorted(counted.items())))
            pending = self.batches.list_pending()
            if pending:
                await sleep(poll_s)

    async def _advance(self, path: Path) -> tuple[str, tuple[int, int]]:
        """Bring one batch on: submit it, or take its answers. Gives its state, and its answered and all requests."""
        record = path.with_suffix(".json")
        if not record.exists():
            found = await self._find(path.stem) or await self._submit(path)
            num_requests = sum(1 for _ in _read_lines(path))
            write_record(record, Submitted(id=found.id, num_requests=num_requests))
        submitted = read_record(record, Submitted, remedy="delete it, and the batch is found again")
        assert submitted is not None
        batch = await self._call(lambda openai: openai.batches.retrieve(submitted.id))
        if batch.status == "failed":
            self.batches.forget(path)
            raise AccountError(f"batch {batch.id} was refused: {_explain(batch)}; mend that, and repeat the command")
        if batch.status in _OVER:
            self.batches.keep(path, await self._fetch(batch, path))
        done = batch.request_counts.completed + batch.request_counts.failed if batch.request_counts else 0
        return batch.status.replace("_", " "), (done, submitted.num_requests)

    async def _find(self, digest: str) -> Batch | None:
        """The batch of an earlier command that was stopped before it could note the id."""

        async def look(openai: AsyncOpenAI) -> Batch | None:
            async for batch in openai.batches.list(limit=100):
                if (batch.metadata or {}).get("vcot") == digest and batch.status != "failed":
                    return batch
            return None

        return await self._call(look)

    async def _submit(self, path: Path) -> Batch:
        uploaded = await self._call(lambda openai: openai.files.create(file=path, purpose="batch"))
        return await self._call(
            lambda openai: openai.batches.create(
                completion_window="24h",
                endpoint="/v1/chat/completions",
                input_file_id=uploaded.id,
                metadata={"vcot": path.stem},
            ),
            is_repeated=False,
        )

    async def _fetch(self, batch: Batch, path: Path) -> bytes:
        """The lines of its answers and errors; of a request that is in neither, that it was not come to."""
        lines: list[bytes] = []
        for name in (batch.output_file_id, batch.error_file_id):
            if name is not None:
                content = await self._call(lambda openai, name=name: openai.files.content(name))  # type: ignore[misc]
                lines += content.content.splitlines()
        answered = {json.loads(line)["custom_id"] for line in lines}
        for line in _read_lines(path):
            if (key := json.loads(line)["custom_id"]) not in answered:
                lines.append(canonical_json({"custom_id": key, "response": None, "error": {"message": batch.status}}))
        return b"".join(line + b"\n" for line in lines)

    async def _call(self, call: Callable[[AsyncOpenAI], Awaitable[T]], *, is_repeated: bool = True) -> T:
        """A control call, repeated while its attempt fails, unless it would submit twice. Raises AccountError."""
        import openai

        async def once() -> T:
            where = str(self._openai.base_url)
            try:
                return await call(self._openai)
            except openai.APIStatusError as error:
                raise explain_status(error.status_code, error.body, error.response.headers, where) from None
            except openai.APIConnectionError as error:
                cause = error.__cause__ or error
                message = f"no answer from {where}: {cause!r}"
                raise RequestError(message, scope="attempt", reason="connection") from None

        try:
            return await (with_retry(once) if is_repeated else once())
        except RequestError as fault:
            raise AccountError(f"batches: {fault}; what was submitted is kept, and the same command goes on") from fault


def _explain(batch: Batch) -> str:
    """Why the API refused it, in its own words."""
    errors = (batch.errors.data if batch.errors else None) or []
    return "; ".join(error.message or error.code or "" for error in errors) or "no reason given"


async def judge_in_batches(
    judge: Judge,
    client: BatchClient,
    groups: Groups | Sequence[Group],
    ledger: Ledger,
    section: JudgeSection,
    *,
    meter: Meter,
    on_progress: OnProgress = lambda _: None,
    on_states: OnStates = lambda *_: None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> StageCount:
    """As `judge_responses`, by batches: what was submitted before is waited for first, so that nothing is paid for twice.

    No more is submitted than the meter's cap allows. Raises AccountError where the API refuses a batch, and as
    `judge_responses` does.
    """
    await client.work_off_queue(on_states, sleep=sleep)
    num_cached: int | None = None
    while True:
        count = await judge_responses(judge, groups, ledger, section, meter=meter, on_progress=on_progress)
        num_cached = count.cached if num_cached is None else num_cached
        if not client.batches.num_queued:
            return count.model_copy(update={"cached": num_cached, "ok": count.ok + count.cached - num_cached})
        await client.work_off_queue(on_states, max_requests=meter.count_affordable(), sleep=sleep)
