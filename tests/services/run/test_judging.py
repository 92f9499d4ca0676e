"""A run whose judge is a model: what its faults stop, what is said of money, and that no training set is made of luck."""

import re

import httpx2
import pytest

from tests.rehearsal.openai_api import Settings, create_app
from tests.services.fake_vllm import write_checkpoint
from tests.services.run.simulated_judge import KIND, TRANSPORTS
from vcot.pipeline.errors import AccountError, InputError, RecipeError, StageError
from vcot.pipeline.prompts import PROMPTS
from vcot.pipeline.records import Response
from vcot.pipeline.report import Began
from vcot.services.cli.commands import run_all
from vcot.services.cli.terminal import Terminal
from vcot.services.run.billing import count_owed, read_cost, test_judge
from vcot.services.run.directory import open_run
from vcot.services.run.rounds import list_rounds, make_judge
from vcot.services.run.session import Session
from vcot.services.run.steps import judge_stage, pair_stage

pytestmark = pytest.mark.hurried
ask_once = test_judge
del test_judge  # or pytest takes it for a test
SIZES = ("tasks.num_tasks=24", "sample.k=2", "eval.num_tasks=9", f"judge.kind={KIND}", "judge.model=gpt-4o-mini")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-rehearsal")
    monkeypatch.setenv("COLUMNS", "300")
    yield
    TRANSPORTS.clear()


@pytest.fixture
def serve():
    """Puts a simulated API behind every judge; gives it."""

    def start(**faults):
        app = create_app(Settings(faults=faults))
        TRANSPORTS.append(httpx2.ASGITransport(app=app))
        return app.state.api.counts

    return start


@pytest.fixture
async def session(tmp_path):
    """A run whose 48 responses are there."""
    base = write_checkpoint(tmp_path / "base", "base", 1.0, kind="base")
    with open_run(tmp_path / "run", "nano", [f"model.source={base}", *SIZES]) as run:
        async with Session(run, Terminal()) as session:
            for request in list_rounds(session)[0].requests():
                session.run.ledger.put([make_response(request, index) for index in range(2)])
            yield session


def make_verdict():
    """An answer without usage."""
    message = {"role": "assistant", "content": '{"rationale": "x", "score": 7}'}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return httpx2.Response(200, json=body)


def make_response(request, index):
    return Response(
        key=request.response_key(index), group=request.key, task=request.task.id, index=index,
        checkpoint=request.checkpoint, prompt=request.prompt, sampling=request.sampling,
        text=f"The thing is {request.task.id} {index}. <R> The answer is (A).",
    )  # fmt: skip


def set_judge(session, **fields):
    judge = session.run.recipe.judge.model_copy(update=fields)
    object.__setattr__(session.run, "recipe", session.run.recipe.model_copy(update={"judge": judge}))


@pytest.mark.parametrize("fault", ["quota_after", "key_after"])
async def test_no_training_set_is_made_of_the_part_that_was_judged_before_the_account_ended(session, serve, fault):
    serve(**{fault: 20})
    current = list_rounds(session)[0]
    with pytest.raises(AccountError):
        await judge_stage(current)
    assert 0 < current.standing(make_judge(current.session)).num_judged < 48
    with pytest.raises(InputError, match=r"\d+ of 48 responses are not judged yet; `vcot judge` goes on"):
        await pair_stage(current)
    assert current.policy is None
    serve()
    await judge_stage(current)
    await pair_stage(current)
    assert len(current.pairs.scores) == 48


async def test_too_many_without_a_verdict_stop_the_run_and_few_are_said_by_reason(session, serve, capsys):
    serve(refusal=0.2)
    current = list_rounds(session)[0]
    with pytest.raises(StageError, match=r"of 48 responses were not judged \(\d+ refusal\).*judge\.max_asks=2"):
        await judge_stage(current)
    with pytest.raises(InputError, match=r"judge\.max_unjudged = 0\.02"):
        await pair_stage(current)
    set_judge(session, max_unjudged=0.5)
    await judge_stage(current)
    await pair_stage(current)
    num_refused = sum(current.standing(make_judge(current.session)).refused.values())
    err = capsys.readouterr().err
    assert f"+ {num_refused} refused ({num_refused} refusal)" in err
    card = (current.pairs.directory / "README.md").read_text()
    assert f"| responses judged | {48 - num_refused} of 48; the others: {num_refused} refusal |" in card
    assert re.search(r"\| judging took \| \d+ requests: [\d.]+ k tokens", card)
    assert "| held out | none of 9 evaluation questions is among the 24 for training |" in card
    assert PROMPTS.resolve("thought_specific").template in card
    assert make_judge(session).list_templates()[0] in card
    assert f"| SHA-256 of the rows | {current.pairs.digest} |" in card


