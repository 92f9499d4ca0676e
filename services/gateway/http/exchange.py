"""One request and its answer, as what is logged and counted of it comes together. No text of either, and no key."""

from __future__ import annotations

import random
import re
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from starlette.types import Scope

_KEY = "vcot.exchange"
_SAFE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


@dataclass
class Exchange:
    """Lives in the ASGI scope; mutated by whoever learns something, on one task at a time."""

    request_id: str = ""
    model: str | None = None
    """What was asked for."""
    refused: str | None = None
    """Why the gateway itself said no."""
    began: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first_byte: float | None = None
    status: int | None = None
    """None where nothing was answered."""
    checkpoint: str = ""
    """Name of what the answer is stamped with; empty where it is not."""
    replica: str | None = None
    """Who was asked last."""
    bytes_in: int = 0
    bytes_out: int = 0
    is_whole: bool = False
    """Whether the answer was sent to its end."""


class Ended(NamedTuple):
    """What is counted of a request that is over."""

    route: str
    status: int
    checkpoint: str
    """Name of what the answer is stamped with; empty where it is not."""
    refused: str | None
    """Why the gateway itself said no."""
    first_byte_s: float | None
    """From its arrival to its answer's begin."""
    total_s: float


def exchange_of(scope: Scope) -> Exchange:
    """The exchange of a request."""
    exchange = scope.get(_KEY)
    if exchange is None:
        exchange = scope[_KEY] = Exchange()
    assert isinstance(exchange, Exchange)
    return exchange


def choose_request_id(given: str | None) -> str:
    """The client's own id if it can stand in a header and a log, or a new one."""
    return given if given is not None and _SAFE_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"
