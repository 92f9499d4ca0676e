"""`vcot score`: logs of other tools and answers of a run, side by side, and every row accounted for."""

import asyncio
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.pages import list_blocks
from tests.pipeline.sources.test_sources import ScienceQA
from tests.services.cli.test_cli import vcot  # noqa: F401 - a fixture
from tests.services.fake_vllm import write_checkpoint
from vcot.eval.logged.matching import REASONS
from vcot.eval.rules import RULES
from vcot.pipeline.records import Response
from vcot.services.cli.terminal import Terminal
from vcot.services.run.directory import open_run
from vcot.services.run.session import Session


@pytest.fixture(autouse=True)
def science(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    science = ScienceQA(tmp_path / "data")
    science.write()
    return science


BENCHMARK = ("--benchmark", "scienceqa", "--split", "validation", "--path", "data")


def write_log(path, *rows):
    path.write_text("".join(json.dumps({"question_id": pid, "text": text}) + "\n" for pid, text in rows))
    return path


def answers(text):
    return [(str(number), text) for number in range(1, 7)]


def test_a_log_is_scored_under_every_rule(vcot, tmp_path):  # noqa: F811
    write_log(tmp_path / "a.jsonl", *answers("The answer is B")[:5], ("6", "B. that"))
    code, out, err = vcot("score", "a.jsonl", *BENCHMARK, "--rules", "all", "--json")
    found = json.loads(out)
    assert code == 0
    right = {row["rule"]: round(row["accuracy"]["Avg"]["value"], 3) for row in found["results"]}
    assert right == {
        "vcot": 1, "scienceqa": 0.5, "llava": 0.167, "lmms_eval": 0.167, "vlmevalkit": 1, "inspect": 0
    }  # fmt: skip
    assert {row["rule"]: row["no_answer"] for row in found["results"]}["inspect"] == 1
    assert found["chance"] == {"Avg": 0.5, "NAT": 0.5}
    assert "6 requested = 6 ok + 0 cached" in err


def test_the_table_shows_each_rule_and_the_difference_between_two_files(vcot, tmp_path):  # noqa: F811
    write_log(tmp_path / "a.jsonl", *answers("I do not know."))
    write_log(tmp_path / "b.jsonl", *answers("ANSWER: B"))
    code, out, _ = vcot("score", "a.jsonl", "b.jsonl", *BENCHMARK, "--rules", "vcot", "inspect")
    assert code == 0
    assert "b.jsonl - a.jsonl" in out
    assert "b.jsonl answers more questions right than a.jsonl under vcot (+100.0 points" in out
    rules = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and line.strip()]
    assert [name for name in rules if name in ("vcot", "inspect")] == ["vcot", "inspect"] * 3


def test_rows_that_are_not_scored_are_counted_and_named(vcot, tmp_path):  # noqa: F811
    log = write_log(tmp_path / "a.jsonl", ("1", "B"), ("2", "B"), ("1", "A"), ("99", "B"), ("3", None))
    log.write_text(log.read_text() + '{"question_id": "4", "te')
    code, out, err = vcot("score", "a.jsonl", *BENCHMARK, "--json")
    [account] = json.loads(out)["accounts"]
    assert code == 0
    assert account["count"]["reasons"] == {"doubled": 1, "unknown": 1, "no_text": 1, "unreadable": 1}
    assert (account["count"]["requested"], account["count"]["ok"], account["num_missing"]) == (6, 2, 4)
    assert "6 requested = 2 ok + 0 cached + 1 failed + 3 refused" in err
    for named in ("1 doubled, as line 3 (id 1)", "1 unknown, as line 4 (id 99)", "1 no text, as line 5 (id 3)"):
        assert named in err
    assert "1 unreadable, as line 6 is cut off" in err
    assert "4 of 6 questions have no response" in err


