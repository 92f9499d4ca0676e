"""Our files in others' hands: TRL as its documentation shows it, and last year's libraries in an environment of their own.

`make test-older` makes that environment from requirements/older.txt and asks for the tests that need it. What is read is
what the pipeline made: pairs as published, and adapters and merged checkpoints of both bundled models.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_dataset

from vcot.pipeline.identity import read_manifest
from vcot.training.merge import merging
from vcot.training.protocol.job import ADAPTER, JOB, TrainJob, read_record, write_record
from vcot.training.worker import jobs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
HERE = Path(__file__).parent
BUNDLED = Path(__file__).parents[2] / "training" / "checkpoints"
CLASSES = {"nano": "LlavaForConditionalGeneration", "nano-qwen": "Qwen3VLForConditionalGeneration"}
TOLERANCE = 1e-4
"""Of a float32 log-prob by one version of transformers and torch's kernels, and by another."""


@pytest.fixture(scope="session")
def older() -> Path:
    """The Python of the environment with older versions."""
    python = Path(os.environ.get("VCOT_TEST_OLDER", "nowhere")).absolute() / "bin" / "python"
    if not python.is_file():
        pytest.skip("it needs an environment of its own; ask for it with `make test-older`")
    return python


def run(python, script, *arguments):
    """What the script printed last, as JSON."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [str(python), "-P", str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def pairs(pairs_of):
    return pairs_of(8, 4)[0]


@pytest.fixture(scope="module")
def checkpoints(make_job, tmp_path_factory):
    """Of each bundled model: base, merged checkpoint, and the adapter as trained and as `vcot merge --adapter` has it."""
    out, made = tmp_path_factory.mktemp("made"), {}
    for name, model_class in CLASSES.items():
        job = make_job(
            "train.learning_rate=1e-3",
            "train.lora_r=4",
            "train.epochs=1",
            num_train=4,
            num_validation=2,
            base=BUNDLED / name,
        )
        jobs.work(job, out / name)
        record = read_record(job / JOB, TrainJob)
        alone = record.merge.model_copy(update={"serve_as": "adapter"})
        write_record(job / JOB, record.model_copy(update={"merge": alone}))
        assert merging.main([str(job), str(out / f"{name}-adapter")]) == 0
        adapters = {"trained": str(job / ADAPTER), "alone": str(out / f"{name}-adapter")}
        made[name] = {
            "class": model_class,
            "base": str(BUNDLED / name),
            "merged": str(out / name),
            "adapters": adapters,
        }
    return made


@pytest.fixture(scope="module")
def found(older, pairs, checkpoints, tmp_path_factory):
    """What the older versions read."""
    folder = tmp_path_factory.mktemp("older")
    files = {"pairs": str(pairs), "checkpoints": checkpoints, "cache": str(folder / "cache")}
    (folder / "files.json").write_text(json.dumps(files))
    return run(older, "read_files.py", folder / "files.json")


def test_they_are_older(found):
    assert (found["versions"]["datasets"][:2], found["versions"]["transformers"][:5]) == ("3.", "4.57.")


def test_older_datasets_reads_the_same_rows_and_images(found, pairs, tmp_path):
    ours = {
        name: [
            {**row, "images": [[image.mode, hashlib.sha256(image.tobytes()).hexdigest()] for image in row["images"]]}
            for row in split
        ]
        for name, split in load_dataset(str(pairs), cache_dir=str(tmp_path)).items()
    }
    assert {name: len(rows) for name, rows in ours.items()} == {"train": 8, "validation": 4}
    assert found["pairs"] == {"folder": ours, "files": ours}


@pytest.mark.parametrize("name", CLASSES)
def test_older_transformers_and_peft_answer_as_the_manifest_says(found, checkpoints, name):
    seen, files = found["checkpoints"][name], checkpoints[name]
    assert seen["same_tokenizer"]
    for kind, directory in (("base", files["base"]), ("merged", files["merged"])):
        canary, answer = read_manifest(Path(directory)).canary, seen["answers"][kind]
        assert answer["prompt"] == list(canary.prompt_tokens)
        assert answer["tokens"] == list(canary.tokens)
        assert answer["logprobs"] == pytest.approx(canary.logprobs, abs=TOLERANCE)
    base, merged = (seen["answers"][kind]["logprobs"] for kind in ("base", "merged"))
    assert base != pytest.approx(merged, abs=10 * TOLERANCE), "the merged checkpoint is not its base"
    whole = ["trained", "alone"] if name == "nano-qwen" else ["alone"]
    for kind in whole:
        assert seen["missing"][kind] == []
        assert seen["answers"][kind]["tokens"] == seen["answers"]["merged"]["tokens"]
        assert seen["answers"][kind]["logprobs"] == pytest.approx(merged, abs=TOLERANCE)


def test_an_adapter_under_the_names_of_transformers_5_is_not_taken_for_whole_and_its_card_says_so(found, checkpoints):
    """Of LLaVA as trained, last year's PEFT leaves the tower's part out, with a warning; `vcot merge --adapter` has all."""
    (warning,) = found["checkpoints"]["nano"]["missing"]["trained"]
    assert "vision_tower" in warning
    card = (Path(checkpoints["nano"]["adapters"]["trained"]) / "README.md").read_text()
    assert "`vcot merge --adapter`" in card


def test_older_hub_library_reads_the_cards(found):
    assert found["cards"].keys() == {f"{name} {kind}" for name in CLASSES for kind in ("merged", "trained", "alone")}
    for name, card in found["cards"].items():
        assert card["library_name"] == ("transformers" if name.endswith("merged") else "peft")
        assert card["pipeline_tag"] == "image-text-to-text"


def trains(python, checkpoint, pairs, out):
    """Two steps and an evaluation: the first loss is log 2, and what is learned shows in pairs that were held out."""
    seen = run(python, "train_with_trl.py", checkpoint, pairs, out)
    assert seen["losses"][0] == pytest.approx(0.6931, abs=1e-3)
    assert len(seen["losses"]) == 2
    assert seen["held_out"][-1] < 0.69


@pytest.mark.slow  # each commit's `make test-older` runs it
def test_trl_trains_on_the_published_pairs(pairs, tmp_path):
    trains(sys.executable, BUNDLED / "nano", pairs, tmp_path / "out")


def test_older_trl_trains_the_merged_checkpoint_on_the_published_pairs(older, pairs, checkpoints, tmp_path):
    trains(older, checkpoints["nano"]["merged"], pairs, tmp_path / "out")
