"""`vcot worker` and who waits for it: real processes, told jobs that they cannot do (the e2e tests train for real)."""

import asyncio
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import pytest

from vcot.pipeline.errors import ServerError
from vcot.pipeline.files import write_record
from vcot.pipeline.records import CheckpointRef
from vcot.services.jobs import submitted, trainer
from vcot.services.recipes.recipe import load_recipe
from vcot.training.protocol.job import ADAPTER, JOB, STATUS, TrainJob, TrainStatus, exclusive, read_status
from vcot.training.protocol.machines import CALL, Call, installed_versions, is_held, place_lock


def make_job(
    where: Literal["local", "remote"] = "remote", base_path: str = "nothing-here", num_machines: int = 1
) -> TrainJob:
    shared = [f"train.num_processes={num_machines}", f"train.num_machines={num_machines}"]
    recipe = load_recipe("nano", [f"train.worker={where}", *shared])
    return TrainJob(
        base=CheckpointRef(name="base", digest="sha256:" + "a" * 64, kind="base"),
        base_path=base_path,
        pairs_path="nowhere",
        pairs_digest="d",
        train=recipe.train,
        merge=recipe.merge,
    )


def submit(runs: Path, name: str, job: TrainJob, status: TrainStatus | None = None) -> Path:
    directory = runs / name / "training" / "key"
    directory.mkdir(parents=True)
    write_record(directory / JOB, job)
    if status is not None:
        write_record(directory / STATUS, status)
    return directory


def owed(runs: Path) -> list[str]:
    return [directory.parents[1].name for directory, _ in submitted.owed_jobs(runs)]


async def test_a_run_hears_what_its_worker_says(tmp_path: Path) -> None:
    directory, said = tmp_path / "run" / "training" / "key", []
    waiting = asyncio.create_task(trainer.train_remotely(make_job(), directory, lambda *steps: said.append(steps[2])))
    await asyncio.sleep(0)
    assert await submitted.work_once(tmp_path, lambda _: None, set())
    with pytest.raises(ServerError, match="nothing-here does not exist"):
        await waiting
    assert said[0] == "waiting for a `vcot worker` to take the job"
    assert not await submitted.work_once(tmp_path, lambda _: None, set()), "a failed job is not tried again by itself"


async def test_the_same_command_submits_a_failed_job_again(tmp_path: Path) -> None:
    directory = submit(tmp_path, "run", make_job(), TrainStatus(state="failed", message="no luck"))
    assert owed(tmp_path) == []
    waiting = asyncio.create_task(trainer.train_remotely(make_job(), directory, lambda *_: None))
    await asyncio.sleep(0)
    assert owed(tmp_path) == ["run"]
    waiting.cancel()


async def test_a_job_under_way_is_followed_and_not_begun_anew(tmp_path: Path) -> None:
    directory = submit(tmp_path, "run", make_job(), TrainStatus(state="running", num_steps=7))
    waiting = asyncio.create_task(trainer.train_remotely(make_job(), directory, lambda *_: None))
    await asyncio.sleep(0)
    assert read_status(directory).num_steps == 7
    write_record(directory / STATUS, TrainStatus(state="done", num_steps=7))
    assert (await waiting).num_steps == 7


async def test_a_job_without_its_merged_checkpoint_is_submitted_again(tmp_path: Path) -> None:
    """Other merge settings are another checkpoint of the same job."""
    directory = submit(tmp_path, "run", make_job(), TrainStatus(state="done"))
    (directory / ADAPTER).mkdir()
    waiting = asyncio.create_task(trainer.train_remotely(make_job(), directory, lambda *_: None))
    await asyncio.sleep(0)
    assert owed(tmp_path) == ["run"]
    waiting.cancel()


def test_jobs_are_taken_in_the_order_of_submission_interrupted_ones_too_and_local_ones_never(tmp_path: Path) -> None:
    submit(tmp_path, "second-by-name", make_job(), TrainStatus(state="running"))
    submit(tmp_path, "mine", make_job("local"))
    submit(tmp_path, "done", make_job(), TrainStatus(state="done"))
    submit(tmp_path, "first-by-name", make_job())
    assert owed(tmp_path) == ["second-by-name", "first-by-name"]


def test_a_job_that_cannot_be_read_fails_and_stops_no_other(tmp_path: Path) -> None:
    broken = submit(tmp_path, "broken", make_job())
    (broken / JOB).write_text("{")
    submit(tmp_path, "sound", make_job())
    assert owed(tmp_path) == ["sound"]
    assert "is not a TrainJob" in read_status(broken).message


async def test_a_job_that_another_worker_has_is_left_to_it(tmp_path: Path) -> None:
    directory = submit(tmp_path, "run", make_job())
    with exclusive(directory, "claim.lock"):
        assert not await submitted.work_once(tmp_path, lambda _: None, set())
    assert await submitted.work_once(tmp_path, lambda _: None, set())


