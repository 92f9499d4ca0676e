"""A gateway elsewhere is never started, and never steered where it cannot be seen whose it is."""

import pytest

from tests.services.fake_vllm import write_checkpoint
from vcot.pipeline.report import Warned
from vcot.services.checkpoints.registry import Registry
from vcot.services.run.directory import open_run
from vcot.services.run.gateways import GatewayElsewhere, OwnGateway, make_gateway
from vcot.services.run.session import Session
from vcot.services.run.steps import swap_stage


@pytest.fixture
def make(tmp_path):
    """A session of a new run with these settings, and what it tells."""
    base, told = write_checkpoint(tmp_path / "base", "base", 1.0, kind="base"), []

    def make(*settings):
        with open_run(tmp_path / "run", "nano", [f"model.source={base}", *settings]) as run:
            return Session(run, told.append), told

    return make


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://127.0.0.1:1/", "http://127.0.0.1:1/v1"])
async def test_the_one_that_the_recipe_names_is_used_as_it_is(make, url):
    session, _ = make(f"serve.url={url}")
    assert isinstance(session.gateway, GatewayElsewhere)
    assert await session.gateway.open() == session.gateway.find() == "http://127.0.0.1:1"
    assert not session.gateway.ends_with_us


async def test_one_that_does_not_answer_keeps_its_alias_and_ends_no_run(make, tmp_path):
    session, told = make("serve.url=http://127.0.0.1:1")
    made = session.registry.register(write_checkpoint(tmp_path / "made", "made", 2.0))
    await swap_stage(session, made)
    [warned] = [event.text for event in told if isinstance(event, Warned)]
    assert warned.startswith("policy is left as it was, since ")
    assert "`vcot swap` moves it by hand" in warned
    assert "policy" not in session.registry.aliases()


async def test_the_runs_own_knows_its_registry_and_is_not_started_for_that(make, tmp_path):
    session, _ = make()
    own = session.gateway
    assert isinstance(own, OwnGateway)
    await own.register(write_checkpoint(tmp_path / "made", "made", 2.0))
    assert [info.checkpoint.name for info in await own.list()] == ["made"]
    assert (await own.show("made")).checkpoint == (await own.retire("made"))
    assert await own.list() == []
    assert (own.find(), own.ends_with_us) == (None, False)
    await own.close()


def test_a_gateway_is_not_opened_by_being_chosen(make, tmp_path):
    session, told = make("serve.url=http://127.0.0.1:1")
    assert make_gateway(session.run, Registry(tmp_path), told.append).find() == "http://127.0.0.1:1"
    assert not told
