"""The audit of a run's judge: it is asked about responses that are known to be right or wrong, in several ways.

What it is asked as the recipe says counts as judged, so that `vcot judge` does not ask it again (unless the judge compares:
there an audited task has two responses only). The other ways, such as without the image, are settings of the same judge,
and their judgments are kept like any other: an audit that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from vcot.eval.image_reliance import choose_images
from vcot.eval.report_card import Duel, ReportCard, build_card
from vcot.pipeline.errors import DataError, OwedError, StageError
from vcot.pipeline.files import write_record
from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges import Judge, find_judge
from vcot.pipeline.judges.combined import find_shares
from vcot.pipeline.judges.pairwise import count_hanging
from vcot.pipeline.judging import find_standing, look_at_judgments
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.pair_policies import is_response_right
from vcot.pipeline.records import CheckpointRef, Judgment, Response, Task, content_key
from vcot.pipeline.report import Began
from vcot.pipeline.sample import Group, Groups
from vcot.pipeline.sections import JudgeSection
from vcot.services.run.asking import ask_judge
from vcot.services.run.rounds import Round, make_judge
from vcot.services.run.session import Session
from vcot.training.protocol.job import read_record

Way = Literal["own", "again", "none", "blank", "other"]
"""How the judge is asked: as the recipe says, with another seed, and with another image or none."""
_CHANGES: Mapping[Way, Mapping[str, Any]] = {
    "own": {},
    "again": {"seed": 1_000_003},
    "none": {"image": "none"},
    "blank": {"image": "blank"},
    "other": {"image": "other"},
}
"""The settings that differ."""
_WORDS: Mapping[Way, str] = {
    "own": "as the recipe says",
    "again": "asked again",
    "none": "without the image",
    "blank": "with a blank image",
    "other": "with another's image",
}


async def audit_stage(current: Round) -> ReportCard:
    """Ask what is owed of the audit, and keep the card. Raises OwedError where nothing can be audited."""
    session, judge = current.session, make_judge(current.session)
    sample = choose_sample(current.groups, judge.section.num_audited)
    if not sample:
        raise OwedError(
            "no task has both a response that is right and one that is wrong by the gold answer, so the judge cannot be "
            "audited; sample more tasks, or hotter (sample.temperature)"
        )
    return await audit(session, judge, sample, current)


async def audit(
    session: Session, judge: Judge, sample: Sequence[Group], current: Round | None = None, *, of: str = ""
) -> ReportCard:
    """Ask what is owed about the right and the wrong response to each task of `sample`, and keep the card.

    `current` is the round whose tasks they respond to; `of` says what they are responses to, where that is no round's.
    """
    session.report(Began("audit", f"{judge.name}, on {len(sample)} tasks with a right and a wrong response"))
    found: dict[str, dict[str, Sequence[Judgment]]] = {}
    ways = list_ways(judge)
    for way in ways:
        asked = vary(judge.section, _CHANGES[way], session.run.images)
        groups = show(sample, way, session.run.images)
        found[way] = await _ask(session, asked, groups, _WORDS[way], num_times=len(ways) if way == "own" else 0)
    both_right, why_no_self = await _ask_about_own(session, judge, current)
    card = _build(session, judge, sample, found, both_right, why_no_self)
    write_record(session.run.path("judges", f"{key_card(judge, of)}.json"), card)
    return card


async def _ask(
    session: Session, judge: Judge, groups: Sequence[Group], words: str, *, num_times: int = 0
) -> dict[str, Sequence[Judgment]]:
    """By task, the judgments of its two responses, after what is owed was asked of the judge and its members."""
    for each in judge.walk() if groups else ():
        standing = find_standing(each, groups, session.run.ledger, each.section)
        count = await ask_judge(session, each, groups, standing, num_times=num_times)
        session.account(count.model_copy(update={"stage": f"audit, {words}"}))
    return read_both(judge, groups, session.run.ledger)


async def _ask_about_own(session: Session, judge: Judge, current: Round | None) -> tuple[list[Duel], str]:
    """A right response of the judge's own model against another model's, task by task; or why there are none."""
    models = {each.section.model for each in judge.walk() if each.is_model}
    if not models:
        return [], ""
    if current is None:
        return [], "an evaluation's answers are not set against another model's"
    answered = _list_generators(current)
    own = _find_own(current, [ref for ref, _ in answered], models)
    if not own:
        return [], "no model that it asks is one of those that sampled these tasks"
    if len(own) == len(answered):
        return [], "only one model's responses, its own, are in the run"
    pairs = list(_pair_right(current.tasks, answered, own, judge.section.num_audited))
    if not pairs:
        return [], "no task has right responses of both its own model and another that say different things"
    found = await _ask(session, judge, pairs, "its own model's and another's")
    if not found:
        return [], "it gave no two such responses a score"
    clusters = {group.task.id: group.task.picture or group.task.id for group in pairs}
    return [_duel(task, clusters[task], *both) for task, both in found.items()], ""


def _list_generators(current: Round) -> list[tuple[CheckpointRef, Groups]]:
    """Who has answered the round's tasks under its prompt and settings, and what they said."""
    ledger, plan = current.session.run.ledger, current.requests()
    asked = [(ref, Groups(replace(plan, checkpoint=ref), ledger)) for ref in ledger.list_checkpoints()]
    return [(ref, groups) for ref, groups in asked if any(group.good for group in groups)]


