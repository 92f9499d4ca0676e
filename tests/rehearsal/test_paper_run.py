"""The paper's run, rehearsed: `vcot run --recipe paper` with only counts and lengths shortened, on two cores.

What is real: vLLM, TRL, the gateway and every command; LLaVA-1.5's tokenizer, processor, template and files, found as a hub
model at the recipe's commit, offline; questions of both data sets as the hub holds them. What is not: the weights (random,
narrow) and OpenAI (tests/rehearsal/openai_api.py). So it says whether the run would work, and nothing of what a
model learns.

The tests of this file are one story on one run directory, and run in their order.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.hub_cache import write_snapshot
from tests.ledgers import count_good, read_responses
from vcot.eval.benchmark import find_benchmark
from vcot.pipeline.identity import verify_checkpoint
from vcot.pipeline.images import ImageStore
from vcot.pipeline.records import Judgment, Response
from vcot.pipeline.sources import load_tasks
from vcot.pipeline.sources.aokvqa import AOKVQA
from vcot.pipeline.sources.scienceqa import SCIENCEQA
from vcot.services.recipes.recipe import load_recipe

DATA = Path(__file__).parents[3] / "shared" / "data"
HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.rehearsal,
    pytest.mark.timeout(480),
    pytest.mark.skipif(not (DATA / "llava-1.5-7b-hf").is_dir(), reason="../shared/data/llava-1.5-7b-hf is absent"),
]

NUM_TASKS, K, NUM_QUESTIONS = 12, 8, 8
SHORTENED = {
    "serve.port=0": "any free port",
    "serve.max_model_len=1024": "576 image tokens, a prompt and an answer of 48",
    f"tasks.num_tasks={NUM_TASKS}": "of 17,056",
    "sample.max_tokens=48": "what random weights say is no better for being long",
    "judge.base_url={api}": "the simulated API",
    "judge.max_unjudged=0.3": "it refuses a tenth, so that each kind of refusal is among so few",
    "train.batch_size=2": "few pairs, and yet several updates",
    "train.gradient_accumulation=1": "the same",
    "train.epochs=1": "of 2",
    "train.num_evaluations=1": "of 10",
    "train.learning_rate=2e-4": "the few updates are to move the policy as far as 560 at 1e-5 would",
    f"eval.num_tasks={NUM_QUESTIONS}": "of 2,017",
    "eval.max_tokens=48": "as for sampling",
}
"""All that differs from the paper's recipe, and why."""
REFUSALS = ("refusal", "filter", "filter_400", "length")


