"""`vcot probe`: the drawings of unusual things, asked of checkpoints with the prompts and temperatures of the recipe's
benchmark. The benchmark's own answers and results stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from eval.prior import PriorReport, build_prior
from eval.scorer import score_response
from pipeline.files import write_record
from pipeline.recipe import TasksSection
from pipeline.records import Response, Score, Task
from pipeline.sources import load_tasks
from services.checkpoints.registry import Checkpoint
from services.run import results
from services.run.steps import Session, plan_settings, probe_stage
from training.protocol.job import read_record


async def probe_priors(
    session: Session, checkpoints: Sequence[Checkpoint], named: Sequence[Checkpoint] = ()
) -> PriorReport:
    """Ask what is owed, and keep what came of it as `prior.json`; `named` as in `evaluate_scores`."""
    run = session.run
    tasks = load_tasks(TasksSection(source="unusual", split="test"), run.directory, run.images)
    await probe_stage(session, checkpoints, tasks)
    scores = [score for checkpoint in checkpoints for score in _score(session, checkpoint, tasks)]
    report = build_prior(scores, [checkpoint.ref for checkpoint in checkpoints])
    write_record(results.claim_folder(run, named) / results.PRIOR, report)
    return report


def _score(session: Session, checkpoint: Checkpoint, tasks: Sequence[Task]) -> Iterator[Score]:
    requests = plan_settings(session.run.recipe.eval, tasks, checkpoint.ref)
    keys = [key for request in requests for key in request.response_keys()]
    found, by_id = session.run.ledger.get(Response, keys), {task.id: task for task in tasks}
    return (score_response(by_id[found[key].task], found[key]) for key in keys if key in found)


def load_prior(session: Session) -> PriorReport | None:
    """What an earlier `vcot probe` of the run found, under these settings."""
    path = results.find_folder(session.run) / results.PRIOR
    return read_record(path, PriorReport) if path.is_file() else None
