"""A run as tables: each row is what the run holds, whatever the format, and errors are rows like others."""

import csv
import json
import sqlite3

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pages import read_block
from tests.services.cli.test_cli import vcot
from tests.services.view.view_run import HOSTILE, K, own, prepared
from vcot.pipeline.errors import InputError
from vcot.services.run.directory import open_run
from vcot.services.run.exporting import write_table
from vcot.services.run.frames import Rows, load

__all__ = ["own", "prepared", "vcot"]
TABLES = ["tasks", "responses", "judgments", "pairs", "evaluations"]


@pytest.fixture
def run(prepared):
    with load(prepared.directory) as run:
        yield run


def test_every_response_is_a_row_with_its_score_and_rationale_or_its_error(run):
    rows = list(run.responses)
    assert len(rows) == 11 * K, "one task is not asked yet"
    errors = [row for row in rows if row["text"] is None]
    assert {row["reason"] for row in errors} == {"too_long", "overloaded"}
    assert all(row["score"] is None and row["error"] for row in errors)
    judged = [row for row in rows if row["score"] is not None]
    assert len(judged) == 9 * K
    assert all(row["rationale"] and row["judge"] == "verifier/1" for row in judged)
    assert {row["response"] for row in run.judgments} == {row["response"] for row in judged}


def test_two_exports_to_one_folder_at_once_do_not_write_into_one_file(run, tmp_path):
    """The second ends while the first is at it, and took its half-written file away."""
    rows = list(run.tasks)

    def interrupted():
        yield from rows[:1]
        write_table(run.tasks, tmp_path, "jsonl")
        yield from rows[1:]

    path, num_rows = write_table(Rows("tasks", interrupted), tmp_path, "jsonl")
    assert num_rows == len(rows) == len(path.read_text("utf-8").splitlines())
    assert list(tmp_path.iterdir()) == [path]


def test_pairs_are_of_responses_that_are_there(run):
    responses, pairs = run.responses.pandas().set_index("response"), run.pairs.pandas()
    assert len(pairs)
    assert set(pairs["split"]) == {"train", "validation"}
    for pair in pairs.itertuples():
        assert responses.loc[pair.chosen_response, "text"] == pair.chosen
        assert responses.loc[pair.rejected_response, "score"] == pair.rejected_score < pair.chosen_score


def test_evaluations_and_tasks_say_what_was_asked_and_what_counted(run):
    tasks, asked = run.tasks.pandas(), run.evaluations.pandas()
    assert dict(tasks["part"].value_counts()) == {"train": 12, "eval": 9}
    assert len(asked) == 2 * 2 * 9
    right = asked[asked.outcome == "correct"].groupby("checkpoint").size()
    assert dict(right) == {"base": 12, "dpo-x": 12}
    gold = tasks[tasks.part == "eval"].set_index("task")["answer"]
    assert (
        asked[asked.outcome == "correct"]["answer"] == gold[asked[asked.outcome == "correct"]["task"]].to_numpy()
    ).all()


def test_arrow_and_pandas_hold_the_same(run):
    for rows in run.tables:
        table = rows.arrow()
        assert isinstance(table, pa.Table)
        assert (table.column_names, table.num_rows) == (list(rows.columns), len(list(rows)))
        assert list(rows.pandas().columns) == list(rows.columns)


def test_a_table_is_read_some_rows_at_a_time(own):
    """The first rows come before the last are looked at, which are damaged."""
    ledger = sqlite3.connect(own.directory / "ledger.sqlite")
    ledger.execute("""UPDATE groups SET members = '[{"index": "?"}]' WHERE id = (SELECT max(id) FROM groups)""")
    ledger.commit()
    ledger.close()
    with load(own.directory) as run:
        assert next(iter(run.evaluations))["task"]
        with pytest.raises(InputError, match="cannot be read"):
            list(run.evaluations)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_files_hold_every_row_in_each_format(prepared, vcot, tmp_path, kind):
    code, _, err = vcot("export", prepared.directory, "--out", tmp_path / "out", "--format", kind)
    assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(f"{name}.{kind}" for name in TABLES)
    path = tmp_path / "out" / f"responses.{kind}"
    match kind:
        case "parquet":
            texts = pq.read_table(path)["text"].to_pylist()
        case "jsonl":
            texts = [json.loads(line)["text"] for line in path.read_bytes().splitlines()]
        case "csv":
            with path.open(newline="", encoding="utf-8") as file:
                texts = [row["text"] or None for row in csv.DictReader(line.replace("\0", "\\0") for line in file)]
    with load(prepared.directory) as run:
        own = [
            row["text"].replace("\0", "\\0") if kind == "csv" and row["text"] else row["text"] for row in run.responses
        ]
    assert texts == own
    assert any(HOSTILE[0] in text for text in texts if text)


def test_what_is_not_made_yet_is_said_and_the_rest_is_written(tmp_path, vcot):
    with open_run(tmp_path / "run", "nano"):
        pass
    code, _, err = vcot("export", tmp_path / "run", "--out", tmp_path / "out")
    assert code == 0
    assert "no responses: " in err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_sentence(prepared, vcot, tmp_path):
    (tmp_path / "out").write_text("")
    code, _, err = vcot("export", prepared.directory, "--out", tmp_path / "out")
    assert (code, "choose another --out" in err) == (2, True)


def test_no_run_is_one_sentence(vcot, tmp_path):
    for command in (["export", tmp_path, "--out", tmp_path / "out"], ["view", tmp_path]):
        code, _, err = vcot(*command)
        assert (code, "is not a run" in err) == (2, True), err
    assert list(tmp_path.iterdir()) == []


def test_the_page_of_the_documentation_works_as_it_stands(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "nano").symlink_to(prepared.directory)
    names = {}
    exec(read_block("A run in a notebook", "python", "notebook.md"), names)
    assert (len(names["responses"]), capsys.readouterr().out) == (11 * K, "36\n")
