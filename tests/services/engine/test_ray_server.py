"""vLLM servers on the nodes of a real Ray cluster, all on this machine; the servers are fake ones, each a process."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.services.fake_vllm import install_stub, write_checkpoint
from tests.services.ray_nodes import Nodes, cluster
from vcot.pipeline.errors import MachineError, RecipeError, ServerError
from vcot.services.checkpoints.registry import Registry
from vcot.services.engine.ray_server import RayServer
from vcot.services.gateway.admin import GatewayState, fetch_state, register, swap_to
from vcot.services.recipes.recipe import load_recipe
from vcot.services.run.directory import Run, open_run
from vcot.services.run.serving import running_gateway

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    install_stub(tmp_path / "stub")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"), prepend=os.pathsep)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with cluster() as nodes:
        yield nodes


def begin(tmp_path: Path, *settings: str) -> Run:
    base = write_checkpoint(tmp_path / "base", "seed", 1.0, kind="base")
    common = [f"model.source={base}", "serve.port=0", "serve.gpus_per_replica=0"]
    with open_run(tmp_path / "run", "nano", [*common, *settings]) as opened:
        return opened


async def until(url: str, is_so: Any) -> GatewayState:
    async with asyncio.timeout(90):
        while not is_so(state := await fetch_state(url)):  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.2)
    return state


def num_live(state: GatewayState) -> int:
    return sum(replica.phase == "live" for replica in state.replicas)


@pytest.mark.slow
async def test_servers_are_spread_over_nodes_and_a_lost_nodes_comes_up_elsewhere(nodes: Nodes, tmp_path: Path) -> None:
    """Every request is answered meanwhile, and a swap reaches the server on the other node."""
    nodes.add()
    nodes.add()
    run = begin(tmp_path, f"serve.ray_address={nodes.address}", "serve.replicas=2")
    async with running_gateway(run, print) as gateway:
        await until(gateway.url, lambda state: num_live(state) == 2)
        statuses: list[int] = []
        done = asyncio.Event()

        async def keep_asking() -> None:
            body = {"model": "policy", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
            async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
                while not done.is_set():
                    statuses.append((await client.post(f"{gateway.url}/v1/chat/completions", json=body)).status_code)

        asking = [asyncio.create_task(keep_asking()) for _ in range(4)]
        nodes.add()
        nodes.lose()
        state = await until(gateway.url, lambda state: state.num_restarts > 0 and num_live(state) == 2)
        await register(gateway.url, write_checkpoint(tmp_path / "tuned", "tuned", 2.0))
        assert (await swap_to(gateway.url, "policy", "tuned")).live.name == "tuned"
        done.set()
        await asyncio.gather(*asking)
        assert set(statuses) == {200}
        assert len(statuses) > 20
        state = await fetch_state(gateway.url)
        assert [replica.serves[0].name for replica in state.replicas] == ["tuned", "tuned"]


async def test_a_cluster_without_room_is_said(nodes: Nodes, tmp_path: Path) -> None:
    run = begin(tmp_path, f"serve.ray_address={nodes.address}", "serve.start_timeout_s=3")
    base = Registry(run.directory).base(run.recipe.model)
    server, said = RayServer(base, run.recipe.serve, tmp_path / "vllm.log"), list[str]()
    with pytest.raises(ServerError, match=r"had no free node within serve.start_timeout_s = 3 s; see `ray status`"):
        await server.start(said.append)
    assert said == ["waiting for a free node of the Ray cluster"]


async def test_a_server_that_does_not_start_gives_its_log(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_STUB_MODE", "die")
    nodes.add()
    run = begin(tmp_path, f"serve.ray_address={nodes.address}")
    with pytest.raises(ServerError, match="no such layer"):
        async with running_gateway(run, lambda _: None):
            pytest.fail("nothing serves here")


async def test_no_cluster_is_said(tmp_path: Path) -> None:
    run = begin(tmp_path, "serve.ray_address=127.0.0.1:1")
    with pytest.raises(MachineError, match=r"no Ray cluster answers at serve.ray_address = '127.0.0.1:1'"):
        async with running_gateway(run, lambda _: None):
            pytest.fail("nothing serves here")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("serve.devices=['0']", "with ray_address Ray gives them, as gpus_per_replica says"),
        ("serve.upstreams=['http://127.0.0.1:1']", "give one of the two"),
        ("serve.ray_address=ray://head:10001", "string should match pattern"),
    ],
)
def test_servers_are_in_one_place(setting: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("nano", ["serve.ray_address=auto", setting])