def test_a_files_name_that_no_encoding_can_say_is_written_out(vcot, tmp_path):  # noqa: F811
    write_log(tmp_path / "caf\udce9.jsonl", *answers("ANSWER: B"))
    code, out, _ = vcot("score", "caf\udce9.jsonl", *BENCHMARK, "--tables", "out", "--json")
    assert (code, json.loads(out)["results"][0]["log"]) == (0, r"caf\udce9.jsonl")


def test_several_responses_to_a_question(vcot, tmp_path):  # noqa: F811
    write_log(tmp_path / "a.jsonl", *answers("B"), *answers("A"), *answers("B"))
    _, out, _ = vcot("score", "a.jsonl", *BENCHMARK, "--json", "--repeated")
    [row] = json.loads(out)["results"]
    assert (row["num_scored"], row["num_questions"], row["accuracy"]["Avg"]["n"]) == (18, 6, 6)
    assert row["accuracy"]["Avg"]["value"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a log file or a run directory"),
        (("a.jsonl",), "does not say what was asked; name it, as with --benchmark"),
        (("a.jsonl", "--benchmark", "sciencqa"), "do you mean scienceqa"),
        (("a.jsonl", *BENCHMARK, "--rules", "lava"), "do you mean llava"),
        (("a.jsonl", "a.jsonl", *BENCHMARK), "name each file once"),
        (("a.jsonl", "--benchmark", "scienceqa", "--path", "data", "--split", "test"), "split test, holds no question"),
        (
            ("b.jsonl", *BENCHMARK),
            "holds no response that can be scored; 1 unknown, as line 1 (id 77): the benchmark has",
        ),
    ],
)
def test_what_cannot_be_scored_is_one_sentence(vcot, tmp_path, arguments, message):  # noqa: F811
    write_log(tmp_path / "a.jsonl", ("1", "B"))
    write_log(tmp_path / "b.jsonl", ("77", "B"))
    code, out, err = vcot("score", *arguments)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_a_gold_answer_out_of_range_in_the_benchmark_is_told(vcot, tmp_path, science):  # noqa: F811
    science.problems["3"]["answer"] = 7
    science.write()
    write_log(tmp_path / "a.jsonl", ("1", "B"))
    code, _, err = vcot("score", "a.jsonl", *BENCHMARK)
    assert code == 2
    assert "problem 3: task scienceqa/" in err
    assert "answer 7 is not an index into 2 choices" in err


