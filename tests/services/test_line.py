"""Who waits, in which order they go, and how often anyone looks."""

import asyncio

import pytest

from services.checkpoints.registry import Checkpoint
from services.gateway.fleet.admission import Admission
from services.gateway.fleet.line import Line


async def test_a_line_lets_in_one_after_the_other_and_wakes_nobody_else() -> None:
    line, places, looked, entered = Line(lambda: None), 0, 0, list[int]()

    def is_free() -> bool:
        nonlocal looked
        looked += 1
        return places > len(entered)

    async def enter(number: int) -> None:
        assert await line.wait("policy", is_free, 5.0)
        entered.append(number)

    waiting = [asyncio.create_task(enter(number)) for number in range(100)]
    await asyncio.sleep(0)
    for places in range(1, 101):  # noqa: B007 - read by is_free
        line.look()
        for _ in range(4):
            await asyncio.sleep(0)
    await asyncio.gather(*waiting)
    assert entered == list(range(100)), "first come, first served"
    assert looked < 4 * 100, "not everyone at each change"


async def test_what_is_far_off_holds_up_nobody_who_wishes_for_something_else() -> None:
    left = list[bool]()
    line = Line(lambda: left.append(True))
    far = asyncio.create_task(line.wait("far", lambda: False, 0.1))
    near = asyncio.create_task(line.wait("near", lambda: True, 5.0))
    assert await near
    assert (line.has("far"), line.has("near"), left) == (True, False, [True])
    assert not await far
    assert (line.waiting, left) == (frozenset(), [True, True])


@pytest.mark.parametrize("gone", [0, 1])
async def test_who_gives_up_holds_up_nobody(gone: int) -> None:
    line, is_open = Line(lambda: None), False
    waiting = [asyncio.create_task(line.wait("policy", lambda: is_open, 5.0)) for _ in range(3)]
    await asyncio.sleep(0)
    is_open = True
    line.look()
    waiting[gone].cancel()
    async with asyncio.timeout(1):
        ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert [end is True for end in ends] == [number != gone for number in range(3)]


def checkpoint_of(digest: str) -> Checkpoint:
    class Held:
        class ref:  # noqa: N801
            pass

    Held.ref.digest = digest  # type: ignore[attr-defined]
    return Held  # type: ignore[return-value]


def go_live(admission: Admission) -> None:
    admission.move("live", "", checkpoint_of("d"))


def test_a_ramp_begins_small_and_grows_with_what_leaves() -> None:
    admission = Admission()
    go_live(admission)
    let_in = []
    for _ in range(7):
        let_in.append(0)
        while admission.has_room and let_in[-1] < 1000:
            admission.admit("d")
            let_in[-1] += 1
        for _ in range(min(let_in[-1], admission.in_flight)):
            admission.leave("d")
    assert let_in == [8, 16, 32, 64, 128, 256, 1000]


def test_a_ramp_ends_with_its_time_and_a_drain_that_was_given_up_begins_none() -> None:
    admission = Admission()
    go_live(admission)
    admission.end_ramp()
    assert not admission.is_ramping
    admission.move("draining", "")
    admission.move("live", "")
    assert not admission.is_ramping, "the engine has its caches"
    admission.move("draining", "")
    admission.move("swapping", "")
    go_live(admission)
    assert admission.is_ramping
    admission.move("dead", "")
    assert not admission.is_ramping
