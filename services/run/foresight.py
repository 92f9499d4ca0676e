"""What a run tells about its next evaluation: which requests are answered already, and how noisy the last one was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from vcot.eval.evaluate import Questions
from vcot.eval.findings import Difference
from vcot.eval.statistics import Noise, measure_correlation
from vcot.eval.table import OVERALL
from vcot.pipeline.errors import OwedError
from vcot.pipeline.judging import find_standing
from vcot.pipeline.option_scores import list_owed_options
from vcot.pipeline.records import CheckpointRef, Response
from vcot.pipeline.sample import SampleRequest
from vcot.pipeline.stage import batched
from vcot.services.planning.assumptions import ALIKE
from vcot.services.planning.eval_plan import Known, Owed
from vcot.services.planning.judge_estimate import count_audit
from vcot.services.run import results
from vcot.services.run.auditing import read_card
from vcot.services.run.directory import Run
from vcot.services.run.grading import OF_ANSWERS
from vcot.services.run.reporting import RunEvaluation
from vcot.services.run.session import Session
from vcot.training.protocol.job import read_record


def look_ahead(session: Session, checkpoints: Sequence[CheckpointRef], num_untrained: int) -> Known:
    """What is known of asking `checkpoints`, and `num_untrained` more that are not there yet."""
    noise = _find_noise(session.run)
    try:
        questions = session.questions(session.run.recipe.eval.split)
    except OwedError:  # no command has kept them, so that none is answered
        return Known(noise=noise)
    owed = Counter[str]()
    for checkpoint in checkpoints:
        owed.update(_count_owed(session, questions, checkpoint))
    for request in questions.requests(session.base.ref) if num_untrained else ():
        owed[request.prompt] += num_untrained
    num_later = owed.total() * questions.section.num_samples
    return Known(
        num_questions=len(questions.tasks),
        owed=owed,
        options=_count_options(session, questions, checkpoints, num_untrained),
        num_owed_judge=_count_unjudged(session, questions, checkpoints, num_later),
        noise=noise,
    )


def _count_options(
    session: Session, questions: Questions, checkpoints: Sequence[CheckpointRef], num_untrained: int
) -> Owed:
    """Requests that ask how likely an option is: of `checkpoints`, and of so many more."""
    if not questions.section.margins:
        return Owed(0, 0)
    num_each = _count_choices(questions.option_requests(session.base.ref))
    num_owed = num_untrained * num_each
    for checkpoint in checkpoints:
        num_owed += _count_choices(list_owed_options(questions.option_requests(checkpoint), session.run.ledger)[0])
    return Owed((len(checkpoints) + num_untrained) * num_each, num_owed)


def _count_choices(requests: Sequence[SampleRequest]) -> int:
    return sum(len(request.task.choices) for request in requests)


def _count_unjudged(
    session: Session, questions: Questions, checkpoints: Sequence[CheckpointRef], num_later: int
) -> int | None:
    """Requests to the judge of the answers: about those that are there, `num_later` more, and for its report card."""
    judge, ledger = questions.judge, session.run.ledger
    if judge is None:
        return None
    groups = list(questions.answers(checkpoints, ledger))
    there = sum(find_standing(each, groups, ledger, each.section).num_requests for each in judge.walk())
    num_audited = 0 if read_card(session, judge, OF_ANSWERS) else min(judge.section.num_audited, len(questions.tasks))
    audit = count_audit(judge.section, num_audited)
    return there + judge.count_requests(judge.section, num_later) + audit


def _find_noise(run: Run) -> Noise | None:
    """Of the evaluation under these settings, or else of the run's own if that is of the same questions."""
    folders = [results.find_folder(run)]
    if (run.kept.eval.benchmark, run.kept.eval.split) == (run.recipe.eval.benchmark, run.recipe.eval.split):
        folders.append(run.directory / "report")
    found = next((path for folder in folders if (path := folder / results.RESULTS).is_file()), None)
    return None if found is None else _measure_noise(read_record(found, RunEvaluation))


def _count_owed(session: Session, questions: Questions, checkpoint: CheckpointRef) -> Counter[str]:
    owed = Counter[str]()
    for chunk in batched(questions.requests(checkpoint)):
        done = session.run.ledger.done(Response, [key for request in chunk for key in request.response_keys()])
        owed.update(request.prompt for request in chunk if not done.issuperset(request.response_keys()))
    return owed


def _measure_noise(found: RunEvaluation) -> Noise | None:
    """Accuracy and correlation of the evaluation's checkpoints, on average over its differences; None where it has none."""
    accuracies = {
        (row.checkpoint.digest, row.prompt, row.temperature): row.accuracy[OVERALL].value
        for row in found.results
        if OVERALL in row.accuracy
    }
    sides = [
        tuple(accuracies[ref.digest, d.prompt, d.temperature] for ref in (d.base, d.policy)) for d in found.differences
    ]
    if not sides:
        return None
    num_responses = found.results[0].num_samples
    alike = fmean(row.correlation for row in found.repeats) if found.repeats else ALIKE
    return Noise(
        accuracy=fmean(share for side in sides for share in side),
        correlation=fmean(
            _correlate(difference, num_responses, (first, second), alike)
            for difference, (first, second) in zip(found.differences, sides, strict=True)
        ),
        alike=alike,
    )


def _correlate(difference: Difference, num_responses: int, accuracies: tuple[float, float], alike: float) -> float:
    freedom = max(1, difference.accuracy.n - 1)
    return measure_correlation(difference.mde, freedom, difference.num_questions, num_responses, accuracies, alike)
