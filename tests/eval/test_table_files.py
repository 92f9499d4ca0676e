"""Tables as files: what is read back is what was found, and names that others wrote stay names."""

import csv
import io

import pytest
from pyarrow import parquet

from tests.eval.test_evaluate import load, store
from tests.eval.test_margins import BLANK, TASKS, TRUE, tell
from tests.eval.test_table import BASE, POLICY, SUBJECTS, outcomes
from vcot.eval.evaluate import Evaluation, render_evaluation
from vcot.eval.image_reliance import build_reliance
from vcot.eval.margins import build_margins
from vcot.eval.matrix import Matrix, RuleResult
from vcot.eval.repeats import build_repeats
from vcot.eval.table import build_chance, build_differences, build_results
from vcot.eval.table_files import (
    flatten,
    list_rows,
    write_csv,
    write_latex,
    write_markdown,
    write_matrix_latex,
    write_parquet,
)
from vcot.pipeline.records import Interval

__all__ = ["store"]
HOSTILE = POLICY.model_copy(update={"name": "a|b & <i>_%\\x"})


def make_evaluation(policy=HOSTILE):
    scores = [
        s
        for temperature in (0.4, 0.8)
        for checkpoint, right in ((BASE, 20), (policy, 35))
        for index in (0, 1)
        for s in outcomes(right, 50, checkpoint=checkpoint, temperature=temperature, index=index, prompt="zero_shot")
    ]
    lost = [s.model_copy(update={"value": "incorrect"}) for s in scores]
    return Evaluation(
        results=tuple(build_results(scores, [BASE, policy], SUBJECTS, seed=0, num_samples=2)),
        differences=tuple(build_differences(scores, BASE, [policy])),
        chance=build_chance(scores, SUBJECTS),
        reliance=tuple(build_reliance({"true": scores, "blank": lost}, [BASE, policy])),
        repeats=tuple(build_repeats(scores, [BASE, policy])),
        margins=tuple(build_margins({"true": tell(TRUE, BASE), "blank": tell(BLANK, BASE)}, TASKS, [BASE])),
    )


def test_csv_and_parquet_hold_every_figure_in_full():
    found = make_evaluation()
    tables = list_rows(found)
    assert set(tables) == {"results", "differences", "repeats", "reliance", "margins"}
    for rows in tables.values():
        back = parquet.read_table(io.BytesIO(write_parquet(rows))).to_pylist()
        assert [{k: v for k, v in row.items() if v is not None} for row in back] == [
            {k: v for k, v in row.items() if v is not None} for row in rows
        ]
        texts = list(csv.DictReader(io.StringIO(write_csv(rows))))
        assert texts == [{name: "" if (v := row.get(name)) is None else str(v) for name in texts[0]} for row in rows]
    [first, *_] = tables["results"]
    assert (first["checkpoint.name"], first["column"], first["accuracy.value"]) == ("base", "Avg", 0.4)
    assert tables["differences"][0]["accuracy.low"] == found.differences[0].accuracy.low
    assert tables["repeats"][0]["pass_at_2.share.value"] == found.repeats[0].pass_at[1].share.value
    assert tables["reliance"][0] == flatten(found.reliance[0])
    true, blank = tables["margins"]
    assert blank == flatten(found.margins[1])
    assert set(blank) - set(true) == {"lost.value", "lost.low", "lost.high", "lost.n"}


def make_matrix():
    """Two logs under two rules; of one, a rule read nothing."""
    half = Interval(value=0.5, low=0.4, high=0.6, n=10)
    shared = {"num_questions": 10, "num_scored": 10, "guesses": False}
    results = [
        RuleResult(
            log=log, rule=rule, accuracy={"Avg": half}, of_read=of_read, no_answer=unread, reasons=reasons, **shared
        )
        for log in ("base, cot at 0.4", "a_b & c")
        for rule, of_read, unread, reasons in (
            ("vcot", 0.6, 0.125, {"none": 1, "two": 2}),
            ("lmms_eval", None, 1.0, {}),
        )
    ]
    return Matrix(
        benchmark="nano", split="test", chance={"Avg": 0.25}, accounts=(), results=tuple(results), differences=()
    )


def test_the_parser_matrix_as_files():
    tables = list_rows(make_evaluation().model_copy(update={"matrix": make_matrix()}))
    assert [row["accuracy.value"] for row in tables["matrix"]] == [0.5] * 4
    assert (tables["matrix"][0]["reasons.two"], tables["matrix"][1]["of_read"]) == (2, None)
    assert "matrix-differences" not in tables
    told = write_matrix_latex(make_matrix()).splitlines()
    assert r"Answers & vcot & lmms\_eval \\" in told
    cell = r"$50.0\,{\scriptstyle\pm 10.0}$"
    assert rf"a\_b \& c & {cell} (12.5) & {cell} (100.0) \\" in told


def test_rows_that_lack_a_field_leave_it_empty():
    rows = [{"a": 1}, {"a": 2, "b": "x, y"}]
    assert write_csv(rows) == 'a,b\n1,\n2,"x, y"\n'
    assert parquet.read_table(io.BytesIO(write_parquet(rows))).to_pylist() == [{"a": 1, "b": None}, rows[1]]


def test_latex_has_the_papers_layout():
    text = write_latex(make_evaluation(), SUBJECTS)
    lines = text.splitlines()
    assert r"Checkpoint & NAT & SOC & LAN & Avg \\" in lines
    assert lines.index(r"\multicolumn{5}{l}{\emph{zero\_shot, temperature 0.4}} \\") < lines.index(
        r"\multicolumn{5}{l}{\emph{zero\_shot, temperature 0.8}} \\"
    )
    [base, _] = [line for line in lines if line.startswith("base & ")]
    assert base.startswith(r"base & $40.0\,{\scriptstyle\pm ")
    assert "-- & --" in base, "no question of SOC and LAN"
    [policy, _] = [line for line in lines if line.startswith(r"a|b \& <i>\_\%\textbackslash{}x & ")]
    assert r"$70.0^\dagger\,{\scriptstyle\pm " in policy
    assert "dagger" not in base
    assert all(
        line.count("&") - line.count(r"\&") == 4 for line in lines if line.endswith(r"\\") and "multi" not in line
    )
    assert "p is corrected (Holm) for all 2 differences" in text


@pytest.mark.parametrize("policy", [HOSTILE, POLICY])
def test_markdown_has_tables_and_whole_sentences_and_names_stay_names(store, tmp_path, policy):
    found = make_evaluation(policy)
    text = write_markdown(render_evaluation(found, load(store, tmp_path).benchmark))
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    assert "a smaller one would mostly be missed." in text
    assert "<i>" not in text
    assert "**Paired differences in points, on the same questions**" in text
