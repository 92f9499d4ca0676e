"""What a pipe gets: whole cells, however wide."""

from rich.table import Table

from services.terminal import Terminal


def test_a_table_in_a_pipe_is_not_cut(capsys):
    table = Table("digest", "directory", title="Checkpoints")
    table.add_row(f"sha256:{'0123456789abcdef' * 4}", f"/{'a-long-name/' * 20}end")
    Terminal().show(table)
    out = capsys.readouterr().out
    assert f"sha256:{'0123456789abcdef' * 4}" in out
    assert f"/{'a-long-name/' * 20}end" in out
    assert "…" not in out