def _find_own(current: Round, refs: Sequence[CheckpointRef], models: Collection[str | None]) -> set[str]:
    """Digests of the judge's own model, by its name or its source, and of what was trained from it."""
    section, base = current.session.run.recipe.model, current.session.base.ref
    own = {ref.digest for ref in refs if ref.name in models}
    own |= {base.digest} if section.source in models else set()
    return own | {ref.digest for ref in refs if ref.parent in own}


def _pair_right(
    tasks: Iterable[Task], answered: Sequence[tuple[CheckpointRef, Groups]], own: Collection[str], num: int
) -> Iterator[Group]:
    """Of the first `num` tasks that have both, a right response of the judge's own model, and another model's."""
    num_found = 0
    for task, *groups in zip(tasks, *(groups for _, groups in answered), strict=True):
        right = [
            (ref.digest in own, response)
            for (ref, _), group in zip(answered, groups, strict=True)
            for response in group.good
            if is_response_right(task, response)
        ]
        mine = next((response for is_own, response in right if is_own), None)
        other = next((r for is_own, r in right if not is_own and mine is not None and r.words != mine.words), None)
        if mine is not None and other is not None and num_found < num:
            num_found += 1
            yield Group(task, [mine, other])


def list_ways(judge: Judge) -> list[Way]:
    """How it is asked: a program once, and a model that sees no image without the controls of the image."""
    models = [each for each in judge.walk() if each.is_model]
    if not models:
        return ["own"]
    return list(_CHANGES) if any(each.section.image == "own" for each in models) else ["own", "again"]


def find_card(session: Session) -> ReportCard | None:
    """The report card of the recipe's judge, where it was audited."""
    return read_card(session, make_judge(session))


def read_card(session: Session, judge: Judge, of: str = "") -> ReportCard | None:
    """That of any judge, made by `audit`."""
    path = session.run.directory / "judges" / f"{key_card(judge, of)}.json"
    return read_record(path, ReportCard) if path.is_file() else None


def check_auc(card: ReportCard, section: JudgeSection) -> None:
    """Raise StageError where the recipe asks for a better judge."""
    if section.min_auc is not None and card.auc.value < section.min_auc:
        raise StageError(
            f"judge {card.judge} has an AUC of {card.auc.value:.2f} ({card.auc.low:.2f} to {card.auc.high:.2f}) on "
            f"{card.num_tasks} tasks, less than judge.min_auc = {section.min_auc:g}: choose another judge, or lower it"
        )


def key_card(judge: Judge, of: str = "") -> str:
    """Names the card's file: judge, settings, how many tasks, and of what."""
    asked = {"num": judge.section.num_audited, "code": [dict(each.code) for each in judge.walk()]}
    return content_key(judge=judge.name, fingerprint=judge.fingerprint, **asked, **({"of": of} if of else {}))[:12]


