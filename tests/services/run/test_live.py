"""What a running command says of itself in running.json, and who holds a run."""

import fcntl
import os

import pytest

from vcot.pipeline.errors import InputError, StageError
from vcot.pipeline.records import StageCount
from vcot.pipeline.report import Accounted, Began, Ended, Progress, Waiting
from vcot.services.run.live import LIVE, find_holder, read_live, recording


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_it_says_what_is_done_how_fast_and_how_long_it_will_take(tmp_path):
    clock, heard = Clock(), []
    with recording(tmp_path, "sample", heard.append, clock=clock) as report:
        report(Began("sample", "100 tasks"))
        report(Progress("responses", 40, 800, ""))  # 40 were there before
        for _ in range(10):
            clock.now += 1
            report(Progress("responses", 40 + int(clock.now - 1000) * 8, 800, "1 failed"))
        live = read_live(tmp_path)
        assert (live.command, live.pid, live.stage, live.what) == ("sample", os.getpid(), "sample", "100 tasks")
        assert (live.done, live.total, live.note, live.updated_at) == (120, 800, "1 failed", 1010)
        assert (live.per_s, live.left_s) == (8, 85)
        report(Ended())
        report(Accounted(StageCount(stage="sample", requested=800, ok=760, cached=40)))
        assert read_live(tmp_path).accounts[0].cached == 40
    assert (read_live(tmp_path).end, read_live(tmp_path).left_s) == ("done", None)
    assert len(heard) == 14, "the terminal hears all of it"


def test_the_rate_is_that_of_the_last_minute(tmp_path):
    clock = Clock()
    with recording(tmp_path, "sample", lambda _: None, clock=clock) as report:
        for done in [*range(0, 1000, 10), *range(1000, 1120)]:
            clock.now += 1
            report(Progress("responses", done, 5000, ""))
        assert read_live(tmp_path).per_s == pytest.approx(1, rel=0.05)


def test_progress_costs_one_write_a_second(tmp_path):
    clock = Clock()
    with recording(tmp_path, "sample", lambda _: None, clock=clock) as report:
        clock.now += 1
        report(Progress("responses", 1, 9, ""))
        clock.now += 0.5
        report(Progress("responses", 2, 9, ""))
        assert read_live(tmp_path).done == 1
        report(Waiting("a server"))
        assert (read_live(tmp_path).done, read_live(tmp_path).waiting) == (2, "a server")


def test_a_command_that_fails_leaves_its_sentence(tmp_path):
    with pytest.raises(StageError), recording(tmp_path, "sample", lambda _: None):
        raise StageError("3 of 9 failed")
    assert read_live(tmp_path).end == "3 of 9 failed"
    with pytest.raises(KeyboardInterrupt), recording(tmp_path, "sample", lambda _: None):
        raise KeyboardInterrupt
    assert read_live(tmp_path).end == "stopped (KeyboardInterrupt)"


def test_a_folder_that_takes_no_file_stops_no_command(tmp_path):
    (tmp_path / LIVE).mkdir()
    with recording(tmp_path, "sample", lambda _: None) as report:
        report(Began("sample", ""))


def test_what_a_killed_command_was_writing_is_taken_away(tmp_path):
    left = tmp_path / f".{LIVE}.4711.partial"
    left.write_text("{")
    with recording(tmp_path, "sample", lambda _: None):
        assert not left.exists()


def test_a_damaged_file_is_told(tmp_path):
    assert read_live(tmp_path) is None
    (tmp_path / LIVE).write_text("{")
    with pytest.raises(InputError, match=r"running\.json is not a Live .*; the next command on the run writes it anew"):
        read_live(tmp_path)


def test_the_holder_of_a_run_is_found_without_touching_its_lock(tmp_path):
    assert find_holder(tmp_path) == 0
    with (tmp_path / "lock").open("w") as file:
        assert find_holder(tmp_path) == 0
        fcntl.flock(file, fcntl.LOCK_EX)
        assert find_holder(tmp_path) == os.getpid()
    assert find_holder(tmp_path) == 0
    assert find_holder(tmp_path, tmp_path / "no-such-list") is None
