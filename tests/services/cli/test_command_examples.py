"""Every command's help ends with an example, which the command line takes for that command."""

import re
import shlex
from pathlib import Path

import pytest

from vcot.pipeline.open_lists import SOURCE_NAMES
from vcot.services.cli.command_examples import EXAMPLES
from vcot.services.cli.names import app


def list_commands(node, path=()):
    """The names of all commands, families included."""
    for name in node:
        if not name.startswith("-"):
            yield " ".join((*path, name))
            yield from list_commands(node[name], (*path, name))


def help_of(capsys, command):
    app([*command.split(), "--help"], exit_on_error=False)
    return capsys.readouterr().out


def test_every_command_has_one_and_no_other():
    assert {*list_commands(app)} == {*EXAMPLES}


@pytest.mark.parametrize("command", EXAMPLES)
def test_it_stands_below_the_help_and_can_be_given(capsys, command):
    shown = help_of(capsys, command).partition("For example:\n")[2]
    assert [line.strip() for line in shown.strip().splitlines()] == list(EXAMPLES[command])
    for line in EXAMPLES[command]:
        program, *words = shlex.split(line.partition(" > ")[0])
        assert program == "vcot"
        found, *_ = app.parse_args(words, print_error=False, exit_on_error=False)
        assert words[: len(command.split())] == command.split() or command in ("nano", "push")
        assert callable(found)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("export", "[choices: parquet, jsonl, csv]"),
        ("nano build", "[choices: llava, qwen]"),
        ("score", "[choices: train, validation, test]"),
    ],
)
def test_what_can_be_chosen_is_shown(capsys, command, shown):
    assert shown in " ".join(help_of(capsys, command).replace("│", " ").split())


def test_the_data_sets_that_can_be_named_are_shown(capsys):
    words = " ".join(help_of(capsys, "sample").replace("│", " ").split())
    told = words.partition("Where the questions come from: ")[2].partition(" (short for")[0]
    assert set(told.partition(", or one")[0].split(", ")) == {*SOURCE_NAMES.built_ins}


def test_every_command_on_every_page_can_be_given():
    root = Path(__file__).parents[3]
    lines = []
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        text = re.sub(r"^```\w*\n.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        lines += re.findall(r"^    (?:\$ |.*&& )?(?:[A-Z_]+=\S+ )*vcot (.*)$", text, re.MULTILINE)
    assert len(lines) > 50
    for line in lines:
        app.parse_args(shlex.split(line, comments=True), print_error=False, exit_on_error=False)
