"""Each tool's log is read as the tool writes it, in each kind of file; what cannot be read is named with its place."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vcot.eval.logged.layouts import Asked, Fields, Logged, read_log
from vcot.pipeline.errors import InputError

CHOICES = ("this", "that")
ASKED = Asked("Which?", CHOICES, "B")
LLAVA = {"question_id": "7", "prompt": "Which?", "text": "B", "answer_id": "x", "model_id": "m", "metadata": {}}
VLMEVALKIT = {"index": 0, "question": "Which?", "A": "this", "B": "that", "C": None, "answer": "B", "prediction": "B."}
LMMS_EVAL = {
    "doc_id": 0, "doc": {"question": "Which?", "choices": list(CHOICES), "answer": 1, "hint": ""}, "target": "B",
    "resps": ["B"], "filtered_resps": "b", "exact_match": 1.0,
}  # fmt: skip
INSPECT = {
    "id": "7", "epoch": 1, "input": "Which?", "choices": list(CHOICES), "target": "B",
    "output": {"choices": [{"message": {"role": "assistant", "content": "ANSWER: B"}, "stop_reason": "stop"}]},
}  # fmt: skip


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def read(tmp_path):
    """Reads a file of that name and content, as the user's flags say."""

    def read(name, content, **fields):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(read_log(path, Fields(**fields)))

    return read


def said(rows):
    return [(row.id, row.text) for row in rows]


def test_llavas_answers(read):
    assert read("answers.jsonl", lines(LLAVA)) == [Logged("line 1", "7", "B")]


def test_a_scienceqa_result_file(read):
    found = {
        "acc": 50.0,
        "correct": 1,
        "count": 2,
        "results": {"7": 1, "9": 0},
        "outputs": {"7": "B", "9": "The answer"},
    }
    assert said(read("result.json", json.dumps(found))) == [("7", "B"), ("9", "The answer")]


@pytest.mark.parametrize(
    ("resps", "texts"),
    [(["B"], ["B"]), ([["B", "A"]], ["B", "A"]), ([["B"], ["A"]], ["B", "A"]), ("B", ["B"]), ([], [None])],
)
def test_lmms_evals_samples_hold_one_response_or_several(read, resps, texts):
    found = read("x_samples_scienceqa.jsonl", lines(LMMS_EVAL | {"resps": resps}))
    assert [row.text for row in found] == texts
    assert len({row.sample for row in found}) == len(texts)
    assert {(row.asked, row.is_numbered) for row in found} == {(ASKED, True)}


def test_lmms_eval_leaves_out_responses_that_no_filter_changed(read):
    row = {name: value for name, value in LMMS_EVAL.items() if name != "resps"}
    assert [each.text for each in read("samples.jsonl", lines(row))] == ["b"]


def test_a_figure_that_is_no_number_stops_nothing(read):
    assert said(read("samples.jsonl", lines(LMMS_EVAL | {"exact_match": float("nan")}))) == [("0", "B")]