def test_the_documented_rule_of_ones_own(vcot, tmp_path, monkeypatch):  # noqa: F811
    [code] = list_blocks("A rule of your own", "python", "scoring.md")
    (tmp_path / "last_letter.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_log(tmp_path / "a.jsonl", *answers("so it is B")[:5], ("6", "so it is"))
    _, out, _ = vcot("score", "a.jsonl", *BENCHMARK, "--rules", "last_letter:LAST_LETTER", "--json")
    [row] = json.loads(out)["results"]
    assert (row["rule"], row["of_read"], row["reasons"]) == ("last_letter:LAST_LETTER", 1, {"no_capital": 1})


def test_the_page_has_every_rule_with_its_commit_and_every_reason():
    page = (Path(__file__).parents[3] / "docs" / "scoring.md").read_text("utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert list(rows) == list(RULES.built_ins)
    for name, path in RULES.built_ins.items():
        source = import_module(path.partition(":")[0]).__doc__
        assert name == "vcot" or re.search(r"\b[0-9a-f]{8}\b", rows[name])[0] in source
    for reason in REASONS:
        assert f"*{reason.replace('_', ' ')}*" in page


@pytest.fixture
async def run(tmp_path):
    """A run that holds answers of two checkpoints, the second of which is right."""
    return await make_run(tmp_path)


async def make_run(tmp_path, *more):
    base = write_checkpoint(tmp_path / "base", "base", 1.0, kind="base")
    settings = [f"model.source={base}", "eval.prompts=['zero_shot']", "eval.temperatures=[0.4]", "eval.num_tasks=30"]
    with open_run(tmp_path / "run", "nano", [*settings, *more]) as run:
        async with Session(run, Terminal()) as session:
            policy = session.registry.register(
                write_checkpoint(tmp_path / "run" / "checkpoints" / "dpo-1", "dpo-1", 2.0)
            )
            for checkpoint in (session.base, policy):
                keep_answers(session, checkpoint)
            return [(task.id, f"({task.answer_letter})") for task in session.questions("test").tasks]


def keep_answers(session, checkpoint):
    """An answer to each question: right, or cut off, or none."""
    for number, request in enumerate(session.questions("test").requests(checkpoint.ref)):
        text = f"The answer is {request.task.answer_letter}." if checkpoint.ref.name == "dpo-1" else "Hm."
        session.run.ledger.put([
            Response(
                key=request.response_key(0), group=request.key, task=request.task.id, index=0, checkpoint=request.checkpoint,
                prompt=request.prompt, sampling=request.sampling, text=text, finish_reason="stop" if number else "length",
            )
        ])  # fmt: skip


def test_the_tables_are_written_where_they_are_wanted(vcot, tmp_path):  # noqa: F811
    write_log(tmp_path / "a_b.jsonl", *answers("ANSWER: B"))
    code, out, err = vcot("score", "a_b.jsonl", *BENCHMARK, "--rules", "vcot", "inspect", "--tables", "out", "--json")
    assert (code, len(json.loads(out)["results"])) == (0, 2)
    assert "matrix.csv" in err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "tables.md",
        "matrix.tex",
        "matrix.csv",
        "matrix.parquet",
    }
    assert r"a\_b.jsonl & " in (tmp_path / "out" / "matrix.tex").read_text()


def test_a_runs_answers_are_scored_and_its_checkpoints_compared(vcot, run):  # noqa: F811
    code, out, _ = vcot("score", "run", "--rules", "all", "--json")
    found = json.loads(out)
    assert code == 0
    right = {(row["log"], row["rule"]): row["accuracy"]["Avg"]["value"] for row in found["results"]}
    assert right["run dpo-1, zero_shot at 0.4", "vcot"] == pytest.approx(29 / 30)
    assert right["run dpo-1, zero_shot at 0.4", "llava"] == 1
    assert {(d["log"], d["base"]) for d in found["differences"]} == {
        ("run dpo-1, zero_shot at 0.4", "run base, zero_shot at 0.4")
    }
    reasons = {row["log"]: row["reasons"] for row in found["results"] if row["rule"] == "vcot"}
    assert reasons["run base, zero_shot at 0.4"] == {"none": 29, "cut": 1}


def test_a_runs_answers_under_several_seeds_are_several_responses(vcot, tmp_path):  # noqa: F811
    asyncio.run(make_run(tmp_path, "eval.num_seeds=2"))
    code, out, err = vcot("score", "run", "--json")
    assert (code, "doubled" in err) == (0, False)
    assert {(row["num_questions"], row["num_scored"]) for row in json.loads(out)["results"]} == {(30, 60)}


def test_a_log_is_compared_with_a_run(vcot, tmp_path, run):  # noqa: F811
    write_log(tmp_path / "a.jsonl", *run)
    code, out, _ = vcot("score", "run", "a.jsonl", "--json")
    differences = {(d["log"], d["base"]): d["accuracy"]["value"] for d in json.loads(out)["differences"]}
    assert code == 0
    assert differences["a.jsonl", "run base, zero_shot at 0.4"] == 1
    code, out, _ = vcot("score", "a.jsonl", "run", "--json")
    differences = {(d["log"], d["base"]): d["accuracy"]["value"] for d in json.loads(out)["differences"]}
    assert differences["run base, zero_shot at 0.4", "a.jsonl"] == -1


def test_a_run_says_itself_what_it_asked(vcot, run):  # noqa: F811
    code, _, err = vcot("score", "run", *BENCHMARK)
    assert code == 2
    assert "leave --benchmark out" in err
