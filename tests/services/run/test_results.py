"""What a run found is kept for each setting; and readers read beside the run's writer, making nothing."""

import asyncio
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.services.cli.test_cli import vcot
from tests.services.fake_vllm import write_checkpoint
from tests.services.run.test_rounds import answer, train_policy
from vcot.eval.rules import RULES
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.records import Judgment, content_key
from vcot.services.checkpoints.registry import Registry
from vcot.services.cli import commands, opening
from vcot.services.cli import names as cli
from vcot.services.cli.terminal import Terminal
from vcot.services.run import results
from vcot.services.run.directory import RECIPE, open_run
from vcot.services.run.rounds import list_rounds
from vcot.services.run.session import Session

__all__ = ["vcot"]
NOT_DECIDING = {
    "serve": True, "sweep": True, "tasks": {"path", "allow_overlap"}, "sample": {"max_concurrency"},
    "train": {"report_to", "worker"},
    "judge": {"base_url", "api_key_env", "max_concurrency", "max_cost_usd", "input_usd", "output_usd"},
    "eval": {"path", "max_concurrency"},
}  # fmt: skip
SIZES = ("tasks.num_tasks=12", "sample.k=2", "eval.num_tasks=9", "eval.temperatures=[0.4]")


def opened(directory, *overrides, save=False, access="alone"):
    return open_run(directory, None, overrides, save=save, access=access)


async def finish(tmp_path):
    base = write_checkpoint(tmp_path / "base", "base", 1.0, kind="base")
    with open_run(tmp_path / "run", "nano", [f"model.source={base}", *SIZES], access="alone") as run:
        async with Session(run, Terminal()) as session:
            policy = await train_policy(session, 2.0)
            for checkpoint in (session.base, policy):
                requests = session.questions("test").requests(checkpoint.ref, ["true"])
                answer(session, requests, lambda task, index: index == 0)
            await commands.report(session)
    return run.directory


@pytest.fixture
def trained(tmp_path):
    """A run that is done: base and policy are evaluated, and the report is written."""
    return asyncio.run(finish(tmp_path))


def kinds(path):
    """The checkpoints of a results.json."""
    rows = json.loads(Path(path).read_text())["results"]
    return list(dict.fromkeys(row["checkpoint"]["kind"] for row in rows))


async def evaluate(directory, *overrides, save=False):
    """`vcot eval base` with flags, its answers there."""
    with opened(directory, *overrides, save=save) as run:
        async with Session(run, Terminal()) as session:
            answer(session, session.questions("test").requests(session.base.ref, ["true"]), lambda task, index: True)
            await commands.evaluate(session, ["base"])
            return results.find_folder(run, [session.base])


async def test_one_trial_setting_changes_nothing_of_a_finished_run(trained, capsys):
    report = trained / "report"
    before = {path.name: path.read_bytes() for path in report.iterdir()}
    assert kinds(report / "results.json") == ["base", "merged"]
    folders = {await evaluate(trained, *flags) for flags in ([], ["eval.seed=1"], ["eval.max_concurrency=3"])}
    assert len(folders) == 2, "what a flag for speed finds is the same"
    assert "settings: eval.seed=1; all else as in" in capsys.readouterr().err
    assert {kinds(folder / "results.json") == ["base"] for folder in folders} == {True}
    assert {path.name: path.read_bytes() for path in report.iterdir() if path.is_file()} == before
    with opened(trained, access="read") as run:
        async with Session(run, Terminal()) as session:
            await commands.report(session)
    assert kinds(report / "results.json") == ["base", "merged"]


async def test_tables_and_figures_are_written_where_they_are_wanted(trained, tmp_path):
    with opened(trained, access="read") as run:
        async with Session(run, Terminal()) as session:
            await commands.report(session, tmp_path / "tables")
    files = {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()}
    tables = ("results", "differences", "matrix", "matrix-differences")
    named = {f"{name}.{kind}" for name in tables for kind in ("csv", "parquet")}
    assert set(files) == {*named, "tables.md", "table-1.tex", "matrix.tex", "accuracy.svg", "differences.svg"}
    assert b"Paired differences in points" in files["tables.md"]
    assert b"of read" in files["tables.md"]
    for name in ("accuracy.svg", "differences.svg"):
        assert ElementTree.fromstring(files[name]).tag == "{http://www.w3.org/2000/svg}svg"


