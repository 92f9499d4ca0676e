"""An evaluation harness that no one here wrote, unmodified, against the gateway over the real vLLM: inspect-ai.

It has an environment of its own: `make test-harness` makes it from requirements/harness.txt and asks for this test.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from vcot.eval.scorer import score_choice
from vcot.eval.statistics import clustered_error
from vcot.pipeline.client import ChatClient
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.prompts import render_prompt
from vcot.pipeline.records import Response, SamplingParams
from vcot.pipeline.sample import Plan, sample
from vcot.pipeline.sources.nano.questions import generate_nano
from vcot.services.gateway.admin import live_checkpoint
from vcot.services.run.directory import open_run
from vcot.services.run.serving import running_gateway

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
TASK = Path(__file__).with_name("harness_task.py")
NUM_QUESTIONS = 45


@pytest.fixture
def inspect() -> Path:
    """The harness's command."""
    command = Path(os.environ.get("VCOT_TEST_HARNESS", "nowhere")).absolute() / "bin" / "inspect"
    if not command.is_file():
        pytest.skip("it needs an environment of its own; ask for it with `make test-harness`")
    return command


async def test_it_finds_the_accuracy_that_we_find(inspect: Path, tmp_path: Path) -> None:
    """The same questions, greedy: every image arrives, every answer is read, every sample names its weights."""
    with open_run(tmp_path / "run", "nano", ["serve.port=0"]) as run:
        tasks = list(generate_nano("validation", NUM_QUESTIONS, 0, run.images))
        rows = [
            {
                "id": task.id,
                "image": str(run.directory / task.images[0].path),
                "prompt": render_prompt("zero_shot", task),
                "target": task.answer_letter,
            }
            for task in tasks
        ]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        async with running_gateway(run, lambda _: None) as gateway:
            live = await live_checkpoint(gateway.url)
            requests = Plan(tasks, "zero_shot", live, SamplingParams(temperature=0.0, max_tokens=64, seed=0))
            async with ChatClient(f"{gateway.url}/v1", "none", max_connections=8) as client:
                await sample(requests, client, run.ledger, run.images, max_concurrency=8, on_progress=lambda _: None)
            log = evaluate(inspect, gateway.url, tmp_path)
        ours = own_scores(run.ledger, requests)
    assert log["status"] == "success"
    theirs = {done["id"]: done["scores"]["pattern"]["value"] == "C" for done in log["samples"]}
    assert theirs == ours
    assert 0.25 < sum(theirs.values()) / NUM_QUESTIONS < 1
    assert {done["output"]["model"] for done in log["samples"]} == {f"base@{live.digest[7:19]}"}


def test_its_clustered_standard_error_is_ours(inspect: Path) -> None:
    """`stderr(cluster=...)` as it is installed, on questions of 1 to 5 an image."""
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(40), rng.integers(1, 6, 40)).tolist()
    values = (rng.random(len(clusters)) < 0.6).astype(float).tolist()
    code = (
        "import json, sys; from inspect_ai.scorer import SampleScore, Score, stderr; given = json.load(sys.stdin); "
        "scores = [SampleScore(score=Score(value=v), sample_metadata={'image': c}) for v, c in zip(*given)]; "
        "print(stderr(cluster='image')(scores))"
    )
    python = inspect.with_name("python")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = json.dumps([values, clusters])
    done = subprocess.run([python, "-c", code], input=told, env=clean, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert clustered_error(values, clusters) == pytest.approx(float(done.stdout), rel=1e-12)


def own_scores(ledger: Ledger, requests: list) -> dict[str, bool]:
    found = ledger.get(Response, [key for request in requests for key in request.response_keys()])
    return {
        request.task.id: score_choice(request.task, found[key]).value == "correct"
        for request in requests
        for key in request.response_keys()
    }


def evaluate(inspect: Path, url: str, folder: Path) -> dict:
    """The harness's own log of its own run."""
    command = [
        str(inspect),
        "eval",
        TASK.name,
        "-T",
        f"data={folder / 'data.jsonl'}",
        "--model",
        "openai-api/vcot/policy",
    ]
    command += [
        "--log-dir",
        str(folder / "log"),
        "--log-format",
        "json",
        "--display",
        "plain",
        "--max-connections",
        "8",
    ]
    environment = {"VCOT_BASE_URL": f"{url}/v1", "VCOT_API_KEY": "none"}
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, env=clean | environment, cwd=TASK.parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (log,) = (folder / "log").glob("*.json")
    return json.loads(log.read_text("utf-8"))
