"""From the scores and files of a run to what people read: Table 1 in the terminal, `results.json`, and the report page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import RenderableType

from eval.table import build_chance, build_differences, build_results, render_results
from pipeline.records import Difference, EvalResult, Record, Response, Score, StageCount
from pipeline.sample import SampleRequest
from services.checkpoints import Checkpoint
from services.parity import ParityReport
from services.report import write_report
from services.report.data import Example, ReportData
from services.stages import Published, Session, eval_requests
from services.trainer import read_progress
from training.job import TrainJob, read_record, read_status

MAX_EXAMPLES = 6


class Evaluation(Record):
    """What an evaluation found; `results.json` in the run's report folder."""

    results: tuple[EvalResult, ...]
    differences: tuple[Difference, ...]
    """Each later checkpoint minus the first."""
    chance: dict[str, float]

    @property
    def renderables(self) -> list[RenderableType]:
        """The tables and sentences for a terminal."""
        return render_results(self.results, self.differences, self.chance)


def evaluate_scores(session: Session, scores: Sequence[Score], checkpoints: Sequence[Checkpoint]) -> Evaluation:
    """Table 1 and the paired differences, kept as `report/results.json`."""
    section = session.run.recipe.eval
    refs = [checkpoint.ref for checkpoint in checkpoints]
    evaluation = Evaluation(
        results=tuple(build_results(scores, refs, seed=section.seed, num_samples=section.num_samples)),
        differences=tuple(build_differences(scores, refs[0], refs[1:])),
        chance=build_chance(scores),
    )
    session.run.path("report", "results.json").write_text(evaluation.model_dump_json(indent=2) + "\n", "utf-8")
    return evaluation


def write_run_report(session: Session, published: Published, job: TrainJob, evaluation: Evaluation) -> Path:
    """The page `report/index.html`, made of what the run holds, whichever command made it."""
    directory = session.job_directory(job)
    scores = [judgment.score for judgment in published.judgments if judgment.score is not None]
    pairs = published.pair_set.pairs
    data = ReportData(
        recipe=session.run.recipe,
        checkpoints=tuple(dict.fromkeys(row.checkpoint for row in evaluation.results)),
        counts=tuple(count_stages(session, published, evaluation)),
        judge=published.judgments[0].judge,
        judge_scores=tuple(scores),
        gaps=tuple(pair.chosen_score - pair.rejected_score for pair in pairs),
        results=evaluation.results,
        differences=evaluation.differences,
        chance=evaluation.chance,
        training=read_status(directory) if directory.is_dir() else None,
        parity=tuple(read_parity(session, evaluation)),
        progress=tuple(read_progress(directory)),
        examples=tuple(choose_examples(session, published)),
    )
    return write_report(data, session.run.path("report", "index.html"))


def read_parity(session: Session, evaluation: Evaluation) -> Iterator[ParityReport]:
    """Of each evaluated checkpoint that was compared as served."""
    for ref in dict.fromkeys(row.checkpoint for row in evaluation.results):
        if (path := session.parity_path(ref)).is_file():
            yield read_record(path, ParityReport)


def count_stages(session: Session, published: Published, evaluation: Evaluation) -> list[StageCount]:
    """The account of every stage as the run holds it: what is not answered yet counts as failed."""
    responses = _count_responses(session, "sample", session.sample_requests())
    judged = StageCount(
        stage="judge",
        requested=responses.ok,
        ok=len(published.judgments),
        failed=responses.ok - len(published.judgments),
    )
    refs = dict.fromkeys(row.checkpoint for row in evaluation.results)
    asked = [_count_responses(session, f"eval {ref.name}", eval_requests(session, ref)) for ref in refs]
    return [responses, judged, published.pair_set.count, *asked]


def _count_responses(session: Session, stage: str, requests: Sequence[SampleRequest]) -> StageCount:
    keys = [key for request in requests for key in request.response_keys()]
    done = session.run.ledger.done(Response, keys)
    ok = sum(key in done for key in keys)
    others = session.run.ledger.get(Response, (key for key in keys if key not in done))
    refused = sum(response.refused for response in others.values())
    return StageCount(stage=stage, requested=len(keys), ok=ok, refused=refused, failed=len(keys) - ok - refused)


def choose_examples(session: Session, published: Published) -> Iterator[Example]:
    """One pair of each question family, as far as the page has room."""
    tasks = {task.id: task for task in session.tasks}
    reasons = {judgment.response: judgment.rationale for judgment in published.judgments}
    by_family = {tasks[pair.task].family: pair for pair in reversed(published.pair_set.pairs)}
    for pair in list(by_family.values())[:MAX_EXAMPLES]:
        yield Example(
            task=tasks[pair.task],
            image=session.run.images.read(pair.image),
            pair=pair,
            chosen_rationale=reasons[pair.chosen_key],
            rejected_rationale=reasons[pair.rejected_key],
        )
