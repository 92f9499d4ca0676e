"""Trackers get the curves, the gap and the settings, in a run of the job's own, without any network."""

import json
import sqlite3
from contextlib import nullcontext

import pytest

from vcot.pipeline.errors import MachineError
from vcot.services.recipes.recipe import load_recipe
from vcot.training.protocol.job import JOB, STATUS, TrainJob, TrainStatus, read_record
from vcot.training.protocol.launch import check_installed
from vcot.training.worker import jobs

pytestmark = pytest.mark.filterwarnings("ignore")  # the trackers' own


def test_trackio_holds_the_gap_under_the_checkpoints_name(make_job, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio")
    job = make_job('train.report_to=["trackio"]', "train.epochs=1")
    assert jobs.main([str(job)]) == 0
    (database,) = tmp_path.glob("vcot*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, metrics FROM metrics").fetchall()
        settings = json.loads(connection.execute("SELECT config FROM configs").fetchone()[0])
    assert {name for name, _ in rows} == {read_record(job / JOB, TrainJob).checkpoint_name}
    assert any("eval/gap" in json.loads(metrics) for _, metrics in rows)
    assert settings["beta"] == 0.1
    assert settings["peft_config"]["default"]["r"] == 64


def test_each_job_of_a_process_has_a_wandb_run_of_its_own(make_job, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    jobs = [make_job('train.report_to=["wandb"]', "train.epochs=1", f"train.seed={seed}") for seed in (1, 2)]
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert jobs.main([str(job) for job in jobs]) == 0
    runs = {path.name.rsplit("-", 1)[1] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert runs == {read_record(job / JOB, TrainJob).key[:16] for job in jobs}


def test_a_missing_tracker_is_said_before_anything_is_loaded(make_job, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    job = make_job('train.report_to=["wandb"]')
    assert jobs.main([str(job)]) == 2
    assert "needs the package wandb" in capsys.readouterr().err
    assert read_record(job / STATUS, TrainStatus).exit_code == 2


@pytest.mark.parametrize("login", [{"WANDB_API_KEY": "k"}, {"WANDB_MODE": "offline"}, {"NETRC": "netrc"}, {}])
def test_wandb_without_a_key_is_said_before_anything_is_sampled(monkeypatch, tmp_path, login):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k\n")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETRC", "none")
    for name, value in login.items():
        monkeypatch.setenv(name, value)
    train = load_recipe("nano", ['train.report_to=["wandb"]']).train
    with nullcontext() if login else pytest.raises(MachineError, match="set WANDB_API_KEY, or WANDB_MODE=offline"):
        check_installed(train)
