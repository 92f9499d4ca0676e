"""`vcot pair --preview`, and what `vcot pair` tells while it works."""

import json

import pytest

from pipeline.errors import OwedError
from pipeline.prompts import split_thought
from pipeline.records import Response
from pipeline.report import Found, Progress
from pipeline.sources.nano.questions import render_target
from services.cli.pair_commands import preview
from services.cli.terminal import Terminal
from services.run.directory import open_run
from services.run.rounds import list_rounds
from services.run.session import Session
from services.run.steps import judge_stage, pair_stage
from tests.services.fake_vllm import write_checkpoint
from tests.services.run.test_rounds import answer

SIZES = ("tasks.num_tasks=12", "sample.k=2", "eval.num_tasks=9")


HOSTILE = "\x1b[2J\u202e"


def put_hostile(session):
    """A response whose text would clear a screen."""
    request = next(iter(list_rounds(session)[0].requests()))
    task = request.task
    text = f"{HOSTILE}{render_target(task, request.prompt)}"
    thought, final = split_thought(request.prompt, render_target(task, request.prompt))
    response = Response(
        key=request.response_key(0), group=request.key, task=task.id, index=0, checkpoint=request.checkpoint,
        prompt=request.prompt, sampling=request.sampling, text=text, thought=thought, answer=final,
    )  # fmt: skip
    session.run.ledger.put([response])


@pytest.fixture
async def session(tmp_path):
    """A run whose responses are judged; of each task the first is right and the second wrong."""
    base = write_checkpoint(tmp_path / "base", "base", 1.0, kind="base")
    with open_run(tmp_path / "run", "nano", [f"model.source={base}", *SIZES]) as run:
        async with Session(run, Terminal()) as session:
            put_hostile(session)
            answer(session, list_rounds(session)[0].requests(), lambda task, index: index == 0)
            await judge_stage(list_rounds(session)[0])
            yield session


async def test_the_preview_shows_every_policy_and_examples_and_writes_nothing(session, capsys):
    before = {path: path.stat().st_mtime_ns for path in session.run.directory.rglob("*")}
    await preview(session)
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "right_wrong" in line)
    assert "12 of 12" in row
    assert "100%" in row
    assert "12 no interval" in next(line for line in out.splitlines() if "rating" in line)
    assert out.count("  chosen, 1:") == 10
    assert {path: path.stat().st_mtime_ns for path in session.run.directory.rglob("*")} == before


async def test_the_preview_for_programs_is_json_and_what_a_model_wrote_moves_no_cursor(session, capsys):
    session.report = Terminal(as_json=True)
    await preview(session)
    out = capsys.readouterr().out
    found = json.loads(out)
    assert found["policies"][0]["policy"] == found["policy"] == "best_worst"
    assert found["policies"][0]["num_pairs"] == 12
    assert found["examples"][0]["chosen"].startswith(HOSTILE)
    session.report = Terminal()
    await preview(session)
    out += capsys.readouterr().out
    assert "\\x1b[2J" in out
    assert not set(HOSTILE[::4]) & set(out)


async def test_what_is_owed_is_said_before_a_preview(session, tmp_path):
    with open_run(tmp_path / "run", access="read", overrides=["sample.k=3"]) as run:
        async with Session(run, Terminal()) as other:
            with pytest.raises(OwedError):
                await preview(other)


async def test_pairing_tells_how_far_it_is_with_the_texts(session):
    told = []
    session.report = told.append
    await pair_stage(list_rounds(session)[0])
    steps = [(event.done, event.total) for event in told if isinstance(event, Progress) and event.unit == "pairs"]
    once = [(0, 0), *((number, 12) for number in range(12))]
    assert steps == once * 2, "while they are hashed, and while they are written"
    assert not [event for event in told if isinstance(event, Found)]
