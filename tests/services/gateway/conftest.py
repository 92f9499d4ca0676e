"""What tests of the gateway share."""

from collections.abc import Iterator

import pytest

from tests.services.bench_fleet import CUSTOM


@pytest.fixture(params=[False, True], ids=["one-process", "worker"])
def split_too(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test twice: the second time a worker carries the requests, whose line to the deciding process is a real one."""
    CUSTOM.is_split = request.param
    yield
    CUSTOM.is_split = False
