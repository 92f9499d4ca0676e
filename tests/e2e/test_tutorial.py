"""docs/tutorial.md, word for word: its files saved as it says, its commands typed in one shell, its output beside ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
_BLOCK = r"^```(\w+)\n(.*?)^```$"
FILES = re.findall(rf"[Ss]ave\s+(?:this|it)\s+as\s+`([\w.]+)`(?:(?!^```).)*?{_BLOCK}", PAGE, re.DOTALL | re.MULTILINE)
SHOWN = [text for language, text in re.findall(_BLOCK, PAGE, re.DOTALL | re.MULTILINE) if language == "text"]
COMMANDS = re.findall(r"^    (\S.*)$", re.sub(_BLOCK, "", PAGE, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
ENTER, REST = COMMANDS[:3], COMMANDS[3:]
DRAW, DOCTOR, RUN = "python draw.py", "vcot doctor --recipe colours.toml", "vcot run --recipe colours.toml"
PLAN, STATUS = "vcot eval --plan --recipe colours.toml", "vcot status --run runs/colours"
AUDIT, PREVIEW = "vcot judge --audit --run runs/colours", "vcot pair --preview --run runs/colours"
BUNDLE = "vcot view runs/colours --bundle pages"
BLANK = 'vcot eval --run runs/colours --set \'eval.images=["true", "blank"]\''
AGAIN = "vcot run --run runs/colours --set train.seed=1"


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Runs lines in the reader's folder, with `vcot` and `python` as an activated environment has them."""
    home = tmp_path_factory.mktemp("reader")
    programs = home / "bin"
    programs.mkdir()
    own = f'PYTHONPATH="{ROOT}:$PYTHONPATH" exec {sys.executable} -m vcot.services.cli "$@"'
    for name, line in {"vcot": own, "python": f'exec {sys.executable} "$@"'}.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "COLUMNS": "80", "NO_COLOR": "1"}

    def type_lines(*lines):
        script = "\n".join(("set -e", *lines))
        done = subprocess.run(
            ["bash", "-c", script], cwd=home, env=environment, capture_output=True, text=True, check=False
        )
        said = done.stdout + done.stderr
        sys.stderr.write(f"$ {lines[-1]}\n{said}")
        assert done.returncode == 0
        return said

    return type_lines, home / "colours"


def plain(line):
    """A line without its figures, names of checkpoints and spaces: what does not depend on the machine."""
    return re.sub(r"[\d.,<±+ ─-]+", " ", re.sub(r"dpo-\w+|colours/pairs/\w+", "made", line)).strip()


@pytest.fixture(scope="module")
def typed(shell):
    """All of the page, once: what each command said."""
    type_lines, folder = shell
    type_lines(*ENTER)
    for name, _, text in FILES:
        (folder / name).write_text(text)
    return {line: type_lines(*ENTER[1:], line) for line in REST}


def test_the_page_names_its_files_and_all_that_is_to_be_typed():
    assert [name for name, *_ in FILES] == ["draw.py", "judging.py", "pairing.py", "colours.toml"]
    assert ENTER == ["mkdir colours", "cd colours", "export PYTHONPATH=$PWD"]
    assert [DRAW, DOCTOR, f"{RUN} --dry-run", PLAN, RUN, STATUS, AUDIT, PREVIEW, BUNDLE, BLANK, AGAIN] == REST


def test_what_it_shows_is_what_its_commands_say(typed):
    said = {plain(line) for text in typed.values() for line in text.splitlines()}
    for line in "".join(SHOWN).splitlines():
        assert any(plain(line) in each for each in said), line


def test_what_it_says_of_each_command_is_so(typed, shell):
    _, folder = shell
    assert "this machine can run colours" in typed[DOCTOR]
    assert "300 table tasks x 8 responses" in typed[f"{RUN} --dry-run"]
    points = re.search(r"difference of ([\d.]+ to [\d.]+) points", typed[PLAN])
    assert points
    assert f"a true difference of {points[1]} points would be found" in PAGE.replace("\n", " ")
    assert "2400 requested = 2400 ok + 0 cached" in typed[RUN]
    assert typed[RUN].count("a new run") == 1, "what was planned before had begun none"
    assert "It goes by the gold answer, so its AUC proves nothing" in typed[AUDIT]
    assert "pairing:pick_near_miss" in typed[PREVIEW]
    assert "loses accuracy without its image" in typed[BLANK].replace("\n", " ")
    assert "2400 requested = 0 ok + 2400 cached" in typed[AGAIN]
    assert (folder / "pages" / "index.html").is_file()
    assert (folder / "runs" / "colours" / "report" / "index.html").is_file()


def test_what_it_mentions_in_passing_works_too(typed, shell):
    type_lines, _ = shell
    assert set(re.findall(r"`(vcot [^`]* [^`]*)`", PAGE)) - {*REST} == {
        *("vcot judge --audit", "vcot pair --preview", "vcot report --run runs/colours", "vcot view runs/colours"),
    }
    assert "Paired differences" in type_lines(*ENTER[1:], "vcot report --run runs/colours")
    served = type_lines(
        *ENTER[1:], "timeout -s INT 60 vcot view runs/colours & sleep 20; kill -INT %1; wait %1 || true"
    )
    assert "/?token=" in served


def test_the_run_again_asks_nothing_and_a_judge_that_is_changed_judges_anew(typed, shell):
    type_lines, folder = shell
    said = type_lines(*ENTER[1:], RUN)
    assert said.count("2400 requested = 0 ok + 2400 cached") == 2
    assert said.count("1200 requested = 0 ok + 1200 cached") == 2
    assert "is live at" in said, "another policy is by now, and the first comes back"
    with (folder / "judging.py").open("a") as file:
        file.write("# changed\n")
    assert "2400 requested = 0 ok + 2400 cached" in type_lines(*ENTER[1:], "vcot sample --run runs/colours")
    assert "2400 requested = 2400 ok + 0 cached" in type_lines(*ENTER[1:], "vcot judge --run runs/colours")
