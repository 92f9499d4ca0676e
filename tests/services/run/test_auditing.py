"""`vcot judge --audit`: what is asked, what is kept, and what a recipe may demand."""

import json
from dataclasses import replace

import httpx2
import pytest

from tests.services.fake_vllm import write_checkpoint
from tests.services.run.simulated_judge import KIND, TRANSPORTS
from vcot.pipeline.errors import OwedError, StageError
from vcot.pipeline.records import Response
from vcot.services.cli import commands
from vcot.services.cli.terminal import Terminal
from vcot.services.run.auditing import audit_stage, find_card
from vcot.services.run.directory import open_run
from vcot.services.run.rounds import list_rounds
from vcot.services.run.session import Session
from vcot.services.run.steps import judge_stage, pair_stage

pytestmark = pytest.mark.hurried
SIZES = ("tasks.num_tasks=24", "sample.k=2", "eval.num_tasks=9")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("COLUMNS", "200")
    yield
    TRANSPORTS.clear()


@pytest.fixture
def asked():
    """The requests to a judge that likes what is right wherever it is shown an image, whichever that is."""
    bodies = []

    def answer(request):
        body = json.loads(request.content)
        bodies.append(body)
        content = body["messages"][0]["content"]
        score = 9 if "really right" in content[-1]["text"] and len(content) == 2 else 2
        message = {"role": "assistant", "content": json.dumps({"rationale": "seen", "score": score})}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        answered = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": usage}
        return httpx2.Response(200, json=answered | {"choices": [choice]})

    TRANSPORTS.append(httpx2.MockTransport(answer))
    return bodies


async def make_session(folder, *settings, is_right=lambda index: index == 0):
    base = write_checkpoint(folder / "base", "base", 1.0, kind="base")
    with open_run(folder / "run", "nano", [f"model.source={base}", *SIZES, *settings]) as run:
        async with Session(run, Terminal()) as session:
            for request in list_rounds(session)[0].requests():
                session.run.ledger.put([make_response(request, index, is_right(index)) for index in range(2)])
            yield session


@pytest.fixture
async def session(tmp_path):
    settings = (f"judge.kind={KIND}", "judge.model=gpt-4o-mini", "judge.num_audited=10")
    async for session in make_session(tmp_path, *settings):
        yield session


def make_response(request, index, is_right):
    wrong = "B" if request.task.answer_letter == "A" else "A"
    letter = request.task.answer_letter if is_right else wrong
    words = "really right" if is_right else "not so"
    return Response(
        key=request.response_key(index), group=request.key, task=request.task.id, index=index,
        checkpoint=request.checkpoint, prompt=request.prompt, sampling=request.sampling,
        text=f"It is {words} {request.task.id}. <R> The answer is ({letter}).", thought=f"It is {words}.",
        answer=f"The answer is ({letter}).",
    )  # fmt: skip


def count_images(asked):
    return [len(body["messages"][0]["content"]) - 1 for body in asked]


async def test_a_judge_is_audited_in_five_ways_and_the_card_is_kept(session, asked, capsys):
    (current,) = list_rounds(session)
    card = await audit_stage(current)
    assert (card.num_tasks, card.auc.value, card.num_unjudged) == (10, 1.0, 0)
    assert [control.shown for control in card.controls] == ["none", "blank", "other"]
    assert card.controls[0].auc.value == 0.5, "without the image it says the same of all"
    assert card.stability.value == 1.0
    assert find_card(session) == card
    own, again, none, blank, other = (count_images(asked[1:][20 * way : 20 * way + 20]) for way in range(5))
    assert {*own, *again, *blank, *other} == {1}
    assert set(none) == {0}
    assert len(asked) == 1 + 100, "a test, and ten tasks' two responses in five ways"
    told = capsys.readouterr().err
    assert "estimate for 100 requests" in told
    assert "20 requested = 20 ok" in told


async def test_what_the_audit_asked_as_the_recipe_says_is_judged(session, asked):
    (current,) = list_rounds(session)
    await audit_stage(current)
    asked.clear()
    await judge_stage(current)
    assert len(asked) == 2 * 24 - 20
    asked.clear()
    await audit_stage(current)
    assert asked == []


async def test_the_card_is_quoted_on_the_data_card(session, asked):
    (current,) = list_rounds(session)
    card = await audit_stage(current)
    await judge_stage(current)
    await pair_stage(current)
    text = (current.pairs.directory / "README.md").read_text("utf-8")
    assert f"- {card.verdicts[0]}" in text
    assert "| the right one scores higher (AUC) | 100.0% |" in text


async def test_a_recipe_may_demand_an_auc_before_anything_else_is_judged(tmp_path, asked):
    for name, is_right, least in (("good", lambda i: i == 0, 0.9), ("bad", lambda i: i == 1, 0.99)):
        settings = (f"judge.kind={KIND}", "judge.model=gpt-4o-mini", "judge.num_audited=4", f"judge.min_auc={least}")
        async for session in make_session(tmp_path / name, *settings, is_right=is_right):
            (current,) = list_rounds(session)
            asked.clear()
            await judge_stage(current)
            assert len(asked) == 1 + 5 * 8 + (48 - 8)
    async for session in make_session(tmp_path / "blind", *settings, "judge.image=none"):
        (current,) = list_rounds(session)
        asked.clear()
        with pytest.raises(StageError, match=r"has an AUC of 0\.50 .* on 4 tasks, less than judge\.min_auc = 0\.99"):
            await judge_stage(current)
        assert len(asked) == 1 + 2 * 8, "with no image there are no controls of the image"


