"""Questions with one image, two and none go through sampling, judging, pairs, training, merging and the gate together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from vcot.pipeline.images import ImageStore
from vcot.pipeline.sources.nano.questions import generate_nano

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
COLUMNS = 'tasks.columns={choices = "options", id = "id"}'


def write_table(folder, number=90):
    """Nano's questions, of which each third has another question's image too, and each third none."""
    tasks = list(generate_nano("train", number, 5, ImageStore(folder)))
    rows = []
    for place, (task, other) in enumerate(zip(tasks, tasks[1:] + tasks[:1], strict=True)):
        shown = [each.images[0].path for each in (task, other)][: (1, 2, 0)[place % 3]]
        asked = {"id": task.id, "question": task.question, "options": task.choices, "answer": task.answer}
        rows.append(json.dumps(asked | {"image": shown}))
    (folder / "mine.jsonl").write_text("\n".join(rows))
    return folder / "mine.jsonl"


def vcot(command, run, *settings, expect=0):
    line = [sys.executable, "-m", "vcot.services.cli", command, "--run", str(run), "--recipe", "nano"]
    line += [part for setting in settings for part in ("--set", setting)]
    environment = os.environ | {"NO_COLOR": "1", "COLUMNS": "300", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_loop_takes_questions_with_one_image_two_and_none(tmp_path):
    table, run = write_table(tmp_path), tmp_path / "run"
    settings = [
        "tasks.source=table",
        f"tasks.path={table}",
        COLUMNS,
        "tasks.num_tasks=90",
        "serve.port=0",
        "train.epochs=1",
    ]
    settings += [
        "pairs.validation_fraction=0.3",
        "eval.num_tasks=12",
        "eval.prompts=['cot']",
        "eval.temperatures=[0.4]",
    ]
    refused = vcot("run", run, *settings, expect=2)
    assert "has 2 images, and serve.max_images is 1; raise it" in refused
    said = vcot("run", run, *settings, "serve.max_images=2")
    assert (
        "table: 90 questions of 6 words on average, about 90 images (30 without one); 90 with options, 90 with" in said
    )
    assert "720 requested = 720 ok + 0 cached" in said
    assert "agree within" in said
    (pairs,) = (run / "pairs").iterdir()
    rows = [row for name in ("train", "validation") for row in pq.read_table(pairs / f"{name}.parquet").to_pylist()]
    shown = Counter(len(row["images"]) for row in rows)
    assert min(shown[1], shown[2]) > 0
    for row in rows:
        places = [part["type"] for part in row["prompt"][0]["content"]]
        assert places == ["image"] * len(row["images"]) + ["text"]
    (preflight,) = (run / "training").glob("*/preflight.json")
    assert json.loads(preflight.read_text())["train"]["refused"] == []
