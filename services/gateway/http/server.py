"""uvicorn's server, for those who handle signals themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn


class UnsignalledServer(uvicorn.Server):
    """Takes no signals: uvicorn's own handling raises them again before its caller has put things away."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield
