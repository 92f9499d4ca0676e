"""One engine, one gateway: what the engine says of itself, who may take it, and what two of them do to each other."""

import asyncio
import random
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.services.bench_fleet import BASE, TUNED, Bench, answer_of
from tests.services.fake_vllm import FakeVllm
from tests.services.virtual_time import in_virtual_time
from vcot.pipeline.errors import CheckpointError, ServerError, SwapError
from vcot.services.gateway.fleet.replica import Supervision
from vcot.services.gateway.swap.claim import Claim, DisownedError, Held, Owner, find_owner, parse_version

LEASE_S = 3.0


class Memory:
    """An engine that is nothing but its weight version; each call takes up to `delay_s`."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.says = "default"
        self.delay_s = delay_s

    async def _come(self) -> None:
        await asyncio.sleep(random.uniform(0, self.delay_s))

    async def version(self) -> str:
        await self._come()
        says = self.says
        await self._come()
        return says

    async def set_version(self, version: str) -> None:
        await self._come()
        self.says = version
        await self._come()


def claim(engine: Any, name: str, lease_s: float = LEASE_S) -> Claim:
    return Claim(engine, Owner(name, f"http://{name}"), lease_s, is_shared=True)


async def beating(owner: Claim) -> None:
    while True:
        await owner.renew()
        await asyncio.sleep(owner.lease_s / 6)


@asynccontextmanager
async def alive(owner: Claim) -> AsyncIterator[None]:
    task = asyncio.create_task(beating(owner))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@in_virtual_time
async def test_a_live_owner_is_named_and_keeps_it() -> None:
    engine = Memory()
    first, second = claim(engine, "first"), claim(engine, "second")
    await first.take()
    async with alive(first):
        with pytest.raises(ServerError, match=r"belongs to the gateway at http://first; stop that one"):
            await second.take()
        await first.tell("sha256:a")
    held = parse_version(engine.says)
    assert held is not None
    assert (held.weights, held.owner) == ("sha256:a", "first")


@in_virtual_time
async def test_a_dead_owners_engine_is_taken_when_its_beat_stood_still_and_not_before() -> None:
    engine = Memory()
    first, second = claim(engine, "first"), claim(engine, "second")
    await first.take()
    dead = time.monotonic()
    await second.take()
    assert time.monotonic() - dead >= LEASE_S
    with pytest.raises(DisownedError, match="belongs to the gateway at http://second now"):
        await first.tell(None)
    assert parse_version(engine.says).owner == "second"  # type: ignore[union-attr]


@in_virtual_time
async def test_an_owner_stops_by_itself_before_its_engine_can_be_taken() -> None:
    engine = Memory()
    first, second = claim(engine, "first"), claim(engine, "second")
    await first.take()
    assert first.is_current
    taking = asyncio.create_task(second.take())
    await asyncio.sleep(0.76 * LEASE_S)
    assert not first.is_current
    assert parse_version(engine.says).owner == "first"  # type: ignore[union-attr]
    await taking


@in_virtual_time
async def test_an_engine_that_is_busy_is_not_taken_for_a_dead_owners() -> None:
    """While it loads it lets nobody read or write: the owner's beat stands still, and so does the other's look at it."""

    class Busy(Memory):
        free_at = 0.0

        async def version(self) -> str:
            await asyncio.sleep(max(0.0, self.free_at - time.monotonic()))
            return self.says

    engine = Busy()
    first, second = claim(engine, "first"), claim(engine, "second")
    await first.take()
    taking = asyncio.create_task(second.take())
    await asyncio.sleep(LEASE_S / 10)
    engine.free_at = time.monotonic() + 1.5 * LEASE_S
    await asyncio.sleep(1.5 * LEASE_S + LEASE_S / 8)  # the other one looks first
    async with alive(first):
        with pytest.raises(ServerError, match="http://first"):
            await taking


@in_virtual_time
async def test_what_was_released_is_taken_at_once() -> None:
    engine = Memory()
    first, second = claim(engine, "first"), claim(engine, "second")
    await first.take()
    await first.release()
    assert engine.says == "default", "as a new process says"
    began = time.monotonic()
    await second.take()
    with pytest.raises(DisownedError):
        await first.tell("sha256:a")
    await first.release()  # it has nothing to release any more
    assert time.monotonic() - began < LEASE_S / 12
    assert parse_version(engine.says).owner == "second"  # type: ignore[union-attr]


@in_virtual_time
async def test_every_telling_and_every_renewal_raises_the_beat() -> None:
    """Others see by it that the owner is alive, whatever it holds."""
    engine, beats = Memory(), list[int]()
    mine = claim(engine, "mine")
    await mine.take()
    for act in (lambda: mine.tell("sha256:a"), mine.renew, lambda: mine.tell("sha256:a"), mine.renew):
        await act()
        held = parse_version(engine.says)
        assert held is not None
        beats.append(held.beat)
        assert held.weights == "sha256:a"
    assert beats == [1, 2, 3, 4]


class Untouched(Memory):
    """An engine that nobody may ask anything now."""

    is_open = False

    async def version(self) -> str:
        assert self.is_open
        return await super().version()

    async def set_version(self, version: str) -> None:
        assert self.is_open
        await super().set_version(version)


@in_virtual_time
async def test_who_never_had_an_engine_or_has_it_alone_lets_go_of_it_without_a_word() -> None:
    engine = Untouched()
    await claim(engine, "other").release()
    alone = Claim(engine, Owner("own", "http://own"), LEASE_S, is_shared=False)
    engine.is_open = True
    await alone.take()
    engine.is_open = False
    await alone.release()


@in_virtual_time
async def test_an_engine_that_does_not_answer_is_let_go_of_all_the_same() -> None:
    """Whether it fails or hangs; a later replica of the same gateway may have it."""

    class Faulty(Memory):
        fault: str | None = None

        async def set_version(self, version: str) -> None:
            if self.fault == "hang":
                await asyncio.Event().wait()
            if self.fault == "fail":
                raise ServerError("no answer")
            await super().set_version(version)

    engine, owner = Faulty(), Owner("run", "http://run")
    for fault in ("fail", "hang"):
        mine = Claim(engine, owner, LEASE_S, is_shared=True)
        await mine.take()
        engine.fault = fault
        async with asyncio.timeout(LEASE_S):
            await mine.release()
        engine.fault = None
    await Claim(engine, owner, LEASE_S, is_shared=True).take()


@in_virtual_time
async def test_a_later_gateway_of_the_same_run_need_not_wait() -> None:
    engine = Memory()
    await claim(engine, "run").take()
    began = time.monotonic()
    await claim(engine, "run").take()
    assert time.monotonic() - began < LEASE_S / 2


@in_virtual_time
async def test_a_claim_is_kept_while_its_owner_is_busy_elsewhere() -> None:
    """As while it reads a large checkpoint, before the engine is asked anything."""
    engine = Memory()
    first, second = claim(engine, "first"), claim(engine, "second")
    await first.take()
    keeping = asyncio.create_task(first.keep())
    await asyncio.sleep(1.5 * LEASE_S)
    assert first.is_current
    with pytest.raises(ServerError, match="http://first"):
        await second.take()
    engine.says = "default"
    await keeping  # it gives up by itself


@in_virtual_time
async def test_a_claim_is_kept_though_its_engine_is_busy_for_a_beat() -> None:
    class Busy(Memory):
        is_busy = False

        async def version(self) -> str:
            if self.is_busy:
                raise ServerError("no answer")
            return await super().version()

    engine = Busy()
    mine = claim(engine, "mine")
    await mine.take()
    keeping = asyncio.create_task(mine.keep())
    engine.is_busy = True
    await asyncio.sleep(LEASE_S / 4)
    engine.is_busy = False
    await asyncio.sleep(LEASE_S)
    assert mine.is_current
    keeping.cancel()


@in_virtual_time
async def test_one_gateway_does_not_take_one_engine_twice() -> None:
    """`localhost` and `127.0.0.1` are two replicas to it."""
    engine, owner = Memory(), Owner("run", "http://run")
    first, second = (Claim(engine, owner, LEASE_S, is_shared=True) for _ in range(2))
    await first.take()
    with pytest.raises(ServerError, match="has that engine already, under another address"):
        await second.take()
    await first.renew()
    await first.release()
    await second.take()


@in_virtual_time
async def test_an_engine_that_is_busy_for_a_moment_is_taken_all_the_same() -> None:
    """The first time it says whose it is too late for that to count."""

    class Busy(Memory):
        async def set_version(self, version: str) -> None:
            if self.says == "default":
                await asyncio.sleep(0.2)
            await super().set_version(version)

    engine = Busy()
    mine = claim(engine, "mine", 3.0)
    await mine.take()
    held = parse_version(engine.says)
    assert held is not None
    assert held.owner == "mine"
    await mine.renew()


@pytest.mark.parametrize("lease_s", [LEASE_S, 4 * LEASE_S])
@in_virtual_time
async def test_who_wrote_too_late_goes_on_only_when_the_owner_that_it_overwrote_knows(lease_s: float) -> None:
    class Late(Memory):
        """Who writes first is there after another one has taken the engine, and just after that one's renewal."""

        is_first = True

        async def set_version(self, version: str) -> None:
            if self.is_first:
                self.is_first = False
                await asyncio.sleep(lease_s / 4)
            await super().set_version(version)

    engine = Late()
    late, owner = claim(engine, "late", lease_s), claim(engine, "owner", lease_s)
    taking = asyncio.create_task(late.take())
    await asyncio.sleep(0)
    await owner.take()
    renewing = asyncio.create_task(beating(owner))
    await taking
    assert renewing.done(), "two gateways load weights into one engine"
    with pytest.raises(DisownedError, match="http://late"):
        await renewing


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("delay_s", "is_prompt"), [(0.008, True), (0.04, False)])
@in_virtual_time
async def test_of_two_that_find_it_free_at_once_one_has_it(delay_s: float, is_prompt: bool, seed: int) -> None:
    """Where the engine is prompt nobody believes to have it while another does; else the others find out as they renew."""
    random.seed(seed)
    engine = Memory(delay_s)
    holders, max_at_once = set[str](), 0

    async def take(name: str) -> None:
        await asyncio.sleep(random.uniform(0, delay_s))
        mine = claim(engine, name, 1.0)
        try:
            await mine.take()
        except ServerError:
            return
        nonlocal max_at_once
        holders.add(name)
        max_at_once = max(max_at_once, len(holders))
        try:
            async with asyncio.timeout(5.0):
                await beating(mine)
        except DisownedError:
            holders.discard(name)
        except TimeoutError:
            pass

    await asyncio.gather(take("a"), take("b"), take("c"))
    assert len(holders) <= 1
    assert max_at_once == 1 or not is_prompt


