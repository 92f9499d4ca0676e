"""What tests of the gateway share."""

import pytest

from tests.services.bench_fleet import Bench


@pytest.fixture(params=[False, True], ids=["one-process", "worker"])
def split_too(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test twice: the second time a worker carries the requests, whose line to the deciding process is a real one."""
    monkeypatch.setattr(Bench, "always_split", request.param)
