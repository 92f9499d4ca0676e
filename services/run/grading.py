"""Scoring the answers of an evaluation by a judge (`eval.judge`), whose report card is made of them first."""

from __future__ import annotations

from collections.abc import Sequence

from vcot.eval.evaluate import Questions
from vcot.eval.report_card import ReportCard
from vcot.eval.scorer import is_known_right
from vcot.pipeline.judges import Judge
from vcot.pipeline.judging import find_standing
from vcot.pipeline.report import Began, Warned
from vcot.pipeline.sample import Group
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.run.asking import judge_groups
from vcot.services.run.auditing import audit, check_auc, choose_sample, read_card
from vcot.services.run.session import Session

OF_ANSWERS = "eval"
"""Whose answers the card is about: the same judge may have another one as the run's."""


async def grade_stage(session: Session, checkpoints: Sequence[Checkpoint], questions: Questions) -> None:
    """Judge the answers of `checkpoints` that have no verdict yet, where the recipe names a judge for that.

    Raises StageError where its report card shows less than `min_auc`, or where it gave no verdict on more than it may.
    """
    judge, ledger = questions.judge, session.run.ledger
    if judge is None:
        return
    groups = list(questions.answers([checkpoint.ref for checkpoint in checkpoints], ledger))
    card = read_card(session, judge, OF_ANSWERS) or await _audit(session, judge, groups)
    if card is not None:
        check_auc(card, judge.section)
    session.report(Began("grade", f"the answers to {len(groups)} questions, by {judge.name}"))
    for each in judge.walk():
        await judge_groups(session, each, groups, find_standing(each, groups, ledger, each.section), stage="grade")


async def _audit(session: Session, judge: Judge, groups: Sequence[Group]) -> ReportCard | None:
    """On questions to which one answer is right by the benchmark's own words, and another is none of them."""
    sample = choose_sample(groups, judge.section.num_audited, is_known_right)
    if sample:
        return await audit(session, judge, sample, of=OF_ANSWERS)
    session.report(
        Warned(
            f"judge {judge.name} cannot be audited: no question has both an answer that says the gold one and an answer "
            "that does not; ask more questions (eval.num_tasks), or hotter (eval.temperatures)"
        )
    )
    return None


def describe_grader(session: Session, questions: Questions) -> list[str]:
    """Sentences below a table: which judge scored its answers, and what is known of it; none without a judge."""
    judge = questions.judge
    if judge is None:
        return []
    low, high = judge.scale
    told = f"Answers are scored by the judge {judge.name}, from {low:g} to {high:g}; figures are shares of that scale."
    card = read_card(session, judge, OF_ANSWERS)
    if card is None:
        return [told, "Nobody has audited this judge."]
    return [told, f"Its report card, on {card.num_tasks} questions with known answers:", *card.verdicts]
