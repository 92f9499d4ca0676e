"""`vcot status`: true of a run in any state, beside the command that works on it, and making nothing."""

import asyncio
import json
import os

import pytest

from tests.services.cli.test_cli import vcot
from tests.services.fake_vllm import write_checkpoint
from tests.services.run.test_results import finish
from tests.services.run.test_rounds import answer
from vcot.pipeline.odds import OptionScores
from vcot.pipeline.option_scores import key_options
from vcot.pipeline.records import ImageGain, Response
from vcot.pipeline.report import Began, Progress
from vcot.services.cli.terminal import Terminal
from vcot.services.run.directory import RECIPE, open_run
from vcot.services.run.live import recording
from vcot.services.run.rounds import list_rounds
from vcot.services.run.session import Session
from vcot.services.run.steps import judge_stage

__all__ = ["vcot"]
SIZES = ("tasks.num_tasks=12", "sample.k=2", "eval.num_tasks=9", "eval.temperatures=[0.4]")


async def begin(tmp_path, *, judged=True):
    """A run in which 9 of 12 tasks are answered, one failed and one was refused."""
    base = write_checkpoint(tmp_path / "base", "base", 1.0, kind="base")
    with open_run(tmp_path / "run", "nano", [f"model.source={base}", *SIZES], access="alone") as run:
        async with Session(run, Terminal()) as session:
            current = list_rounds(session)[0]
            requests = list(current.requests())
            answer(session, requests[:9], lambda task, index: index == 0)
            for request, refused, reason in ((requests[9], False, "connection"), (requests[10], True, "too_long")):
                fields = {"task": request.task.id, "checkpoint": request.checkpoint, "prompt": request.prompt}
                session.run.ledger.put(
                    [
                        Response(
                            key=key, group=request.key, index=i, sampling=request.sampling, error="x", reason=reason,
                            refused=refused, **fields,
                        )
                        for i, key in enumerate(request.response_keys())
                    ]
                )  # fmt: skip
            if judged:
                await judge_stage(current)
    return run.directory


def read(vcot, run, *flags):
    code, out, _ = vcot("status", "--run", run, "--json", *flags)
    assert code == 0
    return json.loads(out[out.index("{") :])


def stages(status):
    return {one["stage"]: one for one in status["stages"]}


def test_an_unfinished_run_has_an_account_of_each_stage(vcot, tmp_path):
    status = read(vcot, asyncio.run(begin(tmp_path)))
    assert (status["state"], status["problems"], status["holder"]) == ("stopped", [], 0)
    sample = stages(status)["sample"]
    numbers = {name: sample[name] for name in ("requested", "ok", "failed", "refused", "owed")}
    assert numbers == {"requested": 24, "ok": 18, "failed": 2, "refused": 2, "owed": 2}
    assert sample["reasons"] == {"connection": 2, "too_long": 2}
    judge = stages(status)["judge"]
    assert (judge["requested"], judge["ok"], judge["owed"]) == (18, 18, 0)
    assert (stages(status)["pair"]["requested"], stages(status)["pair"]["note"][-15:]) == (12, "not written yet")
    assert "load them" in stages(status)["train"]["note"]
    assert "eval" in stages(status)["eval base"]["note"], "its questions are not loaded"
    assert status["sampled"] == {"prompt_tokens": 81, "completion_tokens": 180}


def test_judges_that_a_judge_goes_by_have_accounts_of_their_own(vcot, tmp_path):
    run = asyncio.run(begin(tmp_path))
    status = read(vcot, run, "--set", "judge.kind=gated", 'judge.members=[{kind = "verifier"}]')
    found = {name: (one["ok"], one["owed"]) for name, one in stages(status).items() if name.startswith("judge")}
    assert found == {"judge, verifier/1": (18, 0), "judge": (0, 18)}


def test_a_stage_that_waits_for_another_says_for_which(vcot, tmp_path):
    status = read(vcot, asyncio.run(begin(tmp_path, judged=False)))
    assert (stages(status)["judge"]["ok"], stages(status)["judge"]["owed"]) == (0, 18)
    assert "run `vcot judge` first" in stages(status)["pair"]["note"]


