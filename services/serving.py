"""Serving a run: the process that answers at one URL, and how other commands find or start it. SKELETON, signatures final."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.records import CheckpointRef
from pipeline.run import Run

Progress = Callable[[str], None]
"""Takes one short line on what is being waited for; called again with the same text is normal."""


@dataclass(frozen=True)
class GatewayHandle:
    """A live gateway of a run."""

    url: str
    """For example http://127.0.0.1:8100; the OpenAI API is under /v1."""
    started_here: bool
    """Whether this command started it (and stops it at exit)."""


@dataclass(frozen=True)
class Swapped:
    """What a swap did."""

    live: CheckpointRef
    pause_s: float
    """How long no request was answered; 0 where the checkpoint was live already."""


async def serve(run: Run, progress: Progress) -> None:
    """Serve the run until SIGINT or SIGTERM: the gateway in this process, vLLM supervised as a child."""
    raise NotImplementedError


@asynccontextmanager
async def running_gateway(run: Run, progress: Progress) -> AsyncIterator[GatewayHandle]:
    """The run's live gateway: the one that serves already, or a child started here and stopped at exit."""
    raise NotImplementedError
    yield


async def swap_to(url: str, alias: str, name: str) -> Swapped:
    """Make checkpoint `name` live and point `alias` at it. Raises SwapError, CheckpointError or ServerError."""
    raise NotImplementedError


async def register(url: str, directory: Path) -> CheckpointRef:
    """Register a checkpoint directory with a running gateway. Raises CheckpointError."""
    raise NotImplementedError


async def live_checkpoint(url: str) -> CheckpointRef:
    """The checkpoint that answers now. Raises ServerError where none is live."""
    raise NotImplementedError
