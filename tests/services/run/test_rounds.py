"""Rounds: each from the last policy, on images that none before it saw; validation chooses, and the rest is lineage."""

from dataclasses import replace

import pytest

from tests.services.fake_vllm import write_checkpoint
from vcot.eval.image_reliance import Reliance
from vcot.pipeline.errors import DataError, InputError, OwedError, RecipeError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.odds import OptionScores
from vcot.pipeline.option_scores import key_options
from vcot.pipeline.prompts import split_thought
from vcot.pipeline.records import Response, Usage
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources import key_tasks, load_round, load_tasks
from vcot.pipeline.sources.nano.questions import render_response, render_target
from vcot.services.cli.terminal import Terminal
from vcot.services.recipes.recipe import load_recipe
from vcot.services.run.directory import open_run
from vcot.services.run.reporting import evaluate_scores
from vcot.services.run.rounds import list_rounds, make_judge
from vcot.services.run.session import Session
from vcot.services.run.steps import ask_options, eval_stage, judge_stage, load_scores, pair_stage, sample_stage
from vcot.services.run.trend import choose_round, render_trend

SIZES = ("tasks.num_tasks=12", "sample.k=2", "eval.num_tasks=9", "eval.temperatures=[0.4]", "rounds.num=3")


@pytest.fixture
async def session(tmp_path):
    """A run of three rounds in which nothing was asked yet."""
    base = write_checkpoint(tmp_path / "base", "base", 1.0, kind="base")
    with open_run(tmp_path / "run", "nano", [f"model.source={base}", *SIZES]) as run:
        async with Session(run, Terminal()) as session:
            yield session


def answer(session, requests, is_right):
    """Put a response to each request in the ledger; `is_right(task, index)` says which are right."""
    for request in requests:
        for index, key in enumerate(request.response_keys()):
            task = request.task
            text = render_target(task, request.prompt)
            if not is_right(task, index):
                letter = "B" if task.answer_letter == "A" else "A"
                text = render_response("It is so.", f"The answer is ({letter}).", request.prompt)
            thought, final = split_thought(request.prompt, text)
            session.run.ledger.put(
                [
                    Response(
                        key=key, group=request.key, task=task.id, index=index, checkpoint=request.checkpoint,
                        prompt=request.prompt, sampling=request.sampling, text=text, thought=thought, answer=final,
                        usage=Usage(prompt_tokens=9, completion_tokens=20) if index == 0 else None,
                    )
                ]
            )  # fmt: skip


async def train_policy(session, weight):
    """Do the present round without a server or a trainer."""
    current = list_rounds(session)[-1]
    answer(session, current.requests(), lambda task, index: index == 0)
    await judge_stage(current)
    await pair_stage(current)
    directory = session.run.path("checkpoints", current.job.checkpoint_name)
    return session.registry.register(write_checkpoint(directory, current.job.checkpoint_name, weight))


async def test_each_round_starts_from_the_last_ones_policy_on_images_that_none_before_it_saw(session):
    assert len(list_rounds(session)) == 1
    policies = [await train_policy(session, weight) for weight in (2.0, 3.0)]
    rounds = list_rounds(session)
    assert [current.start.ref.name for current in rounds] == ["base", *(p.ref.name for p in policies)]
    assert [current.job.base.digest for current in rounds[:2]] == [session.base.ref.digest, policies[0].ref.digest]
    assert policies[0].ref.name.startswith("dpo-")
    assert policies[1].ref.name.startswith("dpo-r2-")
    images = [task.images[0].sha256 for current in rounds for task in current.tasks]
    assert len(images) == len(set(images)) == 36


@pytest.mark.parametrize(("num", "said"), [(5, "left out: 7 beyond pairs num"), (20, "and pairs.num asks for 20")])
async def test_more_pairs_than_asked_for_are_left_out_and_fewer_are_said(session, capsys, num, said):
    section = session.run.recipe.pairs.model_copy(update={"num": num})
    object.__setattr__(session.run, "recipe", session.run.recipe.model_copy(update={"pairs": section}))
    await train_policy(session, 2.0)
    pairs = list_rounds(session)[0].pairs
    assert len(pairs.train) + len(pairs.validation) == pairs.pair_set.count.ok == min(num, 12)
    assert said in capsys.readouterr().err
    left_out = "5 of 12; the others: 7 beyond pairs num"
    assert (left_out in (pairs.directory / "README.md").read_text("utf-8")) == (num == 5)


