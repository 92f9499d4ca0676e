"""Another architecture by its recipe alone: the whole loop with the nano-Qwen, real vLLM and real TRL."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vcot.pipeline.identity import read_manifest
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.engine.command import SERVED_NAME
from vcot.services.engine.vllm import VllmServer
from vcot.services.gateway.swap.canary_check import canary_request, explain_difference, parse_canary
from vcot.services.recipes.recipe import load_recipe
from vcot.training.protocol.agreement import TOLERANCES

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = ["serve.port=0", "tasks.num_tasks=24", "eval.num_tasks=18", "eval.temperatures=[0.8]"]
SHORT = ["train.epochs=1", "train.num_evaluations=1"]
NANO_QWEN = Path(__file__).parents[2] / "training/checkpoints/nano-qwen"
GUESSED_STRINGS = "different from the detected format 'string'"
"""What vLLM's log says where it would have handed the template strings, had it not been told."""


@pytest.fixture(autouse=True)
def whole_logs(monkeypatch):
    """Whatever imported TRL in this process has told vLLM to log errors only."""
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)


def test_the_loop_with_the_nano_qwen(tmp_path):
    command = [
        sys.executable,
        "-m",
        "vcot.services.cli",
        "run",
        "--recipe",
        "nano-qwen",
        "--run",
        str(tmp_path / "run"),
    ]
    done = subprocess.run([*command, "--set", *SMALL, *SHORT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "192 requested = 192 ok" in done.stderr
    assert "is live at" in done.stderr, "the policy was swapped in, its canary asked"
    rows = json.loads((tmp_path / "run" / "report" / "results.json").read_text())["results"]
    assert {(row["checkpoint"]["kind"], row["prompt"]) for row in rows} == {
        (kind, prompt) for kind in ("base", "merged") for prompt in ("zero_shot", "cot")
    }
    assert len({row["checkpoint"]["digest"] for row in rows}) == 2
    assert all(row["num_scored"] == 18 and row["num_failed"] == 0 for row in rows)
    (parity,) = (tmp_path / "run" / "parity").glob("*.json")
    assert max(json.loads(parity.read_text())["max_abs_logp"].values()) < 1e-4
    logs = "".join(path.read_text() for path in (tmp_path / "run").rglob("vllm*.log"))
    assert "INFO" in logs
    assert GUESSED_STRINGS not in logs, "a server that is not told how to read the template reads it rightly, too"


async def test_a_template_that_vllm_takes_for_one_of_strings_is_given_parts(tmp_path):
    """With the parts under another name than `content` vLLM would put a line break behind the image."""
    checkpoint = shutil.copytree(NANO_QWEN, tmp_path / "renamed")
    template = checkpoint / "chat_template.jinja"
    renamed = template.read_text().replace("set content", "set parts").replace("in content", "in parts")
    template.write_text(renamed)
    manifest = read_manifest(checkpoint)
    serve = load_recipe("nano-qwen").serve
    server = VllmServer(Checkpoint(checkpoint, manifest), serve, tmp_path / "vllm.log")
    try:
        await server.start(lambda _: None)
        async with server.endpoint.client(60.0) as client:
            asked = await client.post(
                "/v1/chat/completions", json=canary_request(manifest.canary, SERVED_NAME, TOLERANCES[serve.dtype])
            )
        answer = parse_canary(asked.json())
    finally:
        await server.stop()
    assert explain_difference(manifest.canary, answer, TOLERANCES[serve.dtype]) is None
    assert GUESSED_STRINGS in server.log.read_text(), "the template is one that vLLM misreads"