async def test_a_training_set_of_less_than_half_of_the_tasks_is_said_loudly(session, serve, capsys):
    serve(refusal=0.5)
    set_judge(session, max_unjudged=0.9)
    current = list_rounds(session)[0]
    await judge_stage(current)
    await pair_stage(current)
    count = current.pairs.pair_set.count
    assert count.ok < 12
    warned = next(line for line in capsys.readouterr().err.splitlines() if "warning  only" in line)
    assert f"only {count.ok} of 24 tasks gave a pair ({count.by_reason})" in warned
    assert "refusal)" in warned


async def test_a_run_tests_its_judge_before_it_samples_while_judging_is_owed(session, serve, capsys):
    session.report = stopped_at("sample", session.report)
    counts = serve(key_after=0)
    with pytest.raises(AccountError, match=r"judge pointwise/1:gpt-4o-mini: .*Incorrect API key.*set OPENAI_API_KEY"):
        await run_all(session)
    counts = serve()
    with pytest.raises(Stopped):
        await run_all(session)
    assert counts["calls"] == 1
    err = capsys.readouterr().err
    assert "the test response got" in err
    assert "estimate for 48 requests: 150.5 k tokens, $0.023" in err
    assert "at OpenAI's prices of June 2026 ($0.15 and $0.6 per million tokens)" in err
    await judge_stage(list_rounds(session)[0])
    assert (count_owed(session, make_judge(session)), counts["calls"]) == (0, 49)
    with pytest.raises(Stopped):
        await run_all(session)
    assert counts["calls"] == 49


class Stopped(Exception):
    pass


def stopped_at(step, report):
    """A listener that stops the command where a step begins."""

    def listen(event):
        report(event)
        if isinstance(event, Began) and event.step == step:
            raise Stopped

    return listen


async def test_what_is_still_to_be_sampled_is_owed_too(session, serve):
    rounds = session.run.recipe.rounds.model_copy(update={"num": 3})
    recipe = session.run.recipe.model_copy(update={"rounds": rounds})
    object.__setattr__(session.run, "recipe", recipe)
    serve()
    assert count_owed(session, make_judge(session)) == 3 * 48
    await judge_stage(list_rounds(session)[0])
    assert count_owed(session, make_judge(session)) == 2 * 48


async def test_the_estimate_warns_of_the_cap_and_the_sum_is_said(session, serve, capsys):
    serve()
    set_judge(session, max_cost_usd=0.012)
    current = list_rounds(session)[0]
    with pytest.raises(AccountError, match=r"judge\.max_cost_usd"):
        await judge_stage(current)
    set_judge(session, max_cost_usd=1.0)
    await judge_stage(current)
    err = capsys.readouterr().err
    assert "judging will stop at about 2" in err
    assert "paid for 48 requests: 14" in err
    cost = read_cost(session)
    assert (cost.num_requests, cost.usd) == (48, pytest.approx(0.021, rel=0.1))


async def test_a_cap_without_prices_is_bad_input(session, serve):
    serve()
    set_judge(session, model="mine", max_cost_usd=1.0)
    with pytest.raises(RecipeError, match="the prices of mine are not known"):
        await judge_stage(list_rounds(session)[0])


async def test_a_judge_that_does_not_answer_the_test_stops_before_sampling(session):
    gone = httpx2.MockTransport(lambda request: httpx2.Response(503))
    TRANSPORTS.append(gone)
    async with make_judge(session) as judge:
        with pytest.raises(StageError, match=r"judge pointwise/1:gpt-4o-mini does not answer: HTTP 503"):
            await ask_once(session, judge, 1)


@pytest.mark.parametrize(
    ("reply", "error", "said"),
    [
        (
            httpx2.Response(400, json={"error": {"message": "json_schema is not supported"}}),
            AccountError,
            r"does not take the question: .*json_schema is not supported; choose another judge\.model",
        ),
        (make_verdict(), RecipeError, r"judge\.max_cost_usd = 1 cannot be kept: .* tells no tokens"),
    ],
)
async def test_a_test_shows_what_would_be_wrong_with_every_judgment(session, reply, error, said):
    set_judge(session, max_cost_usd=1.0)
    transport = httpx2.MockTransport(lambda request: reply)
    TRANSPORTS.append(transport)
    with pytest.raises(error, match=said):
        await judge_stage(list_rounds(session)[0])
