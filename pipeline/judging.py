"""Judging what was sampled: what is owed, asking for it, and the account of it.

A judgment is good, or it failed and is owed, or the judge answered without a verdict: then it is refused, with its reason,
and is final. A stage goes on with a few of those (`judge.max_unjudged`), never with failed ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vcot.pipeline.judges import Judge, judgment_keys
from vcot.pipeline.judges.cost import Meter, open_meter
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.pairs import Judged
from vcot.pipeline.records import Judgment, Response, StageCount, Task, Verdict, add_usages
from vcot.pipeline.sample import Group, Groups
from vcot.pipeline.sections import JudgeSection
from vcot.pipeline.stage import QUEUED, OnProgress, Tally, batched, work_off


@dataclass(frozen=True)
class Seen:
    """A good response, and what the ledger holds of its judgment."""

    response: Response
    words: str
    """What the judge reads of it, however it is spaced."""
    key: str
    """Of the judgment."""
    is_judged: bool
    judgment: Judgment | None
    """Its record, where there is one; of one with a score only where the whole of it was asked for."""

    def is_final(self, *, are_asked_again: bool, section: JudgeSection) -> bool:
        """Whether it was answered without a verdict for good."""
        if self.judgment is None or not self.judgment.refused or not self.judgment.num_asked:
            return False
        return not are_asked_again or self.judgment.num_asked >= section.max_asks


@dataclass(frozen=True)
class Standing:
    """How far the judging of some responses has come: numbers only."""

    num_responses: int
    """Good ones."""
    num_judged: int
    refused: Mapping[str, int]
    """By reason: answered without a verdict for good."""
    owed: Mapping[str, int]
    """By reason of the last failure: those that are to be asked, or asked again."""
    num_asks: int
    """Judgments to be asked for: responses to one task that say the same share one."""
    num_requests: int
    """To the judge's model, for those: at most, or as a rule."""
    num_shared: int
    """Owed responses that say what a judged one says, so that nothing is asked for them."""
    are_asked_again: bool
    """Whether those without a verdict are too many, so that they are asked again, up to `max_asks` times."""

    @property
    def num_owed(self) -> int:
        """Responses without a judgment."""
        return sum(self.owed.values())

    def begin(self) -> Tally:
        """The account before anything is asked."""
        tally = Tally("judge", total=self.num_responses, cached=self.num_judged)
        for reason, number in self.refused.items():
            tally.add("refused", number, reason)
        return tally

    def count(self) -> StageCount:
        """The account as it stands; what was never asked counts as failed."""
        tally = Tally("judge", total=self.num_responses, ok=self.num_judged)
        for reason, number in self.refused.items():
            tally.add("refused", number, reason)
        for reason, number in self.owed.items():
            tally.add("failed", number, reason)
        return tally.close()


def find_standing(judge: Judge, groups: Iterable[Group], ledger: Ledger, section: JudgeSection) -> Standing:
    """What the ledger holds of `judge`'s judgments of the good responses.

    A response that the judge did not give a verdict on is asked again while more than `max_unjudged` have none, `max_asks`
    times in all. So what a stage went on with stays as it is, and no later command changes its pairs by luck.
    """
    counting = Counting(judge, section)
    for _, seen in look_at_judgments(judge, groups, ledger):
        counting.add(seen)
    return counting.close()


class Counting:
    """A standing that is being counted, task by task; mutated by `add`."""

    def __init__(self, judge: Judge, section: JudgeSection) -> None:
        self._section = section
        self._tolerant, self._strict = (_Count(are_asked_again, judge, section) for are_asked_again in (False, True))

    def add(self, group: Sequence[Seen]) -> None:
        """Count the responses to one task."""
        self._tolerant.add(group)
        self._strict.add(group)

    def close(self) -> Standing:
        """The numbers, now that it is known whether too many are without a verdict."""
        num_refused = sum(self._tolerant.refused.values())
        is_strict = is_too_many(num_refused, self._tolerant.num_responses, self._section)
        return (self._strict if is_strict else self._tolerant).close()