async def test_under_our_own_rule_the_parser_matrix_says_what_table_1_says(trained):
    with opened(trained, access="read") as run:
        async with Session(run, Terminal()) as session:
            await commands.report(session)
    found = json.loads((trained / "report" / "results.json").read_text())
    own = {row["log"]: row for row in found["matrix"]["results"] if row["rule"] == "vcot"}
    table = {f"{row['checkpoint']['name']}, {row['prompt']} at {row['temperature']:g}": row for row in found["results"]}
    assert own.keys() == table.keys()
    for log, row in own.items():
        assert (row["accuracy"], row["num_scored"]) == (table[log]["accuracy"], table[log]["num_scored"])
        assert row["no_answer"] == pytest.approx(table[log]["no_answer"])
    assert {row["rule"] for row in found["matrix"]["results"]} == set(RULES.built_ins)
    assert "Parser matrix" in (trained / "report" / "index.html").read_text("utf-8")


@pytest.mark.parametrize(
    "command",
    [
        *(("report",), ("eval", "base"), ("status",), ("doctor",), ("pair", "--preview")),
        *(("checkpoints", "list"), ("checkpoints", "show", "base")),
    ],
)
def test_with_json_a_command_prints_its_figures_as_one_document_and_nothing_else(trained, vcot, capsys, command):
    capsys.readouterr()
    _, out, _ = vcot(*command, "--json", "--run", trained)
    assert json.loads(out)


async def test_other_settings_have_a_page_of_their_own(trained):
    def training(session):
        return list_rounds(session)[0].job

    with opened(trained, "train.epochs=7") as run:
        async with Session(run, Terminal()) as session:
            name = training(session).checkpoint_name
            session.registry.register(write_checkpoint(run.path("checkpoints", name), name, 3.0))
            other = session.registry.resolve(name)
            answer(session, session.questions("test").requests(other.ref, ["true"]), lambda task, index: True)
            await commands.report(session)
            folder = results.find_folder(run)
    assert folder.parent == trained / "report"
    assert name in (folder / "index.html").read_text()
    assert "Settings: train.epochs=7.0; all else as in" in (folder / "index.html").read_text()
    assert name not in (trained / "report" / "index.html").read_text()


async def test_a_recipe_that_is_changed_for_good_leaves_the_earlier_results_beside(trained):
    before = (trained / "report" / "results.json").read_bytes()
    with opened(trained, "eval.seed=1", save=True) as run:
        async with Session(run, Terminal()) as session:
            for checkpoint in (session.base, list_rounds(session)[0].policy):
                answer(session, session.questions("test").requests(checkpoint.ref, ["true"]), lambda task, index: True)
            await commands.report(session)
    assert (trained / "report" / "results.json").read_bytes() != before
    (kept,) = (trained / "report").glob("*/results.json")
    assert kept.read_bytes() == before
    with opened(trained, "eval.seed=0", access="read") as run:
        assert results.find_folder(run) == kept.parent, "where the same settings are looked for"


def test_a_setting_that_is_added_later_with_a_default_moves_no_results(trained):
    """A run of an earlier version does not name it, and what it found is not put aside as that of other settings."""
    with opened(trained, "eval.seed=1") as run:
        folder = results.find_folder(run)
    named = [line for line in (trained / RECIPE).read_text("utf-8").splitlines() if line.startswith("max_meta = 0")]
    assert named
    text = (trained / RECIPE).read_text("utf-8")
    (trained / RECIPE).write_text(text.replace(named[0], ""))
    with opened(trained, "eval.seed=1") as run:
        decided = run.recipe.model_dump(mode="json", exclude=NOT_DECIDING, exclude_defaults=True)
        assert results.find_folder(run) == folder
    assert "max_meta" not in decided["judge"]
    assert folder.name == content_key(settings=decided, checkpoints=())[:12]


