"""What the commands do that take more than one step of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from vcot.eval.prior import render_prior
from vcot.eval.report_card import render_card
from vcot.pipeline.pairs import PAIR_POLICIES
from vcot.pipeline.report import Began, Completed, Found, Said, Warned, tell
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.planning.machine import check_machine
from vcot.services.report.exports import write_exports
from vcot.services.run import results
from vcot.services.run import sweep as search
from vcot.services.run.announcement import is_served
from vcot.services.run.auditing import audit_stage
from vcot.services.run.billing import read_whole_cost, test_judges
from vcot.services.run.parity_gate import parity_stage
from vcot.services.run.probing import probe_priors
from vcot.services.run.reporting import RunEvaluation, evaluate_scores, render, write_run_report
from vcot.services.run.rounds import Round, list_rounds
from vcot.services.run.session import Session
from vcot.services.run.steps import eval_stage, judge_stage, load_scores, pair_stage, sample_stage, swap_stage
from vcot.services.run.training_steps import merge_stage, servers_at_rest, train_stage
from vcot.services.run.trend import ChosenRound, choose_round
from vcot.training.protocol.launch import check_installed


async def audit(current: Round) -> None:
    """`vcot judge --audit`: the judge's report card."""
    card = await audit_stage(current)
    tell(current.session.report, render_card(card), card)


async def train(session: Session) -> None:
    """`vcot train`."""
    _check_trainer(session)
    current = list_rounds(session)[-1]
    await pair_stage(current)
    is_remote = session.run.recipe.train.worker == "remote"  # which merges, too
    async with servers_at_rest(current, current.job if is_remote else None):
        await train_stage(current)


def _check_trainer(session: Session) -> None:
    """See that what a training on this machine takes is installed, before anything that lasts.

    Raises InputError or MachineError.
    """
    if session.run.recipe.train.worker == "local":
        check_installed(session.run.recipe.train)


async def sweep(session: Session) -> None:
    """`vcot sweep`."""
    current = list_rounds(session)[-1]
    await pair_stage(current)
    await search.sweep(current)


async def merge(session: Session, *, adapter: bool) -> None:
    """`vcot merge`; with `adapter`, the adapter alone."""
    current = list_rounds(session)[-1]
    await pair_stage(current)
    job = current.job
    if adapter:
        job = job.model_copy(update={"merge": job.merge.model_copy(update={"serve_as": "adapter"})})
    async with servers_at_rest(current, job):
        made = await merge_stage(current, job)
    session.report(Said(f"`vcot parity {made.ref.name}` registers it, if it is served as it was trained"))


async def parity(session: Session, names: Sequence[str]) -> None:
    """`vcot parity`."""
    trained = [current.policy for current in list_rounds(session)]
    chosen = _find_all(session, names) or [policy for policy in trained if policy]
    table = Table("checkpoint", "pair of models", "largest log-prob difference", "allowed")
    reports = await parity_stage(session, chosen)
    for report in reports:
        for models, difference in report.max_abs_logp.items():
            table.add_row(report.checkpoint.name, models, f"{difference:.1e}", f"{report.tolerance:g} ({report.dtype})")
        table.add_row(report.checkpoint.name, "vLLM checkpoint, vLLM base", f"{report.differs_from_base:.1e}", "more")
    session.report(Found(table, reports))


def _find_all(session: Session, names: Sequence[str]) -> list[Checkpoint]:
    """As `Session.find`, with the base known by its name."""
    if not session.run.is_read:
        _ = session.base  # which is known by its name from the first command on
    return session.find(names)


async def evaluate(session: Session, names: Sequence[str], tables: Path | None = None) -> None:
    """`vcot eval`; with `tables`, a folder for its tables and figures."""
    split, choice = session.run.recipe.eval.split, None if names else await _choose(session, list_rounds(session))
    chosen = choice.checkpoints if choice else _find_all(session, names)
    await eval_stage(session, chosen, split)
    scores = load_scores(session, chosen, split)
    trend, named = (choice.trend, ()) if choice else ((), chosen)
    _show(session, evaluate_scores(session, scores, chosen, trend, named), tables)
    folder, settings = results.find_folder(session.run, named), results.describe_settings(session.run)
    session.report(Said(f"{folder / results.RESULTS}; settings: {settings}"))


async def probe(session: Session, names: Sequence[str]) -> None:
    """`vcot probe`."""
    named = _find_all(session, names)
    chosen = named or (await _choose(session, list_rounds(session))).checkpoints
    found = await probe_priors(session, chosen, named)
    tell(session.report, render_prior(found), found)


async def _choose(session: Session, rounds: Sequence[Round]) -> ChosenRound:
    """Of several rounds, the one whose policy does best on the validation split, which is asked of all."""
    if session.run.recipe.rounds.num > 1:
        await eval_stage(session, [session.base, *filter(None, (r.policy for r in rounds))], "validation")
    return choose_round(session, rounds)


def _show(session: Session, evaluation: RunEvaluation, tables: Path | None) -> None:
    parts = render(evaluation, session.benchmark)
    tell(session.report, parts, evaluation)
    if tables is not None:
        written = write_exports(evaluation, parts, session.benchmark.columns, tables)
        session.report(Said(f"{tables}: {', '.join(written)}"))


async def report(session: Session, tables: Path | None = None) -> None:
    """`vcot report`; with `tables`, as `evaluate`."""
    rounds = list_rounds(session)
    trained = [current for current in rounds if current.policy] or rounds[:1]
    _report(session, trained, choose_round(session, trained), tables)


def _report(session: Session, rounds: Sequence[Round], choice: ChosenRound, tables: Path | None = None) -> None:
    """The page, and the table in the terminal."""
    session.report(Began("report", session.run.recipe.name))
    _ = choice.round.pairs  # what is owed is said before anything is written
    scores = load_scores(session, choice.checkpoints, session.run.recipe.eval.split)
    evaluation = evaluate_scores(session, scores, choice.checkpoints, choice.trend)
    page = write_run_report(session, rounds, choice.round, evaluation)
    _show(session, evaluation, tables)
    session.report(Said(f"report: {page}; settings: {results.describe_settings(session.run)}"))


async def run_all(session: Session) -> None:
    """`vcot run`: the whole loop, as many rounds of it as the recipe says."""
    _check_trainer(session)
    if warning := check_machine(session.run.recipe, is_served=is_served(session.run)):
        session.report(Warned(warning))
    _ = session.benchmark  # what cannot be asked, or paired, and below
    PAIR_POLICIES.resolve(session.run.recipe.pairs.policy)
    await test_judges(session)
    rounds: list[Round] = []
    start = session.base
    for number in range(1, session.run.recipe.rounds.num + 1):
        rounds.append(Round(session, number, start))
        start = await _do_round(rounds[-1])
    choice = await _choose(session, rounds)
    await eval_stage(session, choice.checkpoints, session.run.recipe.eval.split)
    await swap_stage(session, choice.checkpoints[-1])
    _report(session, rounds, choice)
    if (cost := read_whole_cost(session)) is not None:
        session.report(Said(f"judging took {cost.summary}"))
    session.report(Completed())


async def _do_round(current: Round) -> Checkpoint:
    """All of one round; returns its policy."""
    if current.session.run.recipe.rounds.num > 1:
        current.session.report(Began("round", f"{current.number} of {current.session.run.recipe.rounds.num}"))
    await sample_stage(current)
    await judge_stage(current)
    await pair_stage(current)
    async with servers_at_rest(current, current.job):
        await train_stage(current, current.session.run.path("checkpoints", current.job.checkpoint_name))
        return await merge_stage(current, current.job)
