"""What a terminal gets is shown and never obeyed; what a pipe gets are whole cells, however wide."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.table import Table
from rich.text import Text

from tests.services.cli.test_cli import vcot  # noqa: F401 - a fixture
from vcot.pipeline.records import StageCount
from vcot.pipeline.report import Accounted, Began, Completed, Found, Said, Warned, progress, waiting
from vcot.services.cli.terminal import Terminal
from vcot.services.run.training_steps import tell_preflight


def test_a_table_in_a_pipe_is_not_cut(capsys):
    table = Table("digest", "directory", title="Checkpoints")
    table.add_row(f"sha256:{'0123456789abcdef' * 4}", f"/{'a-long-name/' * 20}end")
    Terminal().show(table)
    out = capsys.readouterr().out
    assert f"sha256:{'0123456789abcdef' * 4}" in out
    assert f"/{'a-long-name/' * 20}end" in out
    assert "…" not in out


def test_a_training_shows_the_ends_of_its_first_row(capsys):
    part = SimpleNamespace(example=f"<s>{'template ' * 50}</s>", refused=())
    memory = SimpleNamespace(total=1.0, summary="1.0 GiB")
    preflight = SimpleNamespace(train=part, validation=part, memory=memory, available_gib=2.0)
    tell_preflight(Terminal(), preflight)
    row = capsys.readouterr().err.splitlines()[0]
    assert "'<s>template" in row
    assert row.endswith("</s>'")
    assert len(row) < 200


HOSTILE = (
    "\x1b]0;owned\x07\x1b[31mred\x9b2J\r\x08\u202egnp.exe\x7f\ud800 [bold]x[/] [link=http://e]y[/link] [/] :smile:"
)
SHOWN = r"\x1b]0;owned\x07\x1b[31mred\x9b2J\r\x08\u202egnp.exe\x7f\ud800 [bold]x[/] [link=http://e]y[/link] [/] :smile:"


def table_of(text: str) -> Table:
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    table.add_row(Text(text))
    return table


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_others_wrote_is_shown_and_not_obeyed(monkeypatch, is_terminal) -> None:
    """A model's answer, a server's error, a file's name: none may command the terminal."""
    out = io.StringIO()
    terminal = Terminal()
    for name in ("err", "out"):
        console = type(terminal.err)(file=out, width=2_000, force_terminal=is_terminal, legacy_windows=False)
        monkeypatch.setattr(terminal, name, console)
    terminal.say(HOSTILE)
    terminal.warn(HOSTILE)
    terminal.heading("x", HOSTILE)
    terminal.show(HOSTILE)
    terminal.show(table_of(HOSTILE))
    with waiting(terminal, HOSTILE) as say:
        say(HOSTILE)
    with progress(terminal, "tasks") as advance:
        advance(1, 2, HOSTILE)
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()) if is_terminal else out.getvalue()  # rich's own
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e\ud800]", said)
    assert "x1b]0;owned" in said
    assert said.count("[bold]x[/] [link=http://e]y[/link] [/] :smile:") >= 5
    assert "\x1b]" not in out.getvalue()
    assert "\x1b[31m" not in out.getvalue(), "a colour of its own"


def test_an_error_is_shown_and_not_obeyed(vcot) -> None:  # noqa: F811
    code, _, err = vcot("judge", "--run", HOSTILE.replace("//", ""))
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"vcot: {SHOWN.replace('//', '')} is not a run yet")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_quiet_one_shows_results_and_warnings_only(monkeypatch, capsys, is_terminal) -> None:
    err, terminal = io.StringIO(), Terminal(quiet=True)
    monkeypatch.setattr(terminal, "err", type(terminal.err)(file=err, force_terminal=is_terminal, legacy_windows=False))
    terminal.preface("a new run")
    for event in (
        Began("sample", "8 responses"),
        Said("as ever"),
        Accounted(StageCount(stage="sample", requested=1, ok=1)),
    ):
        terminal(event)
    with waiting(terminal, "a server") as say, progress(terminal, "responses") as advance:
        say("nearly")
        advance(1, 2, "")
    for event in (Warned("the disk is nearly full"), Found("the table"), Completed()):
        terminal(event)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err.getvalue())
    assert re.fullmatch(r" *0:00 warning  the disk is nearly full\n", shown)
    assert capsys.readouterr().out == "the table\n"


def test_which_run_it_is_comes_before_all_else_and_once(capsys) -> None:
    terminal = Terminal()
    terminal.preface("a new run")
    terminal(Said("none of the questions is held out"))
    terminal(Began("sample", "8 responses"))
    assert re.findall("new run|held out|8 responses", capsys.readouterr().err) == ["new run", "held out", "8 responses"]


def test_a_command_is_quiet_by_its_flag(vcot) -> None:  # noqa: F811
    loud, quiet = (vcot("doctor", "--recipe", "nano", *flags) for flags in ((), ("-q",)))
    assert loud[1] == quiet[1]
    assert vcot("merge", "--recipe", "nano", "-q")[2].startswith("vcot: ")
