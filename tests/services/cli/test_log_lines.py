"""`--verbose`: the lines that are added to a run's logs, each once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.services.cli.test_cli import vcot  # noqa: F401
from vcot.services.cli.log_lines import showing_logs
from vcot.services.engine.logs import bound

Shown = list[tuple[str, str]]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    path = tmp_path / "logs" / "vllm.log"
    path.write_text("of an earlier command\n")
    return path


def add(path: Path, text: str) -> None:
    with path.open("a", newline="") as file:
        file.write(text)


def wait_for(shown: Shown, line: str) -> None:
    until = time.monotonic() + 10
    while not any(text == line for _, text in shown):
        assert time.monotonic() < until, shown
        time.sleep(0.01)


def test_each_line_is_shown_once_with_its_log(tmp_path: Path, log: Path) -> None:
    shown: Shown = []
    with showing_logs(tmp_path, lambda *line: shown.append(line), poll_s=0.01):
        add(log, "loading weigh")
        job = tmp_path / "training" / "ab12"
        job.mkdir(parents=True)
        add(job / "worker.log", "step 1\n\nstep 2\n")
        wait_for(shown, "step 2")
        assert shown == [("worker", "step 1"), ("worker", "step 2")], "a line that is not ended yet"
        add(log, "ts\n 0%|    |\r50%|==  |\r100%|====|\n")
        add(log, "the last words before the end\n")
    assert shown[2:] == [("vllm", "loading weights"), ("vllm", "100%|====|"), ("vllm", "the last words before the end")]


def test_a_log_that_was_set_aside_is_read_from_its_new_beginning(tmp_path: Path, log: Path) -> None:
    shown: Shown = []
    with showing_logs(tmp_path, lambda *line: shown.append(line), poll_s=0.01):
        add(log, "before\n")
        wait_for(shown, "before")
        bound(log, max_bytes=4)
        add(log, "anew\n")
        wait_for(shown, "anew")
        log.unlink()
        add(tmp_path / "logs" / "gateway.log", "still there\n")
    assert shown == [("vllm", "before"), ("vllm", "anew"), ("gateway", "still there")]


def test_quiet_and_verbose_contradict_each_other(vcot, tmp_path: Path) -> None:  # noqa: F811
    code, _, said = vcot("sample", "--run", str(tmp_path / "run"), "-q", "-v")
    assert (code, said) == (2, "vcot: --quiet and --verbose ask for opposite things; give one of them\n")
    assert not (tmp_path / "run").exists(), "nothing was begun"