@dataclass(frozen=True)
class World:
    """A machine without a network that holds everything the run needs."""

    home: Path
    """HF_HOME."""
    api: str
    """Flaky, with limits by the minute, and with every fault of an item."""
    poor_api: str
    """Its quota is spent after 20 answers."""

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "VLLM_"))}
        return kept | {"HF_HOME": str(self.home), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "sk-rehearsal"}

    def command(self, run: Path, more: Sequence[str], api: str = "") -> list[str]:
        overrides = [*(override.format(api=api or self.api) for override in SHORTENED), *more]
        line = [sys.executable, "-m", "vcot.services.cli", "run", "--recipe", "paper", "--run", str(run)]
        return [*line, "--set", *overrides]

    def run(self, run: Path, *more: str) -> str:
        """The command to its end, its progress printed as it comes; what it said."""
        said = []
        with subprocess.Popen(
            self.command(run, more), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=self.environment
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                said.append(line)
                sys.stderr.write(line)
        assert process.returncode == 0, "".join(said[-30:])
        return "".join(said)

    def asked(self) -> Counter[str]:
        """What the API counted."""
        with urllib.request.urlopen(f"{self.api.removesuffix('/v1')}/stats") as answer:
            return Counter(json.load(answer))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    from tests.rehearsal import hub_data, shapes

    home, paper = tmp_path_factory.mktemp("hf"), load_recipe("paper")
    assert paper.model.revision
    assert paper.tasks.revision
    assert paper.eval.revision
    model = shapes.llava_files(DATA / "llava-1.5-7b-hf")
    questions, benchmark = hub_data.aokvqa_files(DATA / "aokvqa", 40), hub_data.scienceqa_files(DATA / "scienceqa", 40)
    write_snapshot(home / "hub", "model", paper.model.source, paper.model.revision, model)
    write_snapshot(home / "hub", "dataset", AOKVQA.hub_name, paper.tasks.revision, questions)
    write_snapshot(home / "hub", "dataset", SCIENCEQA.hub_name, paper.eval.revision, benchmark)
    faults = [f"{kind}={share}" for kind, share in (("flaky", 0.1), ("fence", 0.1), *((k, 0.03) for k in REFUSALS))]
    with (
        simulated(home, "latency_s=0.3", "tokens_per_min=250000", faults=faults) as api,
        simulated(home, "latency_s=0.05", faults=["quota_after=20"]) as poor_api,
    ):
        yield World(home, api, poor_api)


@contextmanager
def simulated(home: Path, *settings: str, faults: Sequence[str]) -> Iterator[str]:
    """The URL of a simulated API in a process of its own."""
    line = [sys.executable, str(HERE / "openai_api.py")]
    line += [part for setting in settings for part in ("--set", setting)]
    line += [part for fault in faults for part in ("--fault", fault)]
    with (
        (home / "openai.log").open("a") as errors,
        subprocess.Popen(line, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=HERE.parents[1]) as api,
    ):
        assert api.stdout is not None
        try:
            yield api.stdout.readline().strip()
        finally:
            api.terminate()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paper") / "run"


def accounts(said: str) -> list[tuple[int, ...]]:
    """requested, ok, cached, failed and refused of each stage, as printed."""
    found = re.findall(r"(\d+) requested = (\d+) ok \+ (\d+) cached(?: \+ (\d+) failed)?(?: \+ (\d+) refused)?", said)
    return [tuple(int(part or 0) for part in account) for account in found]


def check_outcome(run: Path, said: str, kind: str, num_adapted: int) -> dict[str, Any]:
    """What every run must have come to; the policy's row of the results."""
    for requested, *parts in accounts(said):
        assert requested == sum(parts), said
        assert parts[2] == 0, "nothing failed"
    (page,) = re.findall(r"report: (\S+/index\.html);", said)
    rows = json.loads(Path(page).with_name("results.json").read_text())["results"]
    asked = {(prompt, temperature) for prompt in ("zero_shot", "cot") for temperature in (0.4, 0.8)}
    for which in ("base", kind):
        ours = [row for row in rows if row["checkpoint"]["kind"] == which]
        assert {(row["prompt"], row["temperature"]) for row in ours} == asked
        assert {(row["num_scored"], row["num_failed"]) for row in ours} == {(NUM_QUESTIONS, 0)}
    policy = next(row["checkpoint"] for row in rows if row["checkpoint"]["kind"] == kind)
    base = next(row["checkpoint"] for row in rows if row["checkpoint"]["kind"] == "base")
    assert policy["parent"] == base["digest"] != policy["digest"]
    manifest = verify_checkpoint(run / "checkpoints" / policy["name"])
    assert manifest.checkpoint.digest == policy["digest"]
    assert manifest.canary is not None
    assert f"{num_adapted} modules adapted" in said
    assert f"{policy['name']} is live at" in said, "it was swapped in, its canary asked"
    (parity,) = (run / "parity").glob(f"{policy['digest'].removeprefix('sha256:')[:12]}-float16.json")
    assert json.loads(parity.read_text())["dtype"] == "float16", "what the paper's recipe serves in"
    assert policy["name"] in Path(page).read_text()
    return policy


def stamped(run: Path) -> Counter[str]:
    """Responses by the digest of the weights that gave them."""
    return Counter(response.checkpoint.digest for response in read_responses(run))


def test_the_official_layouts_hold_the_same_questions_as_the_hub(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.rehearsal import hub_data

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(world.home / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    paper, store = load_recipe("paper"), ImageStore(tmp_path)
    official = {
        "tasks": hub_data.write_official_aokvqa(DATA / "aokvqa", tmp_path / "okvqa", 40),
        "eval": hub_data.write_official_scienceqa(DATA / "scienceqa", tmp_path / "science", 40),
    }
    for section, folder in (
        (paper.tasks, official["tasks"]),
        (find_benchmark(paper.eval).tasks(paper.eval, "test"), official["eval"]),
    ):
        hub = load_tasks(section, tmp_path / "hub", store)
        files = load_tasks(section.model_copy(update={"path": str(folder)}), tmp_path / "files", store)
        assert len(hub) > 20
        plain = [{(t.question, t.choices, t.answer, t.subject, t.picture) for t in ts} for ts in (hub, files)]
        assert plain[0] == plain[1]


def test_a_spent_quota_stops_the_run_before_anything_is_made_of_the_part(world: World, run: Path) -> None:
    command = world.command(run, (), world.poor_api)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=world.environment, check=False)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(r"exceeded your current quota.*the same command goes on", last), last
    assert 0 < count_good(run, Judgment) <= 20 + load_recipe("paper").judge.max_concurrency, "and what was in flight"
    assert not (run / "pairs").exists()
    assert not (run / "training").exists()


def test_dpo_killed_while_it_judges_is_finished_by_the_same_command(world: World, run: Path) -> None:
    before = count_good(run, Judgment)
    with subprocess.Popen(world.command(run, ()), stdout=subprocess.DEVNULL, env=world.environment) as process:
        while count_good(run, Judgment) < before + NUM_TASKS and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
    kept = count_good(run, Judgment)
    assert count_good(run, Response) == NUM_TASKS * K
    assert kept < NUM_TASKS * K

    said = world.run(run)
    num_responses = NUM_TASKS * K
    assert (num_responses, 0, num_responses, 0, 0) in accounts(said), "no response is asked for twice"
    (judged,) = [account for account in accounts(said) if account[0] == num_responses and account[4]]
    assert count_good(run, Judgment) == num_responses - judged[4], "each has a verdict, or was refused for good"
    asked = world.asked()
    num_limited = asked["429 rate_limit_exceeded"]
    assert num_limited <= load_recipe("paper").judge.max_concurrency, "its pace is kept"
    in_flight = load_recipe("paper").judge.max_concurrency
    assert asked["repeats"] <= in_flight + num_limited, "at most what was in flight is paid for again"
    policy = check_outcome(run, said, "merged", num_adapted=160)
    assert "float16 (" in said, "merged in the checkpoint's own type"
    assert stamped(run)[policy["digest"]] == 4 * NUM_QUESTIONS
    check_pairs(run)


def check_pairs(run: Path) -> None:
    (folder,) = (run / "pairs").iterdir()
    table = pq.read_table(folder / "train.parquet")
    assert {"images", "prompt", "chosen", "rejected"} <= set(table.column_names)
    assert 2 <= len(table) <= NUM_TASKS
    for row in table.to_pylist():
        assert row["chosen"] != row["rejected"]


def test_the_same_command_again_asks_for_nothing_and_starts_nothing(world: World, run: Path) -> None:
    before, asked = (run / "report" / "results.json").read_text(), world.asked()
    said = world.run(run)
    assert world.asked() == asked
    assert all(requested == cached for requested, _, cached, _, refused in accounts(said) if not refused)
    assert "by vLLM" not in said
    assert (run / "report" / "results.json").read_text() == before


def test_mdpo_goes_on_from_the_same_judgments(world: World, run: Path) -> None:
    asked, responses = world.asked()["calls"], count_good(run, Response)
    said = world.run(run, "train.method=mdpo")
    assert world.asked()["calls"] == asked
    assert count_good(run, Response) == responses + 4 * NUM_QUESTIONS, "the policy's answers to the benchmark"
    assert check_outcome(run, said, "merged", num_adapted=160)["name"].startswith("mdpo-")


def test_an_adapter_is_served_beside_its_base(world: World, run: Path) -> None:
    asked = world.asked()["calls"]
    said = world.run(run, "train.method=dpo", "merge.serve_as=adapter", "train.target_modules=language-model")
    assert world.asked()["calls"] == asked
    check_outcome(run, said, "adapter", num_adapted=14)
    assert "(adapter) after a pause of" in said


def test_another_family_by_its_structure(world: World, tmp_path: Path) -> None:
    """Qwen2.5-VL: window attention, M-RoPE, as many image tokens as an image's shape asks for, ChatML without BOS."""
    from tests.rehearsal import shapes

    model = shapes.save_qwen2_5_vl(tmp_path / "qwen2.5-vl")
    run = tmp_path / "run"
    said = world.run(run, f'model.source="{model}"', "model.revision=")
    check_outcome(run, said, "merged", num_adapted=26)
