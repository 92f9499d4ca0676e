"""A crew on a real Ray cluster of several nodes on this machine; what is asked answers from this process."""

import asyncio
import subprocess
from pathlib import Path

import pytest

from tests.services.ray_nodes import Nodes, cluster
from tests.services.run.deterministic_server import OpenGateway, serving, wait_for
from tests.services.run.test_sharding import Bench, K
from vcot.pipeline.errors import MachineError
from vcot.services.engine.serve_section import ServeSection
from vcot.services.run.crew import RayCrew
from vcot.services.run.engines import Sharded

pytestmark = pytest.mark.timeout(300)
SECRET = "sk-never-to-be-written-4711"


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def nodes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with cluster() as nodes:
            for _ in range(2):
                nodes.add()
            yield nodes


class RayBench(Bench):
    """A bench whose crew is Ray's."""

    def __init__(self, directory: Path, server, nodes: Nodes, num_tasks: int) -> None:
        super().__init__(directory, server, num_tasks=num_tasks)
        self.crew = RayCrew(ServeSection(ray_address=nodes.address), directory / "logs" / "ray.log")
        self.sharded = Sharded(self.run, OpenGateway(server), self.told.append, self.crew)


def holds(folder: Path, text: str) -> bool:
    """Whether a file below it holds the text."""
    return subprocess.run(["grep", "-rqs", "-D", "skip", text, str(folder)], check=False).returncode == 0


@pytest.mark.slow
async def test_a_lost_nodes_shards_are_done_elsewhere(tmp_path, server, nodes, monkeypatch) -> None:
    """The ledger is that of one process, each record once; keys reach the nodes, and no file."""
    monkeypatch.setenv("VCOT_API_KEY", SECRET)
    one, many = Bench(tmp_path / "one", server, num_tasks=48), RayBench(tmp_path / "many", server, nodes, num_tasks=48)
    expected = await one.sample(one.here)
    server.delay_s, server.keys = 0.2, set()
    sampling = asyncio.create_task(many.sample())
    await asyncio.to_thread(wait_for, lambda: server.asked.total() >= 48 + 8)
    assert not sampling.done()
    await asyncio.to_thread(nodes.lose)
    assert await sampling == expected
    assert many.responses() == one.responses()
    assert len(many.responses()) == 48 * K
    assert many.shard_files == []
    assert server.keys == {SECRET}
    assert not holds(many.run.directory, SECRET)
    assert not holds(Path(nodes.session), SECRET)
    await many.sharded.close()


async def test_no_cluster_is_said(tmp_path, server) -> None:
    crew = RayCrew(ServeSection(ray_address="127.0.0.1:1"), tmp_path / "logs" / "ray.log")
    with pytest.raises(MachineError, match=r"no Ray cluster answers at serve.ray_address = '127.0.0.1:1'"):
        await crew.muster()
    await crew.close()
