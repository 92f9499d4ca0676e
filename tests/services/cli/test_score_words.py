"""`vcot score` of answers in words: by the rule of our own evaluations, with the same accounts, intervals and comparison."""

import json

import pytest

from tests.services.cli.test_cli import vcot  # noqa: F401 - a fixture
from tests.services.fake_vllm import write_checkpoint
from vcot.pipeline.records import Response
from vcot.services.cli.terminal import Terminal
from vcot.services.run.directory import open_run
from vcot.services.run.session import Session
from vcot.services.run.steps import load_scores

ROWS = [{"q": f"What is it, number {number}?", "a": ["cab", "taxi"]} for number in range(6)]
COLUMNS = ("--columns", "question=q", "image=", "choices=", "answer=a")
TABLE = ("--benchmark", "table", "--path", "mine.jsonl", *COLUMNS)


@pytest.fixture(autouse=True)
def questions(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "mine.jsonl", ROWS)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def said(*texts):
    return [
        {"id": number, "question": row["q"], "text": text}
        for number, (row, text) in enumerate(zip(ROWS, texts, strict=False))
    ]


def test_answers_in_words_are_scored_by_exact_match_and_compared(vcot, tmp_path):  # noqa: F811
    write(tmp_path / "a.jsonl", said("a bus", "The bus.", "", "cab", "tram", "train"))
    write(tmp_path / "b.jsonl", said("The cab!", "TAXI", "a cab", "cab", "cab.", "A taxi"))
    code, out, err = vcot("score", "a.jsonl", "b.jsonl", *TABLE, "--json")
    found = json.loads(out)
    assert code == 0, err
    rows = {row["log"]: row for row in found["results"]}
    assert rows["a.jsonl"]["accuracy"]["Avg"]["value"] == pytest.approx(1 / 6)
    assert (rows["a.jsonl"]["no_answer"], rows["a.jsonl"]["reasons"]) == (pytest.approx(1 / 6), {"none": 1})
    assert rows["b.jsonl"]["accuracy"]["Avg"]["value"] == 1
    assert [row["rule"] for row in found["results"]] == ["vcot", "vcot"]
    [difference] = found["differences"]
    assert (difference["log"], difference["base"], difference["num_questions"]) == ("b.jsonl", "a.jsonl", 6)
    assert difference["accuracy"]["value"] == pytest.approx(5 / 6)
    assert found["chance"] == {"Avg": 0}


def test_rules_for_options_do_not_apply_and_a_sentence_says_so(vcot, tmp_path):  # noqa: F811
    write(tmp_path / "a.jsonl", said(*["cab"] * 6))
    code, out, _ = vcot("score", "a.jsonl", *TABLE, "--rules", "all", "--tables", "out")
    assert code == 0
    words = " ".join(out.split())
    assert "table has questions that are answered in words, which no rule for options reads" in words
    assert "lmms_eval" not in out
    assert "answered in words" in (tmp_path / "out" / "tables.md").read_text()


def test_every_row_is_accounted_for(vcot, tmp_path):  # noqa: F811
    rows = [*said("cab", "cab"), {"id": "x", "question": "Who?", "text": "cab"}, *said("taxi")]
    write(tmp_path / "a.jsonl", [*rows, {"id": 9, "question": ROWS[3]["q"], "text": None}])
    code, out, err = vcot("score", "a.jsonl", *TABLE, "--json")
    [account] = json.loads(out)["accounts"]
    assert code == 0
    assert account["count"]["reasons"] == {"unknown": 1, "doubled": 1, "no_text": 1}
    assert "4 of 6 questions have no response" in err


def test_questions_that_differ_only_in_their_answer_are_not_mixed_up(vcot, tmp_path):  # noqa: F811
    write(tmp_path / "mine.jsonl", [{"id": name, "q": "What is it?", "a": a} for name, a in ("xa", "yb")])
    write(tmp_path / "a.jsonl", [{"id": name, "question": "What is it?", "text": "b"} for name in ("x", "y", "z")])
    code, out, _ = vcot("score", "a.jsonl", *TABLE, "id=id", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["accounts"][0]["count"]["reasons"] == {"unknown": 1}
    assert found["results"][0]["accuracy"]["Avg"]["value"] == 0.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--columns", "question"), "--columns question names no column; write it as question=q"),
        (("--columns", "questoin=q"), "--columns: columns.questoin"),
        ((), "source table needs to know your columns: set tasks.columns, eval.columns or --columns"),
        (
            ("--columns", "question=q", "image=", "choices=", "answer="),
            "no gold answer, so that only a judge could score it",
        ),
    ],
)
def test_what_cannot_be_scored_is_one_sentence_with_a_remedy(vcot, tmp_path, flags, message):  # noqa: F811
    write(tmp_path / "a.jsonl", said("cab"))
    code, out, err = vcot("score", "a.jsonl", *TABLE[:4], *flags)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


@pytest.fixture
async def evaluated(tmp_path):
    """A run of the same questions, whose recipe has a judge, and what its own rule says of its answers."""
    base = write_checkpoint(tmp_path / "base", "base", 1.0, kind="base")
    columns = '{question = "q", image = "", choices = "", answer = "a"}'
    settings = (
        *(f"model.source={base}", "eval.benchmark=table", "eval.num_tasks=", f"eval.path={tmp_path / 'mine.jsonl'}"),
        *(f"eval.columns={columns}", 'eval.prompts=["short_answer"]', "eval.temperatures=[0.4]"),
    )
    with open_run(tmp_path / "run", "nano", settings) as run:
        async with Session(run, Terminal()) as session:
            for number, request in enumerate(session.questions("test").requests(session.base.ref)):
                keep(session, request, ["The cab", "bus", "taxi."][number % 3], is_cut=number == 0)
            scores = load_scores(session, [session.base], "test")["true"]
            return sum(score.earned for score in scores) / len(scores)


def keep(session, request, text, *, is_cut):
    session.run.ledger.put([
        Response(
            key=request.response_key(0), group=request.key, task=request.task.id, index=0, checkpoint=request.checkpoint,
            prompt=request.prompt, sampling=request.sampling, text=text, finish_reason="length" if is_cut else "stop",
        )
    ])  # fmt: skip


def test_a_runs_answers_have_the_figures_of_its_evaluation(vcot, tmp_path, evaluated):  # noqa: F811
    write(tmp_path / "a.jsonl", said(*["cab"] * 6))
    code, out, _ = vcot("score", "run", "a.jsonl", "--json")
    found = json.loads(out)
    assert code == 0
    rows = {row["log"]: row for row in found["results"]}
    assert rows["run base, short_answer at 0.4"]["accuracy"]["Avg"]["value"] == pytest.approx(evaluated) == 0.5
    assert rows["run base, short_answer at 0.4"]["reasons"] == {"cut": 1}
    assert found["differences"][0]["accuracy"]["value"] == 0.5
    assert len(found["notes"]) == 1


def test_a_run_whose_judge_scores_says_where_its_figures_are(vcot, tmp_path, evaluated):  # noqa: F811
    judge = 'eval.judge={kind = "pointwise", model = "gpt-4o-mini", image = "none", gold = true}'
    with open_run(tmp_path / "run", None, [judge], save=True, access="alone"):
        pass
    code, out, _ = vcot("score", "run", "--json")
    assert code == 0
    assert "here no judge is asked, and `vcot report` has its figures" in json.loads(out)["notes"][1]
