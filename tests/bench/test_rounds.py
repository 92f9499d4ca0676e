"""The figures of `make bench-eval`: what a round asks, whose processor time counts, and which ratios are taken."""

import asyncio
import dataclasses
import os
import subprocess
import sys
import time

import pytest

from bench.engine import cpu_seconds, descendants
from bench.evaluation import Turn, measure, split_questions, summarise


@dataclasses.dataclass(frozen=True)
class Asked:
    tasks: tuple[int, ...]


def test_no_question_comes_in_two_rounds():
    parts = split_questions(Asked(tuple(range(11))), 3)
    assert [part.tasks for part in parts] == [(0, 1, 2), (3, 4, 5), (6, 7, 8)]


def test_ratios_are_taken_within_a_round():
    def turn(served, offline, cpu):
        return Turn(
            {"vcot": served, "offline": offline}, {"vcot": {"client": cpu, "engine": 6.0}, "offline": {"offline": 4.0}}
        )

    figures = summarise([turn(50, 100, 2.0), turn(90, 100, 4.0), turn(60, 200, 10.0)])
    assert (figures["vs_offline"], figures["vs_offline_by_round"]) == (0.5, [0.3, 0.5, 0.9])
    assert figures["cpu_vs_offline"] == 0.4
    assert figures["cpu_ms"] == {"client": 4.0, "engine": 6.0, "offline": 4.0}
    assert figures["responses_per_s"] == {"vcot": 60, "offline": 100}


async def test_each_way_is_charged_with_its_own_processes_in_its_own_time():
    async def work(_):
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        return 7.0

    async def wait(_):
        await asyncio.sleep(0.1)
        return 3.0

    pids = {"vcot": {"client": [os.getpid()]}, "offline": {"offline": [os.getpid()]}}
    turn = await measure(["a", "b"], {"vcot": work, "offline": wait}, pids)
    assert turn.rate == {"vcot": 7.0, "offline": 3.0}
    assert turn.cpu_ms["vcot"]["client"] == pytest.approx(150, abs=40)
    assert turn.cpu_ms["offline"]["offline"] < 60


def test_processor_time_is_that_of_all_processes_that_are_named():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'sum(range(10**7)); input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while cpu_seconds(descendants(process.pid)) < 0.05 and time.monotonic() < deadline:
            time.sleep(0.05)
        below = descendants(process.pid)
        assert len(below) == 1
        assert cpu_seconds([process.pid, *below]) >= cpu_seconds(below) >= 0.05
        process.stdin.close()
