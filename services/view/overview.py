"""A run's overview: the report's page, filled with as much as there is, and the account of its stages.

It is made by the process that keeps the index, since figures take a second to draw and an account goes through the run; the
viewer shows what was made last, and says when that was.
"""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

from markupsafe import Markup

from vcot.eval.evaluate import Scores
from vcot.eval.table import OVERALL
from vcot.pipeline.errors import OwedError
from vcot.pipeline.files import read_record
from vcot.services.report.data import ReportData
from vcot.services.report.environment import make_environment
from vcot.services.report.figures import standalone
from vcot.services.report.page import Figure, list_fields
from vcot.services.run.live import find_holder, read_live
from vcot.services.run.reporting import RunEvaluation, build_evaluation, list_findings
from vcot.services.run.results import RESULTS, find_folder
from vcot.services.run.session import Session
from vcot.services.run.stages import RunStatus
from vcot.services.run.status import look_at_run
from vcot.services.view.index import note
from vcot.services.view.summary import Accuracy, Summary
from vcot.training.protocol.job import JOB

_DRAWN = ("results_figures", "training_figures", "judge_figures")


async def write_overview(session: Session, connection: sqlite3.Connection, *, with_status: bool) -> None:
    """Make the notes `overview`, `bundle_overview`, `summary` and figures; with the account, a look at all, `status`."""
    if with_status:
        status = await _look(session)
        note(connection, "status", status.model_dump_json())
    data = build_data(session, connection)
    fields = list_fields(data)
    for kind in _DRAWN:
        fields[kind] = [_link(connection, figure, f"{kind}-{number}.svg") for number, figure in enumerate(fields[kind])]
    fields["name"] = session.run.directory.absolute().name
    environment = make_environment("vcot.services.view")
    for name in ("overview", "bundle_overview"):
        note(connection, name, environment.get_template(f"{name}.html").render(fields))
    note(connection, "summary", _summarise(data).model_dump_json())


async def _look(session: Session) -> RunStatus:
    directory = session.run.directory
    return await look_at_run(session, read_live(directory), find_holder(directory), time.time())


def _link(connection: sqlite3.Connection, figure: Figure, name: str) -> Figure:
    """The figure as a picture of its own, which no rule of the page's has to let in; its caption is its description."""
    note(connection, f"figure/{name}", standalone(str(figure.svg)))
    return replace(figure, svg=Markup('<img src="figures/{}" alt="">').format(name))


def build_data(session: Session, connection: sqlite3.Connection) -> ReportData:
    """What the report shows, as far as the run has come: nothing in it needs an earlier stage to be done."""
    scores = connection.execute("SELECT score, sum(times) FROM scores GROUP BY score").fetchall()
    gaps = connection.execute("SELECT gaps FROM items WHERE gaps != '[]'")
    return ReportData(
        **list_findings(session, find_evaluation(session), _find_training(session.run.directory)),
        counts=(),
        judge_scores=tuple(score for score, times in scores for _ in range(times)),
        gaps=tuple(gap for (told,) in gaps for gap in json.loads(told)),
        num_left_out=0,
    )


def find_evaluation(session: Session) -> RunEvaluation:
    """What the run's evaluation found; of one that goes on, what its answers so far say."""
    path = find_folder(session.run) / RESULTS
    return read_record(path, RunEvaluation, remedy="`vcot eval` makes it anew") or _evaluate_so_far(session)


def _evaluate_so_far(session: Session) -> RunEvaluation:
    """Of the checkpoints that have answers to the benchmark's questions."""
    scored: list[Scores] = []
    try:
        questions = session.questions(session.run.recipe.eval.split)
        refs = [session.base.ref, *(one.ref for one in session.registry.list() if one.ref != session.base.ref)]
    except OwedError:
        return RunEvaluation(results=(), differences=(), chance={})
    answered = []
    for ref in refs:
        try:
            scored.append(questions.scores([ref], session.run.ledger))
        except OwedError:
            continue
        answered.append(ref)
    if not answered:
        return RunEvaluation(results=(), differences=(), chance={})
    shown = session.run.recipe.eval.images
    scores: Scores = {each: [score for own in scored for score in own[each]] for each in shown}
    return build_evaluation(session, scores, answered, is_done=False)


def _find_training(directory: Path) -> Path | None:
    """The job that was worked on last."""
    jobs = [path.parent for path in directory.glob(f"training/*/{JOB}")]
    return max(jobs, key=lambda job: max(path.stat().st_mtime for path in job.glob("*.json*")), default=None)


def _summarise(data: ReportData) -> Summary:
    rows = tuple(
        Accuracy(
            checkpoint=row.checkpoint.name,
            setting=f"{row.prompt} {row.temperature:g}",
            accuracy=row.accuracy[OVERALL],
        )
        for row in data.results
        if OVERALL in row.accuracy
    )
    model, judge = data.recipe.model.source, data.judge
    return Summary(recipe=data.recipe.name, model=model, judge=judge, accuracies=rows, made_at=time.time())