async def test_a_round_that_was_begun_is_gone_on_with(session):
    await train_policy(session, 2.0)
    current = list_rounds(session)[-1]
    answer(session, list(current.requests())[:5], lambda task, index: index == 0)
    assert list_rounds(session)[-1].number == 2
    assert list_rounds(session)[-1].standing(make_judge(session)).num_responses == 10


@pytest.mark.parametrize("reference", ["previous", "seed"])
async def test_the_reference_is_the_last_policy_or_the_seed(session, reference):
    rounds = session.run.recipe.rounds.model_copy(update={"reference": reference})
    recipe = session.run.recipe.model_copy(update={"rounds": rounds})
    object.__setattr__(session.run, "recipe", recipe)
    first, _ = list_rounds(session)[0], await train_policy(session, 2.0)
    assert (first.reference, list_rounds(session)[0].job.reference) == (session.base, None)
    second = list_rounds(session)[1]
    answer(session, second.requests(), lambda task, index: index == 0)
    await judge_stage(second)
    job = second.job
    assert job.base == second.start.ref
    if reference == "seed":
        assert job.reference == session.base.ref
        assert job.key != job.model_copy(update={"reference": None}).key
    else:
        assert job.reference is None


async def test_a_leak_is_not_taken_for_a_round_without_a_policy(session):
    """Else a trained run whose evaluation split was changed to train shows a table of the base alone."""
    await train_policy(session, 2.0)
    asked = replace(session.questions("test"), tasks=list_rounds(session)[0].tasks)
    session.asked["test"] = asked
    with pytest.raises(DataError, match="is in the evaluation set too"):
        list_rounds(session)


async def test_nothing_is_asked_of_a_policy_before_how_it_is_served_was_compared(session, capsys):
    """This one has no probe, which the comparison says; what would be asked is answered already, so no server is needed."""
    policy = await train_policy(session, 2.0)
    current, asked = list_rounds(session)[-1], session.questions("test").requests(policy.ref)
    answer(session, [*current.requests(), *asked], lambda task, index: True)
    for stage in (sample_stage(current), eval_stage(session, [policy], "test")):
        capsys.readouterr()
        await stage
        assert "how it is served cannot be compared" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["validation", "test"])
async def test_pairs_on_an_image_of_the_evaluation_are_refused(session, split):
    current = list_rounds(session)[0]
    answer(session, current.requests(), lambda task, index: index == 0)
    await judge_stage(current)
    session.asked[split] = replace(session.questions(split), tasks=current.tasks)
    with pytest.raises(DataError, match="is in the evaluation set too"):
        _ = current.job


async def test_validation_chooses_the_round_and_the_test_split_is_not_asked(session):
    policies = [await train_policy(session, weight) for weight in (2.0, 3.0, 4.0)]
    shares = {session.base.ref.name: 3, **{p.ref.name: n for p, n in zip(policies, (4, 8, 6), strict=True)}}
    with pytest.raises(InputError, match="run `vcot eval` first"):
        choose_round(session, list_rounds(session))
    for checkpoint in (session.base, *policies):
        right = {task.id for task in session.questions("validation").tasks[: shares[checkpoint.ref.name]]}
        requests = session.questions("validation").requests(checkpoint.ref, ["true"])
        answer(session, requests, lambda task, index, right=right: task.id in right)
    choice = choose_round(session, list_rounds(session))
    assert choice.round.number == 2
    assert choice.checkpoints == [session.base, policies[1]]
    assert [row.is_chosen for row in choice.trend] == [False, False, True, False]
    assert choice.trend[2].accuracy == pytest.approx(8 / 9)
    lesson = choice.trend[2].lesson
    assert (lesson.reference, lesson.num_tasks, lesson.mean_tokens) == (policies[0].ref.name, 12, 10)
    assert render_trend(choice.trend).row_count == 4


async def test_of_rounds_that_are_equally_good_the_earlier_is_chosen(session):
    policies = [await train_policy(session, weight) for weight in (2.0, 3.0, 4.0)]
    for checkpoint in (session.base, *policies):
        num_right = 2 if checkpoint is session.base else 6
        right = {task.id for task in session.questions("validation").tasks[:num_right]}
        requests = session.questions("validation").requests(checkpoint.ref, ["true"])
        answer(session, requests, lambda task, index, right=right: task.id in right)
    assert choose_round(session, list_rounds(session)).round.number == 1