@pytest.mark.parametrize("arrives", [True, False])
@in_virtual_time
async def test_what_was_told_without_an_answer_may_be_what_it_says(arrives: bool) -> None:
    class Lossy(Memory):
        loses = False

        async def set_version(self, version: str) -> None:
            if arrives or not self.loses:
                self.says = version
            if self.loses:
                raise ServerError("no answer")

    engine = Lossy()
    mine = claim(engine, "mine")
    await mine.take()
    engine.loses = True
    with pytest.raises(ServerError, match="no answer"):
        await mine.tell("sha256:a")
    engine.loses = False
    await mine.renew()
    assert parse_version(engine.says).weights == ("sha256:a" if arrives else None)  # type: ignore[union-attr]
    engine.says = "default"
    with pytest.raises(DisownedError, match="was started anew, or changed by someone else"):
        await mine.renew()


def test_a_copy_of_a_run_is_another_owner(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    own = find_owner(tmp_path / "run", "here")
    later = find_owner(tmp_path / "run", "there")
    assert (own.where, later.where, later.id) == ("here", "there", own.id)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert find_owner(tmp_path / "copy", "here").id != own.id


# Two gateways


@pytest.fixture
async def engine() -> AsyncIterator[FakeVllm]:
    server = FakeVllm(None, weight=BASE)
    server.hold.set()
    yield server
    await server.stop()


@pytest.fixture
async def url(engine: FakeVllm) -> str:
    return await engine.listen()


@pytest.fixture
def watched() -> Iterator[Supervision]:
    return Supervision(health_interval_s=0.05, first_backoff_s=0.05, lease_s=LEASE_S)


def gateway(folder: Path, name: str, url: str, watched: Supervision) -> Bench:
    return Bench(folder / name, upstreams=[url], supervision=watched, owner=Owner(name, f"http://{name}:8100"))


async def test_a_second_gateway_is_refused_and_the_first_serves_on(
    tmp_path: Path, url: str, engine: FakeVllm, watched: Supervision
) -> None:
    first, second = gateway(tmp_path, "first", url, watched), gateway(tmp_path, "second", url, watched)
    second.registry.set_live("policy", "tuned")  # it would load other weights
    async with first.running():
        with pytest.raises(ServerError, match=r"belongs to the gateway at http://first:8100"):
            async with second.running():
                pass
        assert await first.answer() == ("base", answer_of(BASE))
        assert "reload tuned" not in engine.calls
    third = gateway(tmp_path, "third", url, watched)
    async with third.running():  # the first one ended, and let go of it
        assert await third.answer() == ("base", answer_of(BASE))


async def test_two_gateways_at_once_never_both_serve(
    tmp_path: Path, url: str, engine: FakeVllm, watched: Supervision
) -> None:
    first, second = gateway(tmp_path, "first", url, watched), gateway(tmp_path, "second", url, watched)
    second.registry.set_live("policy", "tuned")

    async def serve(bench: Bench) -> bool:
        try:
            async with bench.running():
                for _ in range(10):
                    name, values = await bench.answer()
                    assert values == answer_of({"base": BASE, "tuned": TUNED}[name])
                    await asyncio.sleep(0.1)
        except ServerError:
            return False
        return True

    assert sum(await asyncio.gather(serve(first), serve(second))) == 1


async def test_the_engine_says_what_was_verified_and_nothing_while_that_changes(
    tmp_path: Path, url: str, engine: FakeVllm, watched: Supervision
) -> None:
    bench = gateway(tmp_path, "first", url, watched)
    said: list[str | None] = []

    def weights() -> str | None:
        held = parse_version(engine.version)
        assert held is not None
        return held.weights

    async with bench.running():
        assert weights() == bench.base.ref.digest
        engine.read = lambda _: said.append(weights()) or TUNED
        await bench.swap("policy", "tuned")
        assert said == [None]
        assert weights() == bench.tuned.ref.digest
        engine.fail_next_reload = True
        with pytest.raises(SwapError):
            await bench.swap("policy", "base")
        assert weights() == bench.tuned.ref.digest, "what was brought back is said again"


@pytest.mark.parametrize("version", ["default", "step-7"])
async def test_an_engine_that_says_something_else_is_down_at_once_and_taken_up_again_verified(
    tmp_path: Path, url: str, engine: FakeVllm, watched: Supervision, version: str
) -> None:
    bench = gateway(tmp_path, "first", url, watched)
    async with bench.running():
        await bench.swap("policy", "tuned")
        engine.weight, engine.version = BASE, version  # as a restart leaves it, or someone else's load
        engine.prefixes.clear()
        engine.images.clear()
        await bench.until_so(lambda: bench.admission.phase != "live")
        await bench.until_so(lambda: bench.admission.phase == "live")
        assert await bench.answer() == ("tuned", answer_of(TUNED))
        assert bench.replica.num_restarts >= 1


def test_a_damaged_file_of_who_the_gateway_is_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "gateway.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"gateway.json is not a OwnerFile \(.*\); delete it"):
        find_owner(tmp_path, "here")


async def until_watched(engine: FakeVllm) -> Held:
    """Until the first look at the engine's health is over, which begins at once; the next is ten seconds away."""
    await asyncio.sleep(0.5)
    found = parse_version(engine.version)
    assert found is not None
    return found


async def test_a_gateway_whose_engine_was_taken_loads_nothing_into_it(
    tmp_path: Path, url: str, engine: FakeVllm
) -> None:
    """Between two looks at its health: a swap looks by itself."""
    bench = gateway(tmp_path, "first", url, Supervision(first_backoff_s=0.05, lease_s=12))
    async with bench.running():
        await bench.answer()
        held = await until_watched(engine)
        engine.version = held.model_copy(update={"owner": "other", "where": "http://other"}).model_dump_json()
        with pytest.raises(SwapError, match="http://other"):
            await bench.swap("policy", "tuned")
        await bench.until_so(lambda: bench.admission.phase not in ("live", "swapping"))
        assert "reload tuned" not in engine.calls


async def test_a_gateway_that_cannot_renew_lets_no_request_in(tmp_path: Path, url: str, engine: FakeVllm) -> None:
    """Another one may take the engine soon: the first request after that is refused, without a look at the engine."""
    bench = gateway(tmp_path, "first", url, Supervision(health_interval_s=60, lease_s=LEASE_S))
    async with bench.running():
        assert (await bench.ask()).status_code == 200
        engine.refuses_claims = True
        await asyncio.sleep(LEASE_S)
        num_asked = engine.num_asked
        refused = await bench.ask()
        assert (refused.status_code, refused.json()["error"]["code"]) == (502, "engine_lost")
        assert "another one may have it" in refused.text
        assert engine.num_asked == num_asked


async def test_a_takeover_waits_for_the_requests_that_the_engine_still_works_on(
    tmp_path: Path, url: str, engine: FakeVllm, watched: Supervision
) -> None:
    """Those of the gateway before, whose stamps are its own; the load would mix weights into them."""
    bench = gateway(tmp_path, "first", url, watched)
    bench.registry.set_live("policy", "tuned")
    engine.holds_prefixes = True
    with pytest.raises(ServerError, match="blocks are still held by requests"):
        async with bench.running():
            pass
    assert not any(call.startswith("reload") for call in engine.calls)
