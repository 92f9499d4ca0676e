"""From the scores and files of a run to what people read: Table 1 in the terminal, `results.json`, and the report page.

What is written is replaced in one step, so that a reader beside it sees the old or the new.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from vcot.eval.benchmark import Benchmark
from vcot.eval.evaluate import Evaluation, Scores, evaluate, render_evaluation
from vcot.eval.margins import build_margins
from vcot.pipeline.contamination import Contamination
from vcot.pipeline.files import write_record
from vcot.pipeline.records import CheckpointRef, Response, StageCount
from vcot.pipeline.sample import Requests
from vcot.pipeline.stage import Tally, batched
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.jobs.trainer import read_progress
from vcot.services.report.data import Example, Lookalikes, ReportData, TrendRow
from vcot.services.report.page import write_report
from vcot.services.run import results
from vcot.services.run.auditing import find_card
from vcot.services.run.billing import read_cost
from vcot.services.run.grading import describe_grader
from vcot.services.run.overlap_gate import read_overlap
from vcot.services.run.parity import ParityReport
from vcot.services.run.probing import load_prior
from vcot.services.run.rounds import Round, make_judge
from vcot.services.run.scoring import score_run
from vcot.services.run.session import Session
from vcot.services.run.sweep import load_sweep
from vcot.services.run.trend import render_trend
from vcot.training.protocol.job import read_record, read_status

MAX_EXAMPLES = 6


class RunEvaluation(Evaluation):
    """What a run's evaluation found; `results.json` in the run's report folder."""

    trend: tuple[TrendRow, ...] = ()
    """Of several rounds, on the validation split."""


def render(found: RunEvaluation, benchmark: Benchmark) -> list[RenderableType]:
    """The tables and sentences for a terminal."""
    return render_evaluation(found, benchmark) + ([render_trend(found.trend)] if found.trend else [])


def evaluate_scores(
    session: Session,
    scores: Scores,
    checkpoints: Sequence[Checkpoint],
    trend: Sequence[TrendRow] = (),
    named: Sequence[Checkpoint] = (),
) -> RunEvaluation:
    """Table 1, the paired differences and the rest, kept as `results.json` (services/run/results.py).

    `named` are the checkpoints where a user chose them, and not the run.
    """
    evaluation = build_evaluation(session, scores, [checkpoint.ref for checkpoint in checkpoints], trend)
    write_record(results.claim_folder(session.run, named) / results.RESULTS, evaluation)
    return evaluation


def build_evaluation(
    session: Session,
    scores: Scores,
    refs: Sequence[CheckpointRef],
    trend: Sequence[TrendRow] = (),
    *,
    is_done: bool = True,
) -> RunEvaluation:
    """The same, and nothing kept; of one that is not done, what there is."""
    recipe, questions = session.run.recipe, session.questions(session.run.recipe.eval.split)
    notes = describe_grader(session, questions)
    found = evaluate(scores, refs, session.benchmark, recipe.eval, model=recipe.model.source, notes=notes)
    more = {
        "margins": build_margins(questions.margins(refs, session.run.ledger, is_done=is_done), questions.tasks, refs),
        "matrix": score_run(session, refs),
    }
    return RunEvaluation(**dict(found) | more, trend=tuple(trend))


def write_run_report(session: Session, rounds: Sequence[Round], shown: Round, evaluation: RunEvaluation) -> Path:
    """The page, made of what the run holds, whichever command made it.

    Training and preference data are those of the round `shown`.
    """
    directory, pairs, found = shown.job_directory, shown.pairs, read_overlap(shown)
    data = ReportData(
        **list_findings(session, evaluation, directory if directory.is_dir() else None),
        counts=tuple(count_stages(session, rounds, evaluation)),
        judge_scores=tuple(pairs.scores),
        gaps=tuple(pair.chosen_score - pair.rejected_score for pair in pairs.pair_set.pairs),
        num_left_out=pairs.pair_set.num_left_out,
        contamination=found,
        lookalikes=tuple(_show_pictures(session, found)) if found else (),
        examples=tuple(choose_examples(shown)),
    )
    return write_report(data, results.claim_folder(session.run) / results.PAGE)


def list_findings(session: Session, evaluation: RunEvaluation, training: Path | None) -> dict[str, Any]:
    """Fields of ReportData that need no earlier stage to be done; `training` is a job's directory, where one was begun."""
    return {
        "recipe": session.run.recipe,
        "benchmark": session.benchmark,
        "settings": results.describe_settings(session.run),
        "checkpoints": tuple(dict.fromkeys(row.checkpoint for row in evaluation.results)),
        "judge": make_judge(session).name,
        "judge_cost": read_cost(session),
        "report_card": find_card(session),
        "results": evaluation.results,
        "differences": evaluation.differences,
        "chance": evaluation.chance,
        "published": evaluation.published,
        "reliance": evaluation.reliance,
        "margins": evaluation.margins,
        "repeats": evaluation.repeats,
        "breakdown": evaluation.breakdown,
        "matrix": evaluation.matrix,
        "prior": load_prior(session),
        "trend": evaluation.trend,
        "training": read_status(training) if training else None,
        "progress": tuple(read_progress(training)) if training else (),
        "parity": tuple(read_parity(session, evaluation)),
        "sweep": load_sweep(session),
    }


