import json
from pathlib import Path

import pytest

from tests.services.bench_fleet import Bench
from vcot.pipeline.errors import CheckpointError
from vcot.services.engine.serve_section import ServeSection
from vcot.services.gateway.fleet.roster import Roster

URL = "http://127.0.0.1:7"


def servers(roster: Roster) -> tuple[int, tuple[str, ...]]:
    return roster.now.num_own, roster.now.upstreams


def test_without_changes_it_is_the_recipes(tmp_path: Path) -> None:
    assert servers(Roster(tmp_path, ServeSection(replicas=3))) == (3, ())
    assert servers(Roster(tmp_path, ServeSection(replicas=3, upstreams=[URL, URL]))) == (0, (URL,))
    assert not list(tmp_path.iterdir())


def test_changes_outlive_the_gateway_until_the_recipe_says_otherwise(tmp_path: Path) -> None:
    roster = Roster(tmp_path, ServeSection())
    roster.add(None)
    roster.add(URL)
    roster.remove(None)
    assert servers(Roster(tmp_path, ServeSection(max_queued=1))) == servers(roster) == (1, (URL,))
    Roster(tmp_path, ServeSection()).remove(URL)
    assert servers(Roster(tmp_path, ServeSection())) == (1, ())
    assert servers(Roster(tmp_path, ServeSection(replicas=2))) == (2, ())


@pytest.mark.parametrize("text", ["", "{}", '{"recipe": 1}', json.dumps({"recipe": {}, "now": {"num_own": "x"}})])
def test_a_file_that_is_damaged_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "replicas.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"replicas.json is not a ReplicaRoster .* delete it"):
        Roster(tmp_path, ServeSection())


async def test_a_gateway_comes_back_with_the_replicas_that_it_had(tmp_path: Path) -> None:
    bench = Bench(tmp_path, replicas=2)
    async with bench.running():
        assert (await bench.http.post("/admin/replicas", json={})).status_code == 202
        await bench.until("live", bench.fleet.replicas[-1])
        await bench.http.delete("/admin/replicas/vllm-0")
        await bench.http.delete("/admin/replicas/vllm-1")
    assert servers(Roster(tmp_path / "run", bench.settings)) == (1, ())
