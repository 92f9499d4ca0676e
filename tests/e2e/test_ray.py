"""A run on a Ray cluster of several nodes, with real vLLM servers: one node is lost while it samples."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ledgers import count_good, read_responses
from tests.services.ray_nodes import Nodes, cluster
from vcot.pipeline.records import Judgment, Response

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_TASKS, K = 48, 8
SETTINGS = [
    "serve.port=0",
    "serve.replicas=2",
    "serve.gpus_per_replica=0",
    f"tasks.num_tasks={NUM_TASKS}",
    f"sample.k={K}",
    "sample.max_concurrency=2",  # so that the loss finds it sampling
]


def test_a_lost_nodes_work_is_done_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the account is whole: each response was asked for once, and none is missing or there twice."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    run, total = tmp_path / "run", NUM_TASKS * K
    with cluster() as nodes:
        nodes.add()
        nodes.add()
        command = [sys.executable, "-m", "vcot.services.cli", "sample", "--run", str(run), "--recipe", "nano", "--set"]
        with subprocess.Popen(
            [*command, *SETTINGS, f"serve.ray_address={nodes.address}"], stderr=subprocess.PIPE, text=True
        ) as process:
            said = finish_without_a_node(process, nodes, lambda: run.is_dir() and len(read_responses(run)) >= 4 * K)
    assert f"{total} requested = {total} ok + 0 cached" in said
    responses = read_responses(run)
    assert len({response.key for response in responses}) == len(responses) == total
    assert "starting it again in" in (run / "logs" / "gateway.log").read_text()


def start(step: str, run: Path, *settings: str) -> subprocess.Popen[str]:
    """A step of the run whose servers and whose clients are on the cluster's nodes."""
    command = [
        sys.executable,
        "-m",
        "vcot.services.cli",
        step,
        "--run",
        str(run),
        "--recipe",
        "nano",
        "--engine",
        "ray",
    ]
    return subprocess.Popen([*command, "--set", *SETTINGS, *settings], stderr=subprocess.PIPE, text=True)


def finish_without_a_node(process: subprocess.Popen[str], nodes: Nodes, is_under_way: Callable[[], bool]) -> str:
    """What the command says to its end, a node being lost once it is under way."""
    while process.poll() is None and not is_under_way():
        time.sleep(0.1)
    assert process.poll() is None
    nodes.lose()
    said = process.communicate()[1]
    sys.stderr.write(said)
    assert process.returncode == 0, said
    return said


def finish(step: str, run: Path, *settings: str) -> str:
    with start(step, run, *settings) as process:
        said = process.communicate()[1]
    sys.stderr.write(said)
    assert process.returncode == 0, said
    return said


def test_a_run_whose_clients_are_on_the_nodes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is killed while it samples; the next one loses a node, and every record is there once all the same."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    run, total = tmp_path / "run", NUM_TASKS * K
    with cluster() as nodes:
        for _ in range(2):
            nodes.add()
        cluster_is = f"serve.ray_address={nodes.address}"
        with start("sample", run, cluster_is) as process:
            while process.poll() is None and count_good(run, Response) < 4 * K:
                time.sleep(0.1)
            process.kill()
            process.communicate()
        kept = count_good(run, Response)
        assert 4 * K <= kept < total
        with start("sample", run, cluster_is) as process:
            said = finish_without_a_node(process, nodes, lambda: count_good(run, Response) >= kept + 4 * K)
        assert f"{total} requested = " in said
        assert " failed" not in said
        responses = read_responses(run)
        assert len({response.key for response in responses}) == len(responses) == total
        assert f"{total} requested = {total} ok + 0 cached" in finish("judge", run, cluster_is)
        assert count_good(run, Judgment) == total
        said = finish("eval", run, cluster_is, "eval.num_tasks=24")
        assert "; nodes that ask: 1" in said
    assert not list((run / "shards").iterdir())
