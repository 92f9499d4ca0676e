"""A wait ends at once at what cannot pass by itself."""

import httpx
import pytest

from pipeline.errors import ServerError, UnreachableError
from pipeline.run import open_run
from services.gateway import admin
from services.run import serving


def answer_with(monkeypatch, handle):
    """Every admin call is answered by `handle`."""
    real = httpx.AsyncClient

    def make(**options):
        return real(transport=httpx.MockTransport(handle), timeout=options["timeout"])

    monkeypatch.setattr(admin.httpx, "AsyncClient", make)


def refuse(_):
    raise httpx.ConnectError("refused")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A run that is served, its gateway not up yet."""
    monkeypatch.setattr(serving, "is_served", lambda _: True)
    monkeypatch.setattr(serving, "_read_serving", lambda _: serving.Serving(url="http://127.0.0.1:1", pid=1))
    monkeypatch.setattr(serving, "_POLL_S", 0.01)
    with open_run(tmp_path / "r", "nano", ("serve.start_timeout_s=1",)) as run:
        yield run


async def test_a_gateway_that_refuses_the_key_is_not_waited_for(served, monkeypatch):
    asked = []
    fault = {"error": {"message": "send a key", "type": "t", "param": None, "code": "invalid_api_key"}}
    answer_with(monkeypatch, lambda request: asked.append(request) or httpx.Response(401, json=fault))
    with pytest.raises(ServerError, match="send a key"):
        await serving._until_live(served, lambda _: None, None)
    assert len(asked) == 1


async def test_a_gateway_that_is_not_up_yet_is_waited_for(served, monkeypatch):
    answer_with(monkeypatch, refuse)
    with pytest.raises(UnreachableError, match="does not answer"):
        await admin.fetch_state("http://127.0.0.1:1")
    with pytest.raises(ServerError, match="not ready in time"):
        await serving._until_live(served, lambda _: None, None)
