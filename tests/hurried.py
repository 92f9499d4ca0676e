"""An event loop for tests of what waits (`pytest.mark.hurried`): it skips the time in which nothing happens."""

import asyncio
import selectors

_IDLE_S = 0.02
"""So long a thread or a socket may take to be heard before the clock moves on."""


class _Selector(selectors.DefaultSelector):
    skipped_s = 0.0

    def select(self, timeout=None):
        if timeout is None or timeout <= _IDLE_S:
            return super().select(timeout)
        if not (events := super().select(_IDLE_S)):
            self.skipped_s += timeout - _IDLE_S
        return events


class HurriedLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self._skipping = _Selector()
        super().__init__(self._skipping)

    def time(self):
        return super().time() + self._skipping.skipped_s