async def test_a_program_is_asked_once(tmp_path):
    async for session in make_session(tmp_path, "judge.num_audited=5"):
        (current,) = list_rounds(session)
        card = await audit_stage(current)
        assert (card.judge, card.num_tasks, card.controls, card.stability) == ("verifier/1", 5, (), None)
        assert card.knows_gold


async def test_members_are_varied_and_their_agreement_is_told(tmp_path, asked):
    members = f'[{{kind = "{KIND}", model = "a"}}, {{kind = "verifier"}}]'
    async for session in make_session(
        tmp_path, "judge.kind=ensemble", f"judge.members={members}", "judge.num_audited=6"
    ):
        (current,) = list_rounds(session)
        card = await audit_stage(current)
        assert card.alpha == 1.0
        assert [control.shown for control in card.controls] == ["none", "blank", "other"]
        assert set(count_images(asked[1 + 2 * 12 : 1 + 3 * 12])) == {0}


WHO = "Whether it favours its own responses cannot be measured here, because "


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("gpt-4o-mini", "no model that it asks is one of those that sampled these tasks."),
        ("base", "only one model's responses, its own, are in the run."),
    ],
)
async def test_self_preference_is_not_measured_of_one_generator_and_the_card_says_why(tmp_path, asked, model, why):
    settings = (f"judge.kind={KIND}", f"judge.model={model}", "judge.base_url=http://x/v1", "judge.num_audited=3")
    async for session in make_session(tmp_path, *settings):
        card = await audit_stage(list_rounds(session)[0])
        assert card.self_preference is None
        assert WHO + why in card.verdicts


async def sample_second(folder, *settings):
    """Another model's responses in the same run: the first right ones say another thing, the others are wrong."""
    other = write_checkpoint(folder / "other", "other", 2.0, kind="base")
    with open_run(folder / "run", None, [f"model.source={other}", "model.name=other"]) as run:
        async with Session(run, Terminal()) as session:
            for request in list_rounds(session)[0].requests():
                made = make_response(request, 0, is_right=True)
                said = made.text.replace("really right", "plainly so")
                session.run.ledger.put(
                    [made.model_copy(update={"text": said}), make_response(request, 1, is_right=False)]
                )


@pytest.mark.parametrize(("model", "expected"), [("base", 1.0), ("other", 0.0)])
async def test_with_a_second_generator_its_own_right_responses_are_set_against_the_others(
    tmp_path, asked, model, expected
):
    """This judge likes what the first model wrote, whoever it is itself."""
    settings = (f"judge.kind={KIND}", f"judge.model={model}", "judge.base_url=http://x/v1", "judge.num_audited=12")
    async for session in make_session(tmp_path, *settings):
        await sample_second(tmp_path)
        card = await audit_stage(list_rounds(session)[0])
        assert (card.self_preference.value, card.self_preference.n) == (expected, 12)
        assert ("It favours its own responses, or their style" in " ".join(card.verdicts)) == (expected == 1.0)
        num = len(asked)
        assert await audit_stage(list_rounds(session)[0]) == card
        assert len(asked) == num, "kept as any judgment is"


async def test_what_was_trained_from_the_judges_model_is_its_own(tmp_path, asked):
    settings = (f"judge.kind={KIND}", "judge.model=base", "judge.base_url=http://x/v1", "judge.num_audited=3")
    async for session in make_session(tmp_path, *settings):
        (current,) = list_rounds(session)
        changes = {"name": "taught", "digest": "sha256:cc", "kind": "merged", "parent": current.start.ref.digest}
        taught = current.start.ref.model_copy(update=changes)
        for request in replace(current.requests(), checkpoint=taught):
            session.run.ledger.put([make_response(request, index, index == 0) for index in range(2)])
        card = await audit_stage(current)
        assert WHO + "only one model's responses, its own, are in the run." in card.verdicts


async def test_a_program_has_no_responses_of_its_own(tmp_path):
    async for session in make_session(tmp_path, "judge.num_audited=5"):
        card = await audit_stage(list_rounds(session)[0])
        assert not any("favours" in sentence for sentence in card.verdicts)


async def test_responses_that_are_all_right_audit_nothing(tmp_path):
    async for session in make_session(tmp_path, is_right=lambda _: True):
        with pytest.raises(OwedError, match="no task has both a response that is right and one that is wrong"):
            await audit_stage(list_rounds(session)[0])


async def test_the_command_shows_the_card_in_words_and_figures(session, asked, capsys):
    await commands.audit(list_rounds(session)[0])
    told = capsys.readouterr().out
    assert "Report card of pointwise/1:gpt-4o-mini" in told
    assert "the right one scores higher (AUC)" in told
    assert "with a blank image it keeps its order in 100% of tasks" in told
    assert "with another question's image it keeps its order in 100% of tasks" in told