def choose_sample(
    groups: Iterable[Group], num: int, is_right: Callable[[Task, Response], bool | None] = is_response_right
) -> list[Group]:
    """The first `num` tasks to which a response is right and another wrong, with the first of each: the right one first."""
    chosen: list[Group] = []
    for group in groups:
        by_outcome: dict[bool, Response] = {}
        for response in group.good:
            if (outcome := is_right(group.task, response)) is not None:
                by_outcome.setdefault(outcome, response)
        if len(by_outcome) == 2:
            chosen.append(Group(group.task, [by_outcome[True], by_outcome[False]]))
        if len(chosen) == num:
            break
    return chosen


def vary(section: JudgeSection, changes: Mapping[str, Any], images: ImageStore) -> Judge:
    """The judge with other settings; one that goes by others with members that have them."""
    members = tuple(vary(member, changes, images).section for member in section.members)
    plain = find_judge(section, images)
    fields = {name: value for name, value in changes.items() if name in plain.takes}
    return find_judge(section.model_copy(update={"members": members, **fields}), images)


def show(sample: Sequence[Group], way: Way, images: ImageStore) -> list[Group]:
    """The tasks with the image that is shown that way; none where there are too few to deal others'."""
    if way != "blank" and way != "other":
        return list(sample)
    try:
        shown = choose_images([group.task for group in sample], way, images)
    except DataError:
        return []
    return [
        Group(group.task.model_copy(update={"images": shown[group.task.id]}), group.found)
        for group in sample
        if group.task.id in shown
    ]


def read_both(judge: Judge, groups: Sequence[Group], ledger: Ledger) -> dict[str, Sequence[Judgment]]:
    """By task, the judgments of the right and the wrong response, where both have a score."""
    return {task.id: judged for task, judged in _read(judge, groups, ledger) if len(judged) == 2}


def _read(judge: Judge, groups: Sequence[Group], ledger: Ledger) -> Iterator[tuple[Task, list[Judgment]]]:
    for task, seen in look_at_judgments(judge, groups, ledger, whole=True):
        yield task, [each.judgment for each in seen if each.judgment and each.judgment.score is not None]


def _build(
    session: Session,
    judge: Judge,
    sample: Sequence[Group],
    found: Mapping[str, Mapping[str, Sequence[Judgment]]],
    both_right: Sequence[Duel],
    why_no_self: str,
) -> ReportCard:
    own = found["own"]
    if not own:
        raise StageError(f"judge {judge.name} gave no task's two responses a score; choose another judge")
    clusters = {group.task.id: group.task.picture or group.task.id for group in sample}
    lengths = {group.task.id: _count_words(group.found) for group in sample}
    counts = [count_hanging(right.rationale) for right, _ in own.values()]
    members = [read_both(member, sample, session.run.ledger) for member in judge.members]
    return build_card(
        judge.name,
        {way: [_duel(task, clusters[task], *both) for task, both in each.items()] for way, each in found.items()},
        num_unjudged=len(sample) - len(own),
        lengths=lengths,
        compared=(sum(num for _, num in counts), sum(hung for hung, _ in counts)),
        rankings=_rank(members) if len(members) > 1 else (),
        knows_gold=judge.knows_gold,
        both_right=both_right,
        why_no_self=why_no_self,
    )


def _duel(task: str, cluster: str, right: Judgment, wrong: Judgment) -> Duel:
    return Duel(task, cluster, right.score or 0.0, wrong.score or 0.0)


def _count_words(responses: Sequence[Response]) -> tuple[int, int]:
    right, wrong = (len(response.words.split()) for response in responses)
    return right, wrong


def _rank(members: Sequence[Mapping[str, Sequence[Judgment]]]) -> list[list[float]]:
    """Each member's ranking of the two responses to each task that all of them scored."""
    tasks = [task for task in members[0] if all(task in member for member in members)]
    return [
        [share for task in tasks for share in find_shares([one.score or 0.0 for one in member[task]])]
        for member in members
    ]