async def test_what_was_shown_instead_of_the_image_is_scored_against_the_question(session):
    section = session.run.recipe.eval.model_copy(update={"images": ("true", "blank", "other")})
    object.__setattr__(session.run, "recipe", session.run.recipe.model_copy(update={"eval": section}))
    answer(session, session.questions("test").requests(session.base.ref, ["true"]), lambda task, index: True)
    answer(session, session.questions("test").requests(session.base.ref, ["blank", "other"]), lambda task, index: False)
    scores = load_scores(session, [session.base], "test")
    own = {task.id: task.images[0].sha256 for task in session.questions("test").tasks}
    assert all(score.image == own[score.task] for part in scores.values() for score in part)
    found = evaluate_scores(session, scores, [session.base])
    assert {(row.shown, row.reliance.value) for row in found.reliance} == {("blank", 1.0), ("other", 1.0)}
    assert {row.num_scored for row in found.results} == {9}
    assert isinstance(found.reliance[0], Reliance)


def set_eval(session, **fields):
    section = session.run.recipe.eval.model_copy(update=fields)
    object.__setattr__(session.run, "recipe", session.run.recipe.model_copy(update={"eval": section}))


async def test_margins_are_of_what_the_run_holds_and_nothing_is_asked_for_them_again(session):
    set_eval(session, margins=True, images=("true", "blank"))
    questions, base = session.questions("test"), session.base.ref
    answer(session, questions.requests(base), lambda task, index: True)
    with pytest.raises(OwedError, match="does not hold how likely base finds the options on test with the true image"):
        questions.margins([base], session.run.ledger)
    for shown, lead in (("true", 2.0), ("blank", 0.5)):
        for number, request in enumerate(questions.option_requests(base, [shown])):
            own = request.task.answer
            logps = tuple(lead + number / 8 if place == own else 0.0 for place in range(len(request.task.choices)))
            fields = {"key": key_options(request), "task": request.task.id, "checkpoint": base.digest}
            session.run.ledger.put([OptionScores(**fields, logps=logps)])
    await ask_options(session, session.base, questions)
    assert (session.counts[-1].stage, session.counts[-1].cached) == ("margins base", 18)
    found = evaluate_scores(session, load_scores(session, [session.base], "test"), [session.base])
    assert [(row.shown, row.margin.value) for row in found.margins] == [("true", 2.5), ("blank", 1.0)]
    assert found.margins[1].lost.value == 1.5
    set_eval(session, margins=False)
    session.asked.clear()
    assert evaluate_scores(session, load_scores(session, [session.base], "test"), [session.base]).margins == ()


async def test_margins_of_questions_without_options_are_refused(session):
    questions = session.questions("test")
    tasks = [task.model_copy(update={"choices": (), "answer": None, "gold": "x"}) for task in questions.tasks]
    alike = questions.tasks[0].model_copy(update={"choices": ("x", "x"), "answer": 0})
    asked = replace(questions, tasks=[alike, *questions.tasks[1:]]).option_requests(session.base.ref, ["true"])
    assert len(asked) == len(questions.tasks) - 1, "all its options are right"
    with pytest.raises(RecipeError, match=r"eval\.margins asks how likely each option is"):
        replace(questions, tasks=tasks).option_requests(session.base.ref, ["true"])


def test_a_round_leaves_out_questions_about_an_earlier_image(tmp_path):
    section = TasksSection(source="nano", num_tasks=4)
    two, three = (section.model_copy(update={"num_tasks": number}) for number in (8, 12))
    drawn = load_tasks(two, tmp_path, ImageStore(tmp_path))
    repeated = [*drawn[:5], drawn[5].model_copy(update={"images": drawn[1].images}), *drawn[6:]]
    for kept in (two, three):  # as a source that has no more
        path = tmp_path / "tasks" / f"{key_tasks(kept)}.jsonl"
        path.write_text("".join(f"{task.model_dump_json()}\n" for task in repeated))
    found = load_round(section, 2, tmp_path, ImageStore(tmp_path))
    assert [task.id for task in found] == [drawn[4].id, drawn[6].id, drawn[7].id]
    with pytest.raises(DataError, match="no question left for round 3"):
        load_round(section, 3, tmp_path, ImageStore(tmp_path))


@pytest.mark.parametrize(
    ("override", "said"),
    [("tasks.num_tasks=", "tasks.num_tasks is not set"), ("eval.split=validation", "must be another")],
)
def test_rounds_that_could_not_be_are_refused(override, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe("nano", ["rounds.num=2", override])
    assert load_recipe("nano", [override]).rounds.num == 1
