"""Where a request goes, where it goes after each fault, and what it is told when nobody is left: without the bytes."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.services.bench_fleet import Bench
from tests.services.fake_vllm import write_checkpoint
from vcot.services.gateway.fleet import rest
from vcot.services.gateway.fleet.ends import EngineFault
from vcot.services.gateway.fleet.replica import Replica, Supervision
from vcot.services.gateway.http.answers import Refusal
from vcot.services.gateway.http.dispatch import Dispatcher
from vcot.services.gateway.http.metrics import Metrics
from vcot.services.gateway.http.suspects import hash_of
from vcot.services.gateway.http.ticket import Ask
from vcot.services.gateway.swap import rollout


def dispatcher_of(bench: Bench, max_wait_s: float = 5.0) -> Dispatcher:
    return Dispatcher(bench.fleet, Metrics(bench.fleet, bench.slots.places), max_wait_s)


def ask_for(model: str = "policy", expect: str | None = None, image: int | None = None) -> Ask:
    return Ask(model, expect, image, lambda: hash_of(b"{}"))


def fault(reason: str = "500", *, is_broken: bool | None = False) -> EngineFault:
    return EngineFault(reason, "it failed", is_broken=is_broken, retry_after="7" if reason == "429" else None)


async def refusal_of(dispatcher: Dispatcher, ask: Ask) -> Refusal:
    with pytest.raises(Refusal) as caught:
        async with dispatcher.ticket(ask) as ticket:
            await ticket.assign()
    return caught.value


async def fail_everywhere(
    dispatcher: Dispatcher, ask: Ask, make_fault: Callable[[], EngineFault]
) -> tuple[list[str], Refusal]:
    """The replicas that were asked, each of which fails, and what the client is told then."""
    asked: list[str] = []

    async def keep_failing() -> None:
        async with dispatcher.ticket(ask) as ticket:
            assigned = await ticket.assign()
            while assigned is not None:
                asked.append(assigned.replica)
                assigned = await ticket.fail(make_fault())

    with pytest.raises(Refusal) as caught:
        await keep_failing()
    return asked, caught.value


async def test_a_request_is_with_its_engine_until_it_is_answered_or_given_up(bench: Bench) -> None:
    dispatcher, replica = dispatcher_of(bench), bench.replica
    async with dispatcher.ticket(ask_for()) as ticket:
        assigned = await ticket.assign()
        assert (assigned.replica, assigned.life, assigned.ref) == (replica.name, replica.life, bench.base.ref)
        assert assigned.endpoint == replica.upstream.endpoint
        assert replica.in_flight == 1
        ticket.answered()
        assert replica.in_flight == 0
    async with dispatcher.ticket(ask_for()) as ticket:
        await ticket.assign()
        assert replica.in_flight == 1
    assert replica.in_flight == 0


@pytest.mark.parametrize(
    ("replicas", "image", "reason", "is_broken", "num_asked", "num_other", "told"),
    [
        (1, None, "500", False, 2, 1, (422, "request_failed", None)),
        (1, 7, "500", False, 4, 1, (422, "request_failed", None)),
        (1, 7, "500", True, 1, 1, (502, "engine_lost", "5")),
        (1, None, "lost", False, 2, 1, (502, "engine_lost", "5")),
        (1, None, "429", False, 1, 1, (429, "engine_full", "7")),
        (3, None, "500", False, 2, 2, (422, "request_failed", None)),
        (3, 7, "500", False, 4, 2, (422, "request_failed", None)),
        (3, 7, "500", True, 2, 2, (502, "engine_lost", "5")),
        (3, None, "429", False, 3, 3, (429, "engine_full", "7")),
    ],
)
async def test_as_many_are_asked_as_may_help(
    tmp_path: Path,
    replicas: int,
    image: int | None,
    reason: str,
    is_broken: bool,
    num_asked: int,
    num_other: int,
    told: tuple[int, str, str | None],
) -> None:
    async with Bench(tmp_path, replicas=replicas).running() as bench:
        dispatcher = dispatcher_of(bench)
        began = time.monotonic()
        asked, refused = await fail_everywhere(
            dispatcher, ask_for(image=image), lambda: fault(reason, is_broken=is_broken)
        )
        assert (len(asked), len(set(asked))) == (num_asked, num_other)
        assert (refused.status, refused.code, refused.headers.get("retry-after")) == told
        assert "it failed" in str(refused)
        assert time.monotonic() - began >= 0.2 * (num_asked - num_other), "the same one is not asked again at once"
        figures = dispatcher.metrics.render().decode()
        assert f'vcot_engine_faults_total{{reason="{reason}",replica="{asked[0]}"}}' in figures
        if num_asked > 1:
            assert f'vcot_retries_total{{reason="{reason}"}} {num_asked - 1}.0' in figures
        assert [replica.in_flight for replica in bench.fleet.replicas] == [0] * replicas


async def test_what_has_begun_is_asked_of_nobody_else(pair: Bench) -> None:
    async with dispatcher_of(pair).ticket(ask_for()) as ticket:
        await ticket.assign()
        assert await ticket.fail(EngineFault("lost", "it broke off", has_begun=True)) is None
        assert [replica.in_flight for replica in pair.fleet.replicas] == [0, 0]


@pytest.mark.parametrize(("is_sick", "was_sent"), [(False, True), (True, True), (True, False)])
async def test_an_engine_is_asked_how_it_is_and_only_a_sick_one_is_held_against(
    tmp_path: Path, is_sick: bool, was_sent: bool
) -> None:
    """Against the engine, and against the request where that had come so far."""
    bench = Bench(tmp_path, supervision=Supervision(health_interval_s=60.0, lease_s=360.0))
    async with bench.running():
        await asyncio.sleep(0.1)  # the first look at its health is over, and the next one is far
        dispatcher, bench.server.is_sick = dispatcher_of(bench), is_sick
        for _ in range(5):
            asked, refused = await fail_everywhere(
                dispatcher, ask_for(), lambda: EngineFault("lost", "it broke off", was_sent=was_sent)
            )
            assert (len(asked), refused.code) == (1 if is_sick else 2, "engine_lost")
            assert dispatcher.suspects.are_there == (is_sick and was_sent)
        assert bench.replica.breaker.state == ("open" if is_sick else "closed")


async def test_an_answer_speaks_for_the_request_and_for_the_engine(bench: Bench) -> None:
    dispatcher = dispatcher_of(bench)
    bench.server.is_sick = True
    for _ in range(2):
        await fail_everywhere(dispatcher, ask_for(), lambda: EngineFault("lost", "it broke off"))
    assert dispatcher.suspects.are_there
    bench.server.is_sick = False
    async with dispatcher.ticket(ask_for()) as ticket:
        await ticket.assign()
        ticket.answered()
    assert not dispatcher.suspects.are_there
    for _ in range(4):
        await fail_everywhere(dispatcher, ask_for(), lambda: fault(is_broken=True))
    assert bench.replica.breaker.state == "closed", "an answer came since the first two"


async def test_an_image_keeps_its_replica(pair: Bench) -> None:
    dispatcher, found = dispatcher_of(pair), []
    for image in [*range(12)] * 2:
        async with dispatcher.ticket(ask_for(image=image)) as ticket:
            found.append((await ticket.assign()).replica)
    assert found[:12] == found[12:]
    assert len(set(found)) == 2


async def test_where_an_image_goes_after_a_fault_goes_by_the_image_too(tmp_path: Path) -> None:
    async with Bench(tmp_path, replicas=3).running() as bench:
        dispatcher, found = dispatcher_of(bench), set[tuple[str, str]]()
        for image in range(12):
            async with dispatcher.ticket(ask_for(image=image)) as ticket:
                first, second = await ticket.assign(), await ticket.fail(fault())
                assert second is not None
                found.add((first.replica, second.replica))
        assert len(found) > 3, "the second is not told by the first alone"


async def test_a_request_that_tells_nothing_of_a_sick_engine_lets_the_next_one_try_it(bench: Bench) -> None:
    dispatcher, breaker, now = dispatcher_of(bench), bench.replica.breaker, time.monotonic()
    breaker.clock = lambda: now
    for _ in range(5):
        await fail_everywhere(dispatcher, ask_for(), lambda: fault(is_broken=True))
    assert (await refusal_of(dispatcher, ask_for())).code == "unavailable"
    now += 60
    async with dispatcher.ticket(ask_for()) as ticket:
        await ticket.assign()
        assert (await refusal_of(dispatcher, ask_for())).code == "unavailable", "one at a time"
    asked, _ = await fail_everywhere(dispatcher, ask_for(), fault)
    assert (len(asked), breaker.allows) == (2, True)


def lose(replica: Replica) -> None:
    """Its engine is one that others may take, and its claim has run out."""
    replica.upstream.claim.is_shared, replica.upstream.claim.lease_s = True, 0.0


async def test_an_engine_that_may_be_another_gateways_is_not_asked(pair: Bench) -> None:
    first, second = pair.fleet.replicas
    dispatcher = dispatcher_of(pair)
    lose(first)
    async with dispatcher.ticket(ask_for()) as ticket:
        assert (await ticket.assign()).replica == second.name
    assert f'faults_total{{reason="not_owned",replica="{first.name}"}} 1.0' in dispatcher.metrics.render().decode()
    lose(second)
    refused = await refusal_of(dispatcher, ask_for())
    assert (refused.status, refused.code) == (502, "engine_lost")


async def test_after_a_fault_a_request_waits_for_the_swap_that_began(bench: Bench) -> None:
    async with dispatcher_of(bench).ticket(ask_for()) as ticket:
        await ticket.assign()
        swap = asyncio.create_task(bench.swap("policy", "tuned"))
        await bench.until("draining")
        assigned = await ticket.fail(fault())
        assert assigned is not None
        assert assigned.ref == bench.tuned.ref
        ticket.answered()
        await swap


async def test_a_request_whose_engine_goes_down_is_told_to_come_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, supervision=Supervision(first_backoff_s=60.0))
    async with bench.running():
        async with dispatcher_of(bench).ticket(ask_for()) as ticket:
            await ticket.assign()
            bench.server.died.set()
            await bench.until("dead")
            with pytest.raises(Refusal) as caught:
                await ticket.fail(fault())
        refused = caught.value
        assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "unavailable", "5")
        assert "no checkpoint is live" in str(refused)


async def test_a_request_waits_for_a_swap_as_long_as_it_may(bench: Bench) -> None:
    async with dispatcher_of(bench).ticket(ask_for()) as ticket:
        await ticket.assign()
        swap = asyncio.create_task(bench.swap("policy", "tuned"))
        await bench.until("draining")
        refused = await refusal_of(dispatcher_of(bench, max_wait_s=0.02), ask_for())
        assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "unavailable", "5")
        assert "swapping base for tuned" in str(refused)
        ticket.answered()
    await swap


async def test_what_nobody_serves_is_refused_with_what_is_live(bench: Bench) -> None:
    dispatcher, base = dispatcher_of(bench), bench.base.ref
    stamped = {"content-type": "application/json", "x-vcot-checkpoint": "base", "x-vcot-digest": base.digest}
    unknown = await refusal_of(dispatcher, ask_for("nobody"))
    assert (unknown.status, unknown.code, unknown.headers) == (404, "model_not_found", {})
    other = await refusal_of(dispatcher, ask_for("tuned"))
    assert (other.status, other.code, other.headers) == (409, "checkpoint_not_live", stamped)
    assert "tuned was asked for, but base is live" in str(other)
    assert "`vcot swap policy tuned`" in str(other)
    bench.registry.set_live("mine", "tuned")
    assert "mine means tuned, but base is live" in str(await refusal_of(dispatcher, ask_for("mine")))
    bench.registry.set_live("policy", "base")
    unexpected = await refusal_of(dispatcher, ask_for(expect=bench.tuned.ref.digest))
    assert (unexpected.status, unexpected.code, unexpected.headers) == (409, "weights_not_live", stamped)
    async with dispatcher.ticket(ask_for(expect=base.digest)) as ticket:
        assert (await ticket.assign()).ref == base


async def test_what_waits_for_a_trial_or_a_rest_is_told_so_and_when_to_come_again(bench: Bench, tmp_path: Path) -> None:
    dispatcher = dispatcher_of(bench)
    tried = await rollout.try_out(bench.fleet, write_checkpoint(tmp_path / "made", "made", 3.0))
    refused = await refusal_of(dispatcher, ask_for())
    assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "checkpoint_on_trial", "5")
    async with dispatcher.ticket(ask_for("made", tried.live.digest)) as ticket:
        assert (await ticket.assign()).ref == tried.live
    assert (await refusal_of(dispatcher, ask_for("tuned"))).code == "checkpoint_not_live"
    await rest.rest(bench.fleet, "sleep", 60.0)
    refused = await refusal_of(dispatcher, ask_for())
    assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "resting", "60")
    assert "the servers rest" in str(refused)


async def test_whoever_listens_is_told_each_life_that_ended(bench: Bench) -> None:
    ended: list[str] = []
    dispatcher_of(bench).on_end(ended.append)
    life = bench.replica.life
    bench.server.died.set()
    await bench.until_so(lambda: ended == [life])
