"""The steps of a run, each over its run directory: sample, judge, pair, eval, swap; training_steps.py has train and merge.

A step recomputes from recipe and ledger what it needs of the earlier ones, so each can be redone alone. What a step finds
done it does not do again, and a server is started only when something is owed to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from vcot.eval.evaluate import Questions, Scores
from vcot.eval.image_reliance import choose_images
from vcot.eval.report_card import render_markdown
from vcot.pipeline.client import ChatClient
from vcot.pipeline.data_card import render_card
from vcot.pipeline.errors import DataError
from vcot.pipeline.gain import count_gains, list_owed
from vcot.pipeline.image_gains import GainAsk, measure_gains
from vcot.pipeline.judges import Judge
from vcot.pipeline.option_scores import list_owed_options
from vcot.pipeline.pairs import Couple, needs_gains
from vcot.pipeline.prompts import PROMPTS
from vcot.pipeline.publish import name_judge, publish_pairs
from vcot.pipeline.records import Split, StageCount, Task
from vcot.pipeline.report import Began, Said, Warned, tracking
from vcot.pipeline.sections import POLICY_ALIAS
from vcot.pipeline.sources import name_sources
from vcot.pipeline.sources.census import count_sources
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.engine.serve_section import ServeSection
from vcot.services.gateway.admin import swap_to
from vcot.services.recipes.recipe import render_recipe
from vcot.services.run.asking import judge_groups
from vcot.services.run.auditing import audit_stage, check_auc, find_card
from vcot.services.run.billing import read_cost
from vcot.services.run.grading import grade_stage
from vcot.services.run.overlap_gate import check_overlap, read_overlap
from vcot.services.run.parity_gate import parity_stage
from vcot.services.run.rounds import Round, make_judge, reading_texts
from vcot.services.run.session import Session
from vcot.services.run.side_by_side import Asking, ask_all, ask_checkpoints


async def sample_stage(current: Round) -> None:
    """Draw k responses per task from the round's starting policy; from none that is not served as it was trained.

    Raises DataError where a task is in the evaluation set, too, and may not be.
    """
    session, recipe = current.session, current.session.run.recipe
    check_overlap(current)
    await parity_stage(session, [current.start])
    session.report(
        Began(
            "sample",
            f"{len(current.tasks)} {name_sources(recipe.tasks)} tasks x {recipe.sample.k} responses of "
            f"{current.start.ref.name} at temperature {recipe.sample.temperature:g}",
        )
    )
    for count in count_sources(current.tasks):
        session.report(Said(count.summary))
    _check_images(current.tasks, recipe.serve)
    await ask_all(session, [Asking("sample", current.start, current.requests())], recipe.sample.max_concurrency)


def _check_images(tasks: Iterable[Task], serve: ServeSection) -> None:
    """Raise DataError for a question with more images than a server of ours takes; what another takes is not known here."""
    if serve.url is None and not serve.upstreams:
        task = next((task for task in tasks if len(task.images) > serve.max_images), None)
        if task is not None:
            raise DataError(
                f"task {task.id} has {len(task.images)} images, and serve.max_images is {serve.max_images}; raise it, and "
                "serve.max_model_len by their tokens"
            )


async def judge_stage(current: Round) -> None:
    """Score every response. Raises StageError where a judge gave no verdict on more than the recipe tolerates.

    Where the recipe asks for a least AUC the judge is audited first, and StageError raised where it has less.
    """
    judge = make_judge(current.session)
    if judge.section.min_auc is not None:
        check_auc(find_card(current.session) or await audit_stage(current), judge.section)
    for each in judge.walk():
        await _judge(current, each)


async def _judge(current: Round, judge: Judge) -> None:
    """By one judge, whose members have judged."""
    session = current.session
    session.report(
        Began("judge", f"{len(current.tasks)} tasks x {session.run.recipe.sample.k} responses, by {judge.name}")
    )
    await judge_groups(session, judge, current.groups, current.standing(judge))


async def gain_stage(current: Round) -> None:
    """Ask the sampled policy what images add to the responses that may be chosen, where the pair policy goes by that.

    Raises OwedError where a response is not sampled or judged.
    """
    session = current.session
    session.report(Began("gain", "of the responses that may be chosen: with their images, and with blank ones"))
    tally = count_gains(candidates for _, candidates in current.candidates())
    if tally.finished == tally.total:
        session.account(tally.close())
        return
    await parity_stage(session, [current.start])

    def find_asks() -> Iterator[GainAsk]:
        for task, candidates in current.candidates():
            if owed := [one.response for one in list_owed(candidates)]:
                yield GainAsk(task, choose_images([task], "blank", session.run.images)[task.id], owed)

    async def ask(client: ChatClient) -> StageCount:
        with tracking(session.report, "image gains") as on_progress:
            return await measure_gains(
                find_asks(),
                client,
                session.run.ledger,
                session.run.images,
                count_gains(candidates for _, candidates in current.candidates()),
                max_concurrency=session.run.recipe.sample.max_concurrency,
                on_progress=on_progress,
            )

    session.account(await session.measure(current.start, ask))


async def pair_stage(current: Round) -> None:
    """Preference pairs of the responses, as Parquet, after what its policy goes by was asked."""
    session, recipe = current.session, current.session.run.recipe
    if needs_gains(recipe.pairs):
        await gain_stage(current)
    session.report(Began("pair", f"by {recipe.pairs.policy}"))
    check_overlap(current)
    pairs = current.pairs
    publish_splits(current, pairs.train, pairs.validation, pairs.digest, pairs.directory)
    count, num = pairs.pair_set.count, recipe.pairs.num
    session.counts.append(count)
    session.report(
        Said(
            f"{len(pairs.train)} training + {len(pairs.validation)} validation pairs in {pairs.directory}"
            + (f"; left out: {count.by_reason}" if count.reasons else "")
        )
    )
    is_short = count.ok < count.requested / 2 if num is None else len(pairs.pair_set.pairs) < num
    if is_short:
        judged = pairs.judged
        wanted = "" if num is None else f", and pairs.num asks for {num} pairs"
        session.report(
            Warned(
                f"only {count.ok} of {count.requested} tasks gave a pair ({count.by_reason}){wanted}"
                + (f"; {judged.refused} responses were not judged ({judged.by_reason})" if judged.refused else "")
                + "; sample more tasks, hotter (sample.temperature), or with a judge that tells responses apart"
            )
        )


def publish_splits(
    current: Round, train: Sequence[Couple], validation: Sequence[Couple], digest: str, directory: Path
) -> None:
    """Pairs of the round, whose rows have this digest, as a data set in `directory`, with its card."""
    session, recipe = current.session, current.session.run.recipe
    report = find_card(session)
    card = partial(
        render_card,
        train,
        validation,
        questions=recipe.tasks,
        policy=recipe.pairs.policy,
        recipe=render_recipe(recipe, public=True),
        model=current.start.ref.name if current.number > 1 else recipe.model.source,
        judged=current.pairs.judged,
        paired=current.pairs.pair_set.count,
        digest=digest,
        prompts=_list_prompts(session),
        tasks=current.tasks,
        contamination=read_overlap(current),
        cost=read_cost(session),
        judge_report="" if report is None else render_markdown(report),
    )
    with reading_texts(session.report, current.pairs.read, len(train) + len(validation)) as read:
        publish_pairs(read(train), read(validation), session.run.images, directory, card=card)


def _list_prompts(session: Session) -> dict[str, str]:
    """What the sampled model and each judge that is a model were asked, by what it is for."""
    name = session.run.recipe.sample.prompt
    prompts = {f"Asked of the sampled model ({name})": PROMPTS.resolve(name).template}
    for judge in make_judge(session).walk():
        for number, template in enumerate(judge.list_templates(), start=1):
            prompts[f"Asked of the judge {name_judge(judge.name)}, {number}"] = template
    return prompts


async def eval_stage(session: Session, checkpoints: Sequence[Checkpoint], split: Split) -> None:
    """Ask one split of the benchmark of each checkpoint, after checking that it is served as it was trained."""
    await parity_stage(session, checkpoints)
    questions = session.questions(split)
    _check_images(questions.tasks, session.run.recipe.serve)
    session.report(Began("eval", f"{', '.join(each.ref.name for each in checkpoints)}: {questions.summary}"))
    await ask_checkpoints(session, "eval", checkpoints, questions)
    if questions.section.margins and split == session.run.recipe.eval.split:
        for checkpoint in checkpoints:
            await ask_options(session, checkpoint, questions)
    await grade_stage(session, checkpoints, questions)


async def ask_options(session: Session, checkpoint: Checkpoint, questions: Questions) -> None:
    """Ask a checkpoint how likely it finds each option, with every image of the recipe, as far as it was not asked."""
    ledger, section = session.run.ledger, questions.section
    requests = questions.option_requests(checkpoint.ref)
    session.report(Began("margins", f"{checkpoint.ref.name}: how likely it finds the options, {len(requests)} times"))
    owed, tally = list_owed_options(requests, ledger)

    async def ask(client: ChatClient) -> StageCount:
        with tracking(session.report, "questions") as on_progress:
            return await session.engine.score_options(
                requests, client, max_concurrency=section.max_concurrency, on_progress=on_progress
            )

    count = await session.measure(checkpoint, ask) if owed else tally.close()
    session.account(count.model_copy(update={"stage": f"margins {checkpoint.ref.name}"}))


async def swap_stage(session: Session, checkpoint: Checkpoint) -> None:
    """The loop's hot swap: from now on the run's gateway means `checkpoint` by `policy`.

    A gateway that serves another run (serve.url) is not the loop's to steer: its alias stays. Raises SwapError.
    """
    name = checkpoint.ref.name
    session.report(Began("swap", f"{POLICY_ALIAS} is to mean {name}"))
    aliases = await session.gateway.read_aliases()
    if aliases is None:
        return
    if aliases.get(POLICY_ALIAS) == name:
        session.report(Said("it does already"))
        return
    url = await session.gateway.open()
    swapped = await swap_to(url, POLICY_ALIAS, name)
    how = (
        "which it served already"
        if swapped.way == "none"
        else f"({swapped.way}) after a pause of {swapped.pause_s:.2f} s"
    )
    session.report(Said(f"{name} is live at {url} {how}"))


def load_scores(session: Session, checkpoints: Sequence[Checkpoint], split: Split) -> Scores:
    """A score for each response that the benchmark asked of `checkpoints` and got, errors included."""
    return session.questions(split).scores([checkpoint.ref for checkpoint in checkpoints], session.run.ledger)