READERS = {
    "status": ("status",),
    "report": ["report"],
    "pair --preview": ["pair", "--preview"],
    "eval --plan": ["eval", "--plan"],
    "checkpoints list": ["checkpoints"],
    "checkpoints show": ["checkpoints", "show", "base"],
    "checkpoints retire": ["checkpoints", "retire", "none"],
    "swap": ["swap", "policy", "base"],
    "replicas list": ["replicas"],
    "replicas add": ["replicas", "add"],
    "replicas remove": ["replicas", "remove", "vllm-0"],
    "push pairs": ["push", "pairs", "me/pairs", "--dry-run"],
    "push checkpoint": ["push", "checkpoint", "me/policy", "--dry-run"],
    "export": ["export", "--out", "../exported"],
}
WRITERS = [
    *(["run"], ["demo"], ["rounds"], ["sample"], ["judge"], ["pair"], ["train"], ["sweep"], ["merge"], ["parity"]),
    *(["eval"], ["probe"], ["checkpoints", "add", "."]),
]
NO_SERVER = {"swap", "replicas list", "replicas add", "replicas remove"}


def test_readers_read_beside_a_writer(trained, vcot):
    """A writer that holds the run and its ledger, in the middle of its work."""
    for card in (*trained.glob("pairs/*"), *trained.glob("checkpoints/dpo-*")):
        (card / "README.md").write_text("---\nbase_model: nano\n---\n")
    assert set(READERS) == set(opening.READS)
    (trained / "report" / "index.html").unlink()
    with opened(trained) as run:
        run.ledger.put([Judgment(key="k", response="r", task="t", judge="j", score=1.0)])
        for name, arguments in READERS.items():
            code, _, err = vcot(*arguments, "--run", trained)
            assert "another vcot command" not in err, name
            expected = (
                "no server runs" if name in NO_SERVER else "no checkpoint 'none'" if name.endswith("retire") else ""
            )
            assert (code == 2) == bool(expected), err
            assert expected in err
        assert "</html>" in (trained / "report" / "index.html").read_text()
        for arguments in WRITERS:
            code, _, err = vcot(*arguments, "--run", trained)
            assert (code, "another vcot command is writing" in err) == (2, True), arguments
        run.ledger.close()


def test_a_reader_makes_no_file(trained, vcot):
    def files():
        return {path for path in trained.rglob("*") if "report" not in path.parts}

    before = files()
    for name, arguments in READERS.items():
        vcot(*arguments, "--run", trained)
        assert files() == before, name


def test_every_command_is_a_reader_a_writer_or_has_no_run():
    names = {" ".join(arguments) for arguments in WRITERS} | set(READERS)
    names = {name.removesuffix(" .") for name in names}
    groups = {"checkpoints", "push", "replicas", "nano"}
    found = {name for name in cli.app if not name.startswith("-") and name not in groups}
    found |= {"pair --preview", "eval --plan"}
    found |= {f"{group} {name}" for group in groups for name in cli.app[group] if not name.startswith("-")}
    assert found == names | {"serve", "prepare", "engine", "worker", "view", "doctor", "recipe", "nano build", "score"}


def test_a_reader_sees_one_moment_of_the_ledger(tmp_path):
    def judgment(key):
        return Judgment(key=key, response="r", task="t", judge="j", score=1.0)

    writer = Ledger(tmp_path / "ledger.sqlite")
    writer.put([judgment("a")])
    reader = Ledger(tmp_path / "ledger.sqlite", is_read=True)
    writer.put([judgment("b")])
    assert reader.done(Judgment, ["a", "b"]) == {"a"}
    with pytest.raises(Exception, match="readonly"):
        reader.put([judgment("c")])
    writer.close()
    reader.close()
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.sqlite"]


def test_a_ledger_that_may_only_be_read_is_read(tmp_path, monkeypatch):
    Ledger(tmp_path / "ledger.sqlite").close()
    monkeypatch.setattr("os.access", lambda *_: False)
    reader = Ledger(tmp_path / "ledger.sqlite", is_read=True)
    assert reader.is_empty()
    reader.close()
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.sqlite"]


def test_a_report_of_what_was_not_asked_says_so_and_leaves_no_folder(tmp_path, vcot):
    base = write_checkpoint(tmp_path / "base", "base", 1.0, kind="base")
    with open_run(tmp_path / "run", "nano", [f"model.source={base}"]) as run:
        pass
    code, _, err = vcot("report", "--run", run.directory)
    assert (code, "does not hold its model yet" in err) == (2, True)
    assert [path.name for path in run.directory.iterdir()] == [RECIPE]
    with opened(run.directory) as writing:
        assert Registry(run.directory).base(writing.recipe.model)
    code, _, err = vcot("report", "--run", run.directory)
    assert (code, "does not hold the questions of nano" in err) == (2, True), err
    assert not (run.directory / "report").exists()
    assert not (run.directory / "tasks").exists()
