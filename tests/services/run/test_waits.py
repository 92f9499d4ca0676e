"""A wait for the run's gateway ends at once at what cannot pass by itself."""

import fcntl
from contextlib import contextmanager

import pytest

from tests.services.gateway.test_strangers import answering
from vcot.pipeline.errors import ServerError, UnreachableError
from vcot.pipeline.files import write_record
from vcot.services.gateway import admin
from vcot.services.run.announcement import Serving, is_served
from vcot.services.run.directory import open_run
from vcot.services.run.serving import running_gateway

NOBODY = "http://127.0.0.1:1"
REFUSED = '{"error": {"message": "send a key", "type": "t", "param": null, "code": "invalid_api_key"}}'


@pytest.fixture
def run(tmp_path):
    with open_run(tmp_path / "r", "nano", ("serve.start_timeout_s=1",)) as run:
        yield run


@contextmanager
def served(run, url):
    """As by a gateway that holds the run, and says that it is at `url`."""
    with run.path("serving.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_record(run.path("serving.json"), Serving(url=url, pid=1))
        assert is_served(run)
        yield lock


async def wait(run):
    async with running_gateway(run, lambda _: None):
        pytest.fail("nothing serves here")


async def test_a_gateway_that_refuses_the_key_is_not_waited_for(run):
    async with answering((401, REFUSED, "application/json")) as (url, asked):
        with served(run, url), pytest.raises(ServerError, match="send a key"):
            await wait(run)
    assert len(asked) == 1


async def test_a_gateway_that_is_not_up_yet_is_waited_for(run):
    with pytest.raises(UnreachableError, match="does not answer"):
        await admin.fetch_state(NOBODY)
    with served(run, NOBODY), pytest.raises(ServerError, match="not ready in time"):
        await wait(run)