def test_a_gap_in_a_column_of_texts_is_no_response(read):
    assert said(read("a.jsonl", '{"id": 1, "text": "B"}\n{"id": 2, "text": NaN}\n')) == [("1", "B"), ("2", None)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_character_is_a_question_mark(read, name):
    rows = [{"id": "\ud83d", "text": "B \ude00\U0001f600"}, {"id": 2, "text": "\\ud83d"}]
    content = lines(*rows) if name == "a.jsonl" else json.dumps(rows)
    assert said(read(name, content)) == [("?", "B ?\U0001f600"), ("2", "\\ud83d")]


def test_vlmevalkits_predictions(read):
    [row] = read("p.json", json.dumps([VLMEVALKIT]))
    assert row == Logged("row 1", "0", "B.", asked=ASKED, is_numbered=True)
    table = io.StringIO()
    writer = csv.DictWriter(table, VLMEVALKIT, delimiter="\t")
    writer.writeheader()
    writer.writerow(VLMEVALKIT | {"prediction": "B.\nFor it\tis"})
    assert [(each.text, each.asked) for each in read("p.tsv", table.getvalue())] == [("B.\nFor it\tis", ASKED)]


def test_inspects_log(read):
    samples = [
        INSPECT,
        INSPECT | {"epoch": 2, "input": [{"role": "user", "content": [{"type": "text", "text": "Which?"}]}]},
        INSPECT | {"epoch": 3, "output": {"choices": []}, "error": {"message": "timed out"}},
    ]
    found = read("log.json", json.dumps({"version": 2, "eval": {}, "samples": samples}))
    assert [(row.sample, row.text) for row in found] == [("1/0", "ANSWER: B"), ("2/0", "ANSWER: B"), ("3", None)]
    assert {row.asked for row in found} == {ASKED}


def test_a_response_that_inspect_cut_off_is_known_as_such(read):
    cut = {"choices": [{"message": {"content": [{"type": "text", "text": "It"}]}, "stop_reason": "max_tokens"}]}
    [row] = read("log.json", json.dumps({"samples": [INSPECT | {"output": cut}]}))
    assert (row.text, row.is_cut) == ("It", True)


def test_any_other_log_by_usual_names_or_by_those_that_are_given(read):
    row = {"pid": 7, "response": ["A", None, 3], "finish_reason": "length"}
    found = read("any.jsonl", lines(row))
    assert [(each.id, each.text, each.sample, each.is_cut) for each in found] == [
        ("7", "A", "/0", True), ("7", None, "/1", True), ("7", "3", "/2", True)
    ]  # fmt: skip
    nested = {"meta": {"key": "q7"}, "out": [{"message": "B"}]}
    assert said(read("own.jsonl", lines(nested), id="meta.key", text="out.0.message")) == [("q7", "B")]


def test_parquet_csv_and_json_hold_the_same(read):
    rows = [{"id": f"q{number}", "text": f"Grün, {number}\nB"} for number in range(3)]
    file, table = io.BytesIO(), io.StringIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    writer = csv.DictWriter(table, ["id", "text"])
    writer.writeheader()
    writer.writerows(rows)
    expected = [(row["id"], row["text"]) for row in rows]
    for name, content in {"a.parquet": file.getvalue(), "a.csv": table.getvalue(), "a.json": json.dumps(rows)}.items():
        assert said(read(name, content)) == expected


def test_a_whole_number_is_an_id_however_a_table_holds_it(read):
    file = io.BytesIO()
    pq.write_table(pa.table({"id": [7.0, 8.5], "text": ["A", "B"]}), file)
    assert said(read("a.parquet", file.getvalue())) == [("7", "A"), ("8.5", "B")]


def test_a_table_with_gaps_says_what_was_asked_and_answered(read):
    """Of questions with two and with three options, pandas writes NaN for the third; and whole numbers as 7.0."""
    gap = float("nan")
    two, three = read("a.jsonl", lines(VLMEVALKIT | {"C": gap}, VLMEVALKIT | {"A": 1.0, "C": 2.5, "answer": 1.0}))
    assert (two.asked, three.asked) == (ASKED, Asked("Which?", ("1", "that", "2.5"), "B"))
    file = io.BytesIO()
    pq.write_table(pa.table({"id": ["a", "b", "c"], "text": [7.0, gap, 7.5]}), file)
    assert said(read("a.parquet", file.getvalue())) == [("a", "7"), ("b", None), ("c", "7.5")]


def test_json_lines_under_the_name_of_json_are_read(read):
    assert said(read("answers.json", lines(LLAVA, LLAVA | {"question_id": "8"}))) == [("7", "B"), ("8", "B")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_or_the_first_character_says_the_encoding(read, encoding, name):
    content = "id,text\n7,grün\n" if name == "a.csv" else '{"id": "7", "text": "grün"}\n{"id": "8", "text": "rot"}\n'
    assert said(read(name, content.encode(encoding)))[0] == ("7", "grün")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_another_encoding_is_told_with_the_remedy(read, name):
    content = "id,text\n7,grün\n" if name == "a.csv" else '{"id": "7", "text": "grün"}\n'
    with pytest.raises(InputError, match=r"is not in UTF-8 .*iconv -f LATIN1 -t UTF-8"):
        read(name, content.encode("latin-1"))


def test_a_line_that_is_cut_off_is_named_and_the_rest_is_read(read):
    first, fault = read("a.jsonl", lines(LLAVA) + lines(LLAVA)[:30])
    assert (first.id, fault[0], fault[1].why) == ("7", "line 2", "is cut off")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lines(LLAVA) + "oh\n", "is no JSON"),
        (lines(LLAVA, [1]), "is a JSON list, not an object"),
        (lines(LLAVA, {"question_id": "8"}), "laid out unlike the first row"),
        (lines(LLAVA, LLAVA | {"text": {"a": 1}}), "laid out unlike the first row"),
        (lines(LLAVA) + "[" * 100_000 + "\n", "is no JSON"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(read, content, why):
    _, (where, fault) = read("a.jsonl", content)
    assert where == "line 2"
    assert why in fault.why


@pytest.mark.parametrize(
    ("rest", "why"), [("8\n", "has 1 fields, not 2"), ("8,a,b\n", "has 3 fields"), ('8,"a', "cut off or misquoted")]
)
def test_a_table_row_that_cannot_be_read_is_named(read, rest, why):
    first, (where, fault) = read("a.csv", "id,text\n7,B\n" + rest)
    assert (first.text, where) == ("B", "line 3")
    assert why in fault.why


def test_the_rows_behind_a_misquoted_one_are_read(read):
    first, (where, fault), *rest = read("a.csv", 'id,text\n7,B\n8,"A" is right\n9,"B\nC"\n10,D\n')
    assert (first.id, where) == ("7", "line 3")
    assert "misquoted" in fault.why
    assert [(row.id, row.text) for row in rest] == [("9", "B\nC"), ("10", "D")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.csv", "id,text\n", "holds no row"),
        ("a.csv", 'id,"te"xt\n7,B\n', "its header is cut off or misquoted"),
        ("a.json", "[]", "holds no row"),
        ("a.jsonl", "\n\n", "holds no row"),
        ("a.json", '{"samples": [{"id"', "is no JSON .*cut off"),
        ("a.xlsx", "PK", "save it as CSV or TSV .*PRED_FORMAT=tsv"),
        ("a.eval", "PK", "inspect log convert --to json"),
        ("a.txt", "B", r"ends in .txt, not in \.jsonl"),
        ("a.parquet", "PAR1", "cannot be read"),
        (
            "a.jsonl",
            '{"name": "7", "text": "B"}\n',
            "line 1, has no field that is known as an id, only name, text; .*--id",
        ),
        ("a.jsonl", '{"id": "7", "said": "B"}\n', "no field that is known as a text, only id, said; .*--text"),
    ],
)
def test_a_file_of_which_nothing_can_be_read_is_one_sentence(read, name, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read(name, content)
    assert "\n" not in str(caught.value)


def test_a_field_that_is_given_must_be_there(read):
    with pytest.raises(InputError, match="has no field key, only id, text; name it with --id"):
        read("a.jsonl", '{"id": "7", "text": "B"}\n', id="key")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="is no file and no run directory"):
        list(read_log(tmp_path / "none.jsonl", Fields()))


def test_long_texts_are_read_whole(read):
    long = "x" * 200_000
    assert said(read("a.csv", f"id,text\n7,{long}\n")) == [("7", long)]