def _show_pictures(session: Session, found: Contamination) -> Iterator[Lookalikes]:
    """Those of the matches that are of images."""
    read = session.run.images.read
    for match in found.worst:
        if match.trained_image and match.asked_image:
            yield Lookalikes(match, read(match.trained_image), read(match.asked_image))


def read_parity(session: Session, evaluation: RunEvaluation) -> Iterator[ParityReport]:
    """Of each evaluated checkpoint that was compared as served."""
    for ref in dict.fromkeys(row.checkpoint for row in evaluation.results):
        if (path := session.parity_path(ref)).is_file():
            yield read_record(path, ParityReport)


def count_stages(session: Session, rounds: Sequence[Round], evaluation: RunEvaluation) -> list[StageCount]:
    """The account of every stage as the run holds it: what is not answered yet counts as failed."""
    counts: list[StageCount] = []
    for current in rounds:
        label = f" {current.number}" if len(rounds) > 1 else ""
        responses = _count_responses(session, f"sample{label}", current.requests())
        judged = current.pairs.judged.model_copy(update={"stage": f"judge{label}"})
        counts += [responses, judged, current.pairs.pair_set.count.model_copy(update={"stage": f"pair{label}"})]
    asked = [(row.checkpoint, session.run.recipe.eval.split, "") for row in evaluation.results]
    asked += [(row.checkpoint, "validation", ", validation") for row in evaluation.trend]
    for ref, split, label in dict.fromkeys(asked):
        requests = session.questions(split).requests(ref)
        counts.append(_count_responses(session, f"eval {ref.name}{label}", requests))
    return counts


def _count_responses(session: Session, stage: str, requests: Requests) -> StageCount:
    tally = Tally(stage, total=0)
    for chunk in batched(requests):
        keys = [key for request in chunk for key in request.response_keys()]
        done = session.run.ledger.done(Response, keys)
        others = session.run.ledger.get(Response, set(keys) - done)
        tally.total += len(keys)
        tally.ok += len(done)
        for key in set(keys) - done:
            found = others.get(key)
            is_refused = found is not None and found.refused
            tally.add("refused" if is_refused else "failed", reason=found.reason if found else "not_asked")
    return tally.close()


def choose_examples(current: Round) -> Iterator[Example]:
    """One pair of each question family, as far as the page has room."""
    tasks = {task.id: task for task in current.tasks}
    by_family = {tasks[pair.task].family: pair for pair in reversed(current.pairs.pair_set.pairs)}
    for pair in current.pairs.read(list(by_family.values())[:MAX_EXAMPLES]):
        reasons = current.read_rationales(pair)
        yield Example(
            task=tasks[pair.task],
            images=[data for _, data in current.session.run.images.read_all(pair.images)],
            pair=pair,
            chosen_rationale=reasons[pair.chosen_key],
            rejected_rationale=reasons[pair.rejected_key],
        )