@dataclass
class _Count:
    """Under one of two assumptions."""

    are_asked_again: bool
    judge: Judge
    section: JudgeSection
    num_responses: int = 0
    num_judged: int = 0
    num_asks: int = 0
    num_requests: int = 0
    num_shared: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    owed: Counter[str] = field(default_factory=Counter)

    def add(self, group: Sequence[Seen]) -> None:
        self.num_responses += len(group)
        self.num_judged += sum(seen.is_judged for seen in group)
        owed = find_owed(group, self.section, are_asked_again=self.are_asked_again)
        self.owed.update(seen.judgment.reason if seen.judgment else "not_asked" for seen in owed)
        for seen in group:
            if seen.judgment and seen.is_final(are_asked_again=self.are_asked_again, section=self.section):
                self.refused[seen.judgment.reason] += 1
        texts, num_shared = find_texts(self.judge, group, owed)
        self.num_asks += len(texts)
        self.num_requests += self.judge.count_requests(self.section, len(texts)) if texts else 0
        self.num_shared += num_shared

    def close(self) -> Standing:
        return Standing(
            num_responses=self.num_responses,
            num_judged=self.num_judged,
            refused=self.refused,
            owed=self.owed,
            num_asks=self.num_asks,
            num_requests=self.num_requests,
            num_shared=self.num_shared,
            are_asked_again=self.are_asked_again,
        )


def look_at_judgments(
    judge: Judge, groups: Iterable[Group], ledger: Ledger, *, whole: bool = False
) -> Iterator[tuple[Task, list[Seen]]]:
    """Each task with its good responses, by index, and what is known of their judgments; with `whole`, all of it."""
    for chunk in batched(groups):
        keyed = [list(zip(judgment_keys(judge, group.task, group.good), group.good, strict=True)) for group in chunk]
        keys = [key for group in keyed for key, _ in group]
        judged = ledger.done(Judgment, keys)
        found = ledger.get(Judgment, (key for key in keys if whole or key not in judged))
        for group, own in zip(chunk, keyed, strict=True):
            yield (
                group.task,
                [Seen(r, judge.read_words(r), key, key in judged, found.get(key)) for key, r in own],
            )


def list_judged(group: Iterable[Seen]) -> list[Judged]:
    """Those with a score, whose judgments were read whole."""
    scored = ((seen.response, seen.judgment) for seen in group if seen.judgment is not None)
    return [
        Judged(response, found.score, found.judge, found.key, found.low, found.high)
        for response, found in scored
        if found.score is not None
    ]


def read_judged(judge: Judge, groups: Iterable[Group], ledger: Ledger) -> Iterator[tuple[Task, list[Judged]]]:
    """Each task with those of its responses that have a score, by index."""
    for task, group in look_at_judgments(judge, groups, ledger, whole=True):
        yield task, list_judged(group)


def find_owed(group: Sequence[Seen], section: JudgeSection, *, are_asked_again: bool) -> list[Seen]:
    """Those that are to be asked."""
    return [
        seen
        for seen in group
        if not seen.is_judged and not seen.is_final(are_asked_again=are_asked_again, section=section)
    ]


def find_texts(judge: Judge, group: Sequence[Seen], owed: Sequence[Seen]) -> tuple[set[str], int]:
    """The texts that are to be judged, and how many owed responses say what a judged one says.

    A judge that compares judges all texts of a task together, as soon as one is owed.
    """
    if judge.compares:
        return {seen.words for seen in group} if owed else set(), 0
    judged = {seen.words for seen in group if seen.is_judged}
    return {seen.words for seen in owed} - judged, sum(seen.words in judged for seen in owed)


def is_too_many(num_refused: int, num_requested: int, section: JudgeSection) -> bool:
    """Whether so many responses without a verdict stop a run."""
    return num_refused > section.max_unjudged * num_requested


def find_unjudged_fault(count: StageCount, section: JudgeSection) -> str | None:
    """What is wrong where the judge gave no verdict on more responses than the recipe tolerates."""
    if not is_too_many(count.refused, count.requested, section):
        return None
    return (
        f"{count.refused} of {count.requested} responses were not judged ({count.by_reason}), more than the share of "
        f"judge.max_unjudged = {section.max_unjudged:g}: ask again with judge.max_asks={section.max_asks + 1}, choose "
        "another judge, or raise judge.max_unjudged"
    )


@dataclass(frozen=True)
class _Ask:
    """What is judged in one go, and the judgment of a response that says the same, where there is one."""

    task: Task
    twins: Sequence[Sequence[Seen]]
    """Responses that share a verdict; one such group, or, for a judge that compares, each of the task's by itself."""
    owed: frozenset[str]
    """Keys of the judgments that are kept of it."""
    known: str | None
    """The key of that judgment."""


