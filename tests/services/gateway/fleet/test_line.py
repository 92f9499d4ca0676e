"""Who waits, in which order they go, and how often anyone looks."""

import asyncio

import pytest

from vcot.services.gateway.fleet.line import Line


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
