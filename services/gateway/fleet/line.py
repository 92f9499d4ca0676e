"""Requests that wait to be let in: first come, first served among those that wish for the same.

Model: when something changes the first of each queue looks whether its time has come, and nobody else does. Whoever leaves,
however that happens, has the next two look. So a swap that ends wakes as many as can go in, soon all of them, and at each
change there is one look in vain, or two for each that went in; and what waits for something that is far off holds up nobody
who wishes for something else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable
from itertools import chain, islice


class Line:
    """Used on one event loop. `on_leave` is called as each one leaves."""

    def __init__(self, on_leave: Callable[[], None]) -> None:
        self._queues: dict[Hashable, deque[asyncio.Event]] = {}
        self._on_leave = on_leave

    @property
    def waiting(self) -> frozenset[asyncio.Event]:
        """Those who wait, as something to tell them apart by."""
        return frozenset(chain.from_iterable(self._queues.values()))

    def has(self, wish: Hashable) -> bool:
        """Whether someone waits for that, so that whoever comes now waits behind."""
        return wish in self._queues

    def look(self) -> None:
        """Something changed."""
        for queue in self._queues.values():
            queue[0].set()

    async def wait(self, wish: Hashable, is_time: Callable[[], bool], max_wait_s: float) -> bool:
        """Return whether one's turn came and `is_time` said so within `max_wait_s`.

        What is done then without waiting for anything is done before the next one looks.
        """
        queue, woken = self._queues.setdefault(wish, deque()), asyncio.Event()
        if not queue:
            woken.set()
        queue.append(woken)
        try:
            async with asyncio.timeout(max_wait_s):
                await woken.wait()
                while not is_time():
                    woken.clear()
                    await woken.wait()
        except TimeoutError:
            return False
        else:
            return True
        finally:
            queue.remove(woken)
            for following in islice(queue, 2):
                following.set()
            if not queue:
                del self._queues[wish]
            self._on_leave()