def test_it_makes_nothing_and_a_run_that_is_not_there_stays_so(vcot, tmp_path):
    run = asyncio.run(begin(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    read(vcot, run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert read(vcot, tmp_path / "none")["state"] == "not begun"
    assert not (tmp_path / "none").exists()
    assert "`vcot run` begins one" in vcot("status", "--run", tmp_path / "none")[1]


def test_beside_a_command_at_work_it_says_which_and_how_far(vcot, tmp_path):
    run = asyncio.run(begin(tmp_path))
    with open_run(run, access="alone"), recording(run, "sample", lambda _: None) as report:
        report(Began("sample", "12 tasks"))
        report(Progress("responses", 5, 24, ""))
        report(Began("judge", "18 responses"))
        status = read(vcot, run)
        assert (status["state"], status["holder"], status["live"]["command"]) == ("at work", os.getpid(), "sample")
        assert (status["live"]["stage"], status["live"]["done"], status["live"]["unit"]) == ("judge", 0, "")
        assert 0 <= status["live_age_s"] < 60
        shown = vcot("status", "--run", run)[1]
    assert f"at work: vcot sample (process {os.getpid()})" in shown
    assert "sample" in shown
    assert "2 connection, 2 too long" in shown, shown


def test_a_command_that_was_killed_is_not_called_at_work(vcot, tmp_path):
    run = asyncio.run(begin(tmp_path))
    with recording(run, "sample", lambda _: None):
        left = (run / "running.json").read_bytes()  # as kill -9 leaves it
    (run / "running.json").write_bytes(left)
    assert read(vcot, run)["state"] == "stopped"
    assert "vcot sample, killed" in vcot("status", "--run", run)[1]


def test_a_finished_run_is_told_from_a_stopped_one_only_by_what_is_owed(vcot, tmp_path):
    run = asyncio.run(finish(tmp_path))
    status = read(vcot, run)
    assert {name for name in stages(status) if name.startswith("eval")} >= {"eval base"}
    assert all(stages(status)[name]["owed"] == 0 for name in ("sample", "judge", "pair"))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (RECIPE, "recipe.toml"),
        ("ledger.sqlite", "is not a ledger"),
        ("running.json", "running.json is not a Live"),
    ],
)
def test_of_a_damaged_run_the_rest_is_shown(name, told, vcot, tmp_path):
    run = asyncio.run(begin(tmp_path))
    for beside in run.glob(f"{name}-*"):
        beside.unlink()
    (run / name).write_text("no such thing = {")
    status = read(vcot, run)
    assert any(told in problem for problem in status["problems"])
    assert f"cannot be read: {status['problems'][0][:20]}" in vcot("status", "--run", run)[1]


def test_every_command_that_writes_alone_leaves_how_it_ended(vcot, tmp_path):
    run = asyncio.run(begin(tmp_path))
    vcot("judge", "--run", run)
    live = read(vcot, run)["live"]
    assert (live["command"], live["end"]) == ("judge", "done")
    assert live["accounts"][0]["cached"] == 18
    vcot("status", "--run", run)
    assert read(vcot, run)["live"]["command"] == "judge", "a reader leaves no trace"


async def score_texts(directory):
    """How likely options are, of half of what is asked, and one image gain that failed and was billed."""
    with open_run(directory, None, ["eval.margins=true"], access="alone") as run:
        async with Session(run, Terminal()) as session:
            requests = session.questions("test").option_requests(session.base.ref)
            usage = {"prompt_tokens": 40, "completion_tokens": 4}
            for request in requests[: len(requests) // 2]:
                fields = {"key": key_options(request), "task": request.task.id, "usage": usage}
                logps = tuple(map(float, range(len(request.task.choices))))
                run.ledger.put([OptionScores(checkpoint=session.base.ref.digest, logps=logps, **fields)])
            gain = {"key": "g", "response": "r", "checkpoint": session.base.ref.digest, "usage": usage}
            run.ledger.put([ImageGain(error="x", reason="not_comparable", refused=True, **gain)])
            return len(requests)


def test_margins_and_gains_have_stages_and_tokens_of_their_own(vcot, tmp_path):
    run = asyncio.run(finish(tmp_path))
    assert read(vcot, run)["scored"] == {"prompt_tokens": 0, "completion_tokens": 0}
    num = asyncio.run(score_texts(run))
    status = read(vcot, run, "--set", "eval.margins=true")
    margins = stages(status)["margins base"]
    assert (margins["requested"], margins["ok"], margins["owed"]) == (num, num // 2, num - num // 2)
    [other] = [one for name, one in stages(status).items() if name.startswith("margins ") and name != "margins base"]
    assert other["owed"] == num
    assert status["state"] == "stopped"
    scored = (num // 2 + 1) * 40, (num // 2 + 1) * 4
    assert (status["scored"]["prompt_tokens"], status["scored"]["completion_tokens"]) == scored
    _, out, _ = vcot("status", "--run", run)
    assert "image gains and options: 220 tokens" in out
    assert "margins base" not in stages(read(vcot, run))


def test_a_judge_of_the_answers_has_a_stage(vcot, tmp_path):
    run = asyncio.run(finish(tmp_path))
    judge = 'eval.judge={kind = "pointwise", model = "gpt-4o-mini", image = "none"}'
    status = read(vcot, run, "--set", judge)
    grade = stages(status)["grade"]
    assert (grade["requested"], grade["ok"], grade["owed"]) == (36, 0, 36)
    assert "by pointwise" in grade["note"]
