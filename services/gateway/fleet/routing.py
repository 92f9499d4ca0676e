"""Which replica answers a request: the one that has seen its image, unless that one is busier than the others. Pure.

Rendezvous hashing (Thaler and Ravishankar 1998) of the image over the replicas that could answer, with bounded loads
(Mirrokni, Thorup and Zadimoghaddam 2018): the k samples and the judge's calls on one image meet a warm cache, no replica has
more than `_BOUND` times the mean load, and when one goes only its images move. A request without an image goes to the
least loaded.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from hashlib import blake2b
from math import ceil
from typing import Any, Protocol, TypeVar

_BOUND = 1.25
_TAIL = 4096
"""Bytes of a data URL that tell images apart; the whole of it would cost more than it saves."""


class Loaded(Protocol):
    """What can be chosen."""

    @property
    def name(self) -> str:
        """Distinct among the candidates."""

    @property
    def in_flight(self) -> int:
        """Requests that it works on."""


T = TypeVar("T", bound=Loaded)


def choose(candidates: Sequence[T], key: int | None) -> T:
    """One of `candidates` (at least one) for a request whose image has that key."""
    if key is None:
        return min(candidates, key=lambda candidate: candidate.in_flight)
    most = ceil(_BOUND * (sum(candidate.in_flight for candidate in candidates) + 1) / len(candidates))
    ranked = sorted(candidates, key=lambda candidate: _weight(key, candidate.name), reverse=True)
    return next(candidate for candidate in ranked if candidate.in_flight < most)


def _weight(key: int, name: str) -> bytes:
    return blake2b(f"{key} {name}".encode(), digest_size=8).digest()


def image_key(request: dict[str, Any]) -> int | None:
    """A key of the request's first image; None where it has none, or is no chat."""
    messages = request.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            image = part.get("image_url") if isinstance(part, dict) else None
            url = image.get("url") if isinstance(image, dict) else image
            if isinstance(url, str):
                return zlib.crc32(url[-_TAIL:].encode("utf-8", "replace")) << 32 | len(url)
    return None
