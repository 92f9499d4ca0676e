"""Following the trainer worker: a real process, told jobs that it cannot do (the e2e tests train for real)."""

import asyncio
import json

import pytest

from vcot.pipeline.errors import InputError, ServerError
from vcot.pipeline.files import write_record
from vcot.pipeline.records import CheckpointRef
from vcot.services.jobs import trainer
from vcot.services.recipes.recipe import load_recipe
from vcot.training.protocol.job import ADAPTER, PROGRESS, STATUS, TrainJob, TrainProgress, TrainStatus, read_status


def make_job(base_path):
    recipe = load_recipe("nano")
    return TrainJob(
        base=CheckpointRef(name="base", digest="sha256:" + "a" * 64, kind="base"),
        base_path=str(base_path),
        pairs_path="nowhere",
        pairs_digest="d",
        train=recipe.train,
        merge=recipe.merge,
    )


async def test_the_workers_sentence_becomes_the_commands_error(tmp_path):
    with pytest.raises(InputError, match=r"nothing-here does not exist"):
        await trainer.train(make_job(tmp_path / "nothing-here"), tmp_path / "job", lambda *_: None)
    assert read_status(tmp_path / "job").state == "failed"


@pytest.mark.parametrize("name", ["training", "pipeline"])
async def test_a_worker_imports_nothing_from_the_folder_that_a_command_is_given_in(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w'); raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="has no trained adapter"):
        await trainer.merge(make_job(tmp_path), tmp_path, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


async def test_a_merge_without_an_adapter_is_said(tmp_path):
    with pytest.raises(InputError, match="has no trained adapter"):
        await trainer.merge(make_job(tmp_path), tmp_path, tmp_path / "out")


async def test_a_worker_that_says_nothing_leaves_its_last_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; print('out of luck'); sys.stdout.flush(); import os; os._exit(3)"
    )
    with pytest.raises(ServerError, match=r"ended with 3; the last lines of(.|\n)*out of luck"):
        await trainer.merge(make_job(tmp_path), tmp_path, tmp_path / "out")


async def test_a_job_that_is_done_starts_no_process(tmp_path, monkeypatch):
    async def never(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", never)
    (tmp_path / ADAPTER).mkdir()
    write_record(tmp_path / STATUS, TrainStatus(state="done", num_steps=3))
    assert (await trainer.train(make_job(tmp_path), tmp_path, lambda *_: None)).num_steps == 3


def test_a_progress_line_that_is_being_written_is_left_for_later(tmp_path):
    point = TrainProgress(kind="train", step=1, num_steps=2, epoch=0.5, loss=0.7, elapsed_s=1.0)
    whole = point.model_dump_json()
    (tmp_path / PROGRESS).write_text(f"{whole}\n{whole[: len(whole) // 2]}")
    assert trainer.read_progress(tmp_path) == [point]
    assert json.loads(whole)["loss"] == 0.7
