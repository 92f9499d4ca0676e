"""`vcot probe`: the drawings of unusual things, asked of checkpoints with the prompts and temperatures of the recipe's
section eval. The benchmark's own answers and results stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from vcot.eval.benchmarks.unusual_things import UNUSUAL
from vcot.eval.evaluate import Questions
from vcot.eval.prior import PriorReport, build_prior
from vcot.pipeline.files import write_record
from vcot.pipeline.report import Began
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources import load_tasks
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.run import results
from vcot.services.run.parity_gate import parity_stage
from vcot.services.run.session import Session
from vcot.services.run.side_by_side import ask_checkpoints
from vcot.training.protocol.job import read_record


async def probe_priors(
    session: Session, checkpoints: Sequence[Checkpoint], named: Sequence[Checkpoint] = ()
) -> PriorReport:
    """Ask what is owed, and keep what came of it as `prior.json`; `named` as in `evaluate_scores`."""
    await parity_stage(session, checkpoints)
    questions = load_drawings(session)
    names = ", ".join(each.ref.name for each in checkpoints)
    session.report(Began("probe", f"{names}: {len(questions.tasks)} unusual drawings"))
    await ask_checkpoints(session, "probe", checkpoints, questions)
    refs = [checkpoint.ref for checkpoint in checkpoints]
    report = build_prior(questions.scores(refs, session.run.ledger)["true"], refs)
    write_record(results.claim_folder(session.run, named) / results.PRIOR, report)
    return report


def load_drawings(session: Session) -> Questions:
    """The drawings, asked about their own images only."""
    run = session.run
    tasks = load_tasks(TasksSection(source=UNUSUAL.source, split="test"), run.directory, run.images)
    section = run.recipe.eval.model_copy(update={"images": ("true",), "judge": None})
    return Questions(UNUSUAL, section, "test", tasks, run.images)


def load_prior(session: Session) -> PriorReport | None:
    """What an earlier `vcot probe` of the run found, under these settings."""
    path = results.find_folder(session.run) / results.PRIOR
    return read_record(path, PriorReport) if path.is_file() else None
