"""`vcot pair --preview`, and what `vcot pair` tells while it works."""

import json

import pytest

from tests.services.fake_vllm import write_checkpoint
from tests.services.run.test_rounds import answer
from vcot.pipeline.errors import DataError, OwedError
from vcot.pipeline.gain import key_gain
from vcot.pipeline.prompts import split_thought
from vcot.pipeline.records import ImageGain, Response
from vcot.pipeline.report import Found, Progress
from vcot.pipeline.sources.nano.questions import render_target
from vcot.services.cli.pair_commands import preview
from vcot.services.cli.terminal import Terminal
from vcot.services.run.directory import open_run
from vcot.services.run.rounds import list_rounds
from vcot.services.run.session import Session
from vcot.services.run.status import look_at_run
from vcot.services.run.steps import judge_stage, pair_stage

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
    assert found["policies"][0]["examples"][0]["chosen"].startswith(HOSTILE)
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


def set_policy(session, **fields):
    pairs = session.run.recipe.pairs.model_copy(update=fields)
    object.__setattr__(session.run, "recipe", session.run.recipe.model_copy(update={"pairs": pairs}))


def put_gains(session, value, **outcome):
    """Gains of all that may be chosen, as a server told them."""
    outcome = outcome or {"logp_true": value - 9.0, "logp_blank": -9.0}
    for _, candidates in list_rounds(session)[0].candidates():
        for one in candidates:
            fields = {"response": one.response.key, "checkpoint": one.response.checkpoint.digest}
            session.run.ledger.put([ImageGain(key=key_gain(one.response), **fields, **outcome)])


async def test_pairs_by_the_image_are_owed_until_gains_are_asked_and_need_no_server_then(session):
    set_policy(session, policy="image_driven")
    current = list_rounds(session)[0]
    assert current.policy is None, "nothing is trained yet, and that is no fault"
    with pytest.raises(OwedError, match="what the image adds to 12 responses is not asked yet; `vcot pair` asks"):
        _ = current.pairs
    put_gains(session, None, error="HTTP 500", reason="server")
    with pytest.raises(OwedError, match="12 responses"):
        _ = list_rounds(session)[0].pairs
    put_gains(session, 2.0)
    await pair_stage(list_rounds(session)[0])
    gains, pairs = session.counts[-2:]
    assert (gains.stage, gains.requested, gains.cached) == ("gain", 12, 12)
    assert (pairs.stage, pairs.ok) == ("pair", 12)


async def test_the_status_has_an_account_of_gains_where_pairs_go_by_them(session):
    async def look():
        status = await look_at_run(session, None, 0, 0.0)
        return {row.stage: row for row in status.stages}

    assert "gain" not in await look()
    set_policy(session, policy="image_driven")
    rows = await look()
    assert (rows["gain"].requested, rows["gain"].ok, rows["gain"].owed) == (12, 0, 12)
    assert "what the image adds to 12 responses is not asked yet" in rows["pair"].note
    put_gains(session, 2.0)
    rows = await look()
    assert (rows["gain"].ok, rows["gain"].owed, rows["pair"].ok) == (12, 0, 12)


async def test_a_gain_that_was_refused_is_not_owed_and_its_task_is_counted(session):
    set_policy(session, policy="image_driven")
    put_gains(session, None, error="too long", reason="too_long", refused=True)
    current = list_rounds(session)[0]
    with pytest.raises(DataError, match="cannot be split"):
        await pair_stage(current)
    assert {row.policy: row for row in current.preview().policies}["image_driven"].count.reasons == {"no_gain": 12}


async def test_the_preview_shows_what_the_image_adds(session, capsys):
    put_gains(session, 2.5)
    set_policy(session, policy="image_driven", image_margin=2.0)
    await preview(session)
    out = capsys.readouterr().out
    assert "12 of 12" in next(line for line in out.splitlines() if "│ image_driven" in line)
    assert "  chosen, 1, image gain 2.50 nats:" in out
    set_policy(session, image_margin=3.0)
    await preview(session)
    assert "12 below image margin" in capsys.readouterr().out
