"""A clock that runs as fast as the test: for what waits for seconds and reads nothing but its own memory."""

import asyncio
import functools
import selectors
import time
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

import pytest

P = ParamSpec("P")


class _Clock(selectors.DefaultSelector):
    """Where nothing is ready, it is later at once. Without a timer either, the test would never end, and fails."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("every task waits for something that no task and no timer brings about")
        if not ready and timeout:
            self.now += timeout
        return ready


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run the test on a loop of its own, whose seconds take no time; `time.monotonic` is that clock meanwhile."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        clock = _Clock()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: clock.now)
            with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(clock)) as runner:
                runner.run(test(*args, **kwargs))

    return run