async def judge_responses(
    judge: Judge,
    groups: Groups | Sequence[Group],
    ledger: Ledger,
    section: JudgeSection,
    *,
    standing: Standing | None = None,
    meter: Meter | None = None,
    on_progress: OnProgress = lambda _: None,
) -> StageCount:
    """Judge what is owed of `groups`; every judgment is in the ledger before it counts, with what its attempts were billed.

    Responses to one task that say the same share one verdict, which is asked for and billed once. A judge's members judge
    before it (`Judge.walk`). `standing` and `meter` are found in the ledger where they are not given.
    """
    standing = standing or find_standing(judge, groups, ledger, section)
    judge.attend(ledger, meter or open_meter(section, *ledger.spent(judge.name)))
    tally = standing.begin()

    async def work(ask: _Ask) -> Sequence[Judgment]:
        responses = [twins[0].response for twins in ask.twins]
        num_asked = max(seen.judgment.num_asked if seen.judgment else 0 for twins in ask.twins for seen in twins[:1])
        verdicts = await judge.judge(ask.task, responses, num_asked=num_asked)
        signed = [
            _add_up(_sign(verdict, judge, twins[0]), twins[0].judgment)
            for verdict, twins in zip(verdicts, ask.twins, strict=True)
        ]
        return await keep(signed, ask)

    async def keep(judgments: Sequence[Judgment], ask: _Ask) -> Sequence[Judgment]:
        shared = zip(judgments, ask.twins, strict=True)
        records = [_share(judgment, seen) for judgment, twins in shared for seen in twins if seen.key in ask.owed]
        await ledger.write([record for record in records if record.reason != QUEUED])
        return records

    def find_asks() -> Iterator[_Ask]:
        return _find_asks(judge, groups, standing, ledger, section)

    if standing.num_shared:  # first, since an answer that was not asked for says nothing of the server
        for ask in find_asks():
            if ask.known is not None:
                tally.add("ok", len(await keep(list(ledger.get(Judgment, [ask.known]).values()), ask)))
    asks = (ask for ask in find_asks() if ask.known is None) if standing.num_asks else ()
    return await work_off(asks, work, tally, limit=section.max_concurrency, place=judge.place, on_progress=on_progress)


def _find_asks(
    judge: Judge, groups: Iterable[Group], standing: Standing, ledger: Ledger, section: JudgeSection
) -> Iterator[_Ask]:
    """What is owed, as it is drawn, in the order of the responses."""
    for task, group in look_at_judgments(judge, groups, ledger):
        owed = find_owed(group, section, are_asked_again=standing.are_asked_again)
        keys = frozenset(seen.key for seen in owed)
        if judge.compares:
            if owed:
                yield _Ask(task, [[seen] for seen in group], keys, None)
            continue
        known = {seen.words: seen.key for seen in reversed(group) if seen.is_judged}
        twins: dict[str, list[Seen]] = {}
        for seen in owed:
            twins.setdefault(seen.words, []).append(seen)
        for words, alike in twins.items():
            yield _Ask(task, [alike], keys, known.get(words))


def _sign(verdict: Verdict, judge: Judge, seen: Seen) -> Judgment:
    fields = {name: getattr(verdict, name) for name in Verdict.model_fields}
    return Judgment(key=seen.key, response=seen.response.key, task=seen.response.task, judge=judge.name, **fields)


def _share(judgment: Judgment, seen: Seen) -> Judgment:
    """The judgment of a response that says the same; what was billed stays with the one that was asked for."""
    if seen.key == judgment.key:
        return judgment
    billed = seen.judgment.usage if seen.judgment else None
    return judgment.model_copy(update={"key": seen.key, "response": seen.response.key, "usage": billed})


def _add_up(judgment: Judgment, earlier: Judgment | None) -> Judgment:
    """The judgment with what was asked and billed before."""
    is_answered = judgment.error is None or judgment.refused
    changes = {
        "usage": add_usages(each.usage for each in (judgment, earlier) if each),
        "num_asked": (earlier.num_asked if earlier else 0) + is_answered,
    }
    return judgment.model_copy(update=changes)