@pytest.mark.parametrize("name", ["claim.lock", "worker.log", STATUS])
async def test_a_job_whose_directory_cannot_be_used_stops_no_other_and_is_tried_when_submitted_again(
    tmp_path: Path, name: str
) -> None:
    (submit(tmp_path, "run", make_job()) / name).mkdir()
    sound, said, refused = submit(tmp_path, "sound", make_job()), list[str](), set[str]()
    (sound / "worker.log").touch()
    assert await submitted.work_once(tmp_path, said.append, refused)
    assert read_status(sound).state == "failed", "it was told what it cannot do"
    assert not await submitted.work_once(tmp_path, said.append, refused)
    [left] = [message for message in said if "left alone" in message]
    assert "/run/training/key: left alone, since" in left
    assert "submit the job again" in left
    (tmp_path / "run" / "training" / "key" / name).rmdir()
    os.utime(tmp_path / "run" / "training" / "key" / JOB)
    assert await submitted.work_once(tmp_path, said.append, refused)


async def test_a_job_whose_trainer_outlives_its_worker_is_taken_when_that_has_ended(tmp_path: Path) -> None:
    directory = submit(tmp_path, "run", make_job(), TrainStatus(state="running"))
    with exclusive(directory):
        assert not await submitted.work_once(tmp_path, lambda _: None, set())
    assert read_status(directory).state == "running"
    assert await submitted.work_once(tmp_path, lambda _: None, set())


async def test_the_jobs_of_a_search_are_not_taken_by_a_worker_that_watches(tmp_path: Path) -> None:
    directory, seen = tmp_path / "run" / "training" / "key", list[list[str]]()
    await trainer.train_all({directory: make_job()}, tmp_path / "log", lambda: seen.append(owed(tmp_path)))
    assert seen
    assert not any(seen)
    assert "nothing-here does not exist" in read_status(directory).message


async def test_a_run_that_is_deleted_while_its_job_is_done_ends_no_worker(tmp_path: Path) -> None:
    submit(tmp_path, "run", make_job())
    said = list[str]()

    def hear(message: str) -> None:
        if not said:
            shutil.rmtree(tmp_path / "run")
        said.append(message)

    assert not await submitted.work_once(tmp_path, hear, set())
    assert "left alone, since" in said[-1]


async def test_a_trainer_that_dies_without_a_word_fails_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "sitecustomize.py").write_text("import os; os.kill(os.getpid(), 9)")
    directory = submit(tmp_path / "runs", "run", make_job(), TrainStatus(state="running"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    await submitted.work_once(tmp_path / "runs", lambda _: None, set())
    assert "ended with 137" in read_status(directory).message


async def test_a_worker_that_is_stopped_leaves_its_job_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "sitecustomize.py").write_text("import sys, time\nif sys.flags.isolated == 0: time.sleep(600)")
    directory = submit(tmp_path / "runs", "run", make_job())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    said: asyncio.Queue[str] = asyncio.Queue()
    working = asyncio.create_task(submitted.work_once(tmp_path / "runs", said.put_nowait, set()))
    await said.get()
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    assert read_status(directory).state == "preparing"
    assert owed(tmp_path / "runs") == ["run"]


def test_where_a_job_is_done_is_not_part_of_what_it_is() -> None:
    local = make_job("local")
    assert local.key == make_job("remote").key
    shared = {"num_processes": 4, "num_machines": 2, "address": "10.0.0.1"}
    keys = [
        local.model_copy(update={"train": local.train.model_copy(update=shared | where)}).key
        for where in ({}, {"num_machines": 4, "address": None})
    ]
    assert keys[0] == keys[1]


async def test_an_idle_worker_takes_the_first_free_place_of_the_oldest_call(tmp_path: Path) -> None:
    calls = [submit(tmp_path, name, make_job("local", num_machines=3)) for name in ("b", "a")]
    with ExitStack() as held:
        for age, directory in enumerate(calls):
            held.enter_context(exclusive(directory, place_lock(0)))
            write_record(directory / CALL, Call(num_machines=3, versions=installed_versions()))
            os.utime(directory / CALL, (age, age))
        held.enter_context(exclusive(calls[0], place_lock(1)))
        said: asyncio.Queue[str] = asyncio.Queue()
        helping = asyncio.create_task(submitted.help_once(tmp_path, said.put_nowait, set()))
        assert await said.get() == f"{calls[0]}: machine 3 of 3"
        assert is_held(calls[0], 2)
        assert not is_held(calls[1], 1)
        (calls[0] / CALL).unlink()
        held.close()  # the call is withdrawn
        assert await helping
        assert await said.get() == f"{calls[0]}: done"
        assert not is_held(calls[0], 2)


async def test_a_call_by_other_versions_is_not_answered_and_said_once(tmp_path: Path) -> None:
    directory = submit(tmp_path, "run", make_job("local", num_machines=2))
    said: list[str] = []
    with exclusive(directory, place_lock(0)):
        write_record(directory / CALL, Call(num_machines=2, versions=installed_versions() | {"torch": "0.4"}))
        refused: set[str] = set()
        for _ in range(2):
            assert not await submitted.help_once(tmp_path, said.append, refused)
    assert len(said) == 1
    assert "not helped with, since torch is" in said[0]


async def test_of_two_jobs_for_several_machines_the_second_waits_and_one_for_a_single_machine_does_not(
    tmp_path: Path,
) -> None:
    first = submit(tmp_path, "first", make_job(num_machines=2))
    second = submit(tmp_path, "second", make_job(num_machines=2))
    with exclusive(first, "claim.lock"):
        assert not await submitted.work_once(tmp_path, lambda _: None, set())
        third = submit(tmp_path, "third", make_job())
        assert await submitted.work_once(tmp_path, lambda _: None, set())
    assert (read_status(second).state, read_status(third).state) == ("preparing", "failed")
