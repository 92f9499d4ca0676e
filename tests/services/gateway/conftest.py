"""What tests of the gateway share."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.services.bench_fleet import CUSTOM, Bench


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """A gateway before one fake vLLM."""
    async with Bench(tmp_path).running() as bench:
        yield bench


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Bench]:
    """A gateway before two; requests without an image go to the first while both are idle."""
    async with Bench(tmp_path, replicas=2).running() as pair:
        yield pair


@pytest.fixture(params=[False, True], ids=["one-process", "worker"])
def split_too(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test twice: the second time a worker carries the requests, whose line to the deciding process is a real one."""
    CUSTOM.is_split = request.param
    yield
    CUSTOM.is_split = False
