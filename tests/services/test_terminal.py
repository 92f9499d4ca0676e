"""What a terminal shows, and what a pipe gets: whole cells, however wide."""

from types import SimpleNamespace

from rich.table import Table

from services import commands
from services.terminal import Terminal


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
    commands._say_preflight(SimpleNamespace(terminal=Terminal()), preflight)
    row = capsys.readouterr().err.splitlines()[0]
    assert "'<s>template" in row
    assert row.endswith("</s>'")
    assert len(row) < 200
