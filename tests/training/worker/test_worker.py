"""The worker's files: what is complete, where it goes on, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from vcot.pipeline.errors import InputError
from vcot.pipeline.files import write_record
from vcot.training.protocol.job import (
    ADAPTER,
    JOB,
    PREFLIGHT,
    PROGRESS,
    STATUS,
    PairSummary,
    Preflight,
    TrainJob,
    TrainProgress,
    TrainStatus,
    exclusive,
    fresh_directory,
    publish_directory,
    read_record,
)
from vcot.training.protocol.resume import MARKER, find_last_complete, mark_complete, step_of, truncate_progress
from vcot.training.worker import jobs

FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def make_checkpoint(steps, step, marked=True):
    path = steps / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in FILES:
        (path / name).write_bytes(b"x" * 10)
    if marked:
        mark_complete(path)
    return path


def test_last_complete_checkpoint(tmp_path):
    assert find_last_complete(tmp_path / "none") is None
    make_checkpoint(tmp_path, 9)
    make_checkpoint(tmp_path, 10)
    make_checkpoint(tmp_path, 11, marked=False)
    (tmp_path / "checkpoint-final").mkdir()
    found = find_last_complete(tmp_path)
    assert found is not None
    assert step_of(found) == 10


@pytest.mark.parametrize("name", FILES)
def test_checkpoint_without_one_of_its_files_does_not_count(tmp_path, name):
    """TRL resumes from one without optimizer.pt or rng_state.pth, and ends with other weights."""
    make_checkpoint(tmp_path, 5)
    torn = make_checkpoint(tmp_path, 7)
    (torn / name).unlink()
    assert find_last_complete(tmp_path).name == "checkpoint-5"
    never_written = make_checkpoint(tmp_path, 8, marked=False)
    (never_written / name).unlink()
    mark_complete(never_written)
    assert find_last_complete(tmp_path).name == "checkpoint-5"


def test_each_rank_needs_its_random_state(tmp_path):
    path = make_checkpoint(tmp_path, 5)
    assert find_last_complete(tmp_path, num_processes=2) is None
    (path / "rng_state.pth").rename(path / "rng_state_0.pth")
    mark_complete(path)
    assert find_last_complete(tmp_path, num_processes=2) is None, "TRL would give the second rank another state"
    (path / "rng_state_1.pth").write_bytes(b"x")
    mark_complete(path)
    assert find_last_complete(tmp_path, num_processes=2) == path


def test_cut_file_or_marker_does_not_count(tmp_path):
    cut = make_checkpoint(tmp_path, 5)
    (cut / "optimizer.pt").write_bytes(b"x")
    assert find_last_complete(tmp_path) is None
    torn = make_checkpoint(tmp_path, 6)
    (torn / MARKER).write_text("{")
    assert find_last_complete(tmp_path) is None


def make_point(kind, step):
    return TrainProgress(kind=kind, step=step, num_steps=9, epoch=0.5, loss=0.6, elapsed_s=float(step))


def test_progress_is_cut_to_the_checkpoint(tmp_path):
    path = tmp_path / PROGRESS
    points = [make_point("validation", 0), *(make_point("train", step) for step in (1, 2, 3))]
    path.write_text("".join(point.model_dump_json() + "\n" for point in points) + '{"kind": "tra')
    assert truncate_progress(path, 2) == 2.0
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    assert truncate_progress(path, -1) == 0.0
    assert path.read_text() == ""
    assert truncate_progress(tmp_path / "new.jsonl", 3) == 0.0


def test_one_process_holds_a_job(tmp_path):
    with exclusive(tmp_path), pytest.raises(InputError, match="another worker holds"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass
    with pytest.raises(InputError, match="cannot be used"), exclusive(tmp_path / "missing"):
        pass


def test_directory_is_published_whole(tmp_path):
    (tmp_path / ".x.partial" / "rest").mkdir(parents=True)
    partial = fresh_directory(tmp_path / ".x.partial")
    assert list(partial.iterdir()) == []
    (partial / "file").write_text("1")
    publish_directory(partial, tmp_path / "x")
    assert (tmp_path / "x" / "file").read_text() == "1"
    assert not partial.exists()


@pytest.fixture
def disk(monkeypatch):
    """What is put on disk and renamed, in order, by name."""
    events = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(descriptor):
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        events.append(re.sub(r"\.[0-9a-f]{16}\.partial$", ".partial", name))
        fsync(descriptor)

    def note_rename(self, target):
        events.append(f"rename to {Path(target).name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_rename)
    return events


def test_a_steps_files_are_on_disk_before_the_marker_says_so(tmp_path, disk):
    """Else a power failure leaves a whole checkpoint by its marker, with files of the right size and no content."""
    make_checkpoint(tmp_path, 7)
    assert disk == [*sorted(FILES), f".{MARKER}.partial", f"rename to {MARKER}"]


def test_a_checkpoints_files_are_on_disk_before_it_takes_its_name_and_the_name_before_it_counts(tmp_path, disk):
    partial = fresh_directory(tmp_path / ".x.partial")
    for name in ("config.json", "model.safetensors"):
        (partial / name).write_text("{}")
    publish_directory(partial, tmp_path / "x")
    assert disk == ["config.json", "model.safetensors", partial.name, "rename to x", tmp_path.name]


def test_a_summary_of_pairs_of_an_earlier_version_is_read():
    now = PairSummary(num_rows=1, num_kept=1, refused=(), refused_rows=(), max_length=9, example="")
    assert PairSummary.model_validate({**now.model_dump(), "min_length": 7, "median_length": 8}) == now


def fail(job, capsys, code=2):
    assert jobs.main([str(job)]) == code
    assert read_record(job / STATUS, TrainStatus).state == "failed"
    message = read_record(job / STATUS, TrainStatus).message
    assert capsys.readouterr().err == f"{message}\n"
    assert not (job / ADAPTER).exists()
    return message


def test_job_directory_without_a_job(tmp_path, capsys):
    assert jobs.main([str(tmp_path)]) == 2
    assert "job.json cannot be read" in capsys.readouterr().err
    (tmp_path / JOB).write_text('{"base": 1}')
    assert jobs.main([str(tmp_path)]) == 2
    assert "is not a TrainJob" in capsys.readouterr().err


def change(job, **changes):
    write_record(job / JOB, read_record(job / JOB, TrainJob).model_copy(update=changes))


def test_altered_base_is_refused(make_job, capsys):
    job = make_job()
    base = read_record(job / JOB, TrainJob).base
    change(job, base=base.model_copy(update={"digest": "sha256:" + "0" * 64}))
    assert "the job was made for sha256:000000000000" in fail(job, capsys)


def test_missing_pairs_and_missing_base(make_job, tmp_path, capsys):
    job = make_job()
    change(job, pairs_path=str(tmp_path / "gone"))
    assert "train.parquet cannot be read" in fail(job, capsys)
    change(job, base_path=str(tmp_path / "gone"))
    assert "does not exist" in fail(job, capsys)


def test_no_row_fits(make_job, capsys):
    job = make_job("train.max_length=20")
    message = fail(job, capsys)
    assert message.startswith("none of 10 pairs")
    assert "are more than train.max_length = 20" in message
    preflight = read_record(job / PREFLIGHT, Preflight)
    assert (preflight.train.num_kept, len(preflight.train.refused), preflight.train.example) == (0, 10, "")


def test_a_crash_is_told_too(make_job, monkeypatch, caplog):
    job = make_job()
    monkeypatch.setattr(jobs, "_digest", lambda path: 1 / 0)
    assert jobs.main([str(job)]) == 1
    assert "ZeroDivisionError" in read_record(job / STATUS, TrainStatus).message
    assert "Traceback" in caplog.text
