"""Judging what was sampled: what is owed, asking for it, and the account of it.

A judgment is good, or it failed and is owed, or the judge answered without a verdict: then it is refused, with its reason,
and is final. A stage goes on with a few of those (`judge.max_unjudged`), never with failed ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.judges import Judge, judgment_key
from pipeline.judges.cost import Meter
from pipeline.ledger import Ledger
from pipeline.records import Judgment, Response, StageCount, Task, Verdict
from pipeline.sections import JudgeSection
from pipeline.stage import OnProgress, Tally, work_off


@dataclass(frozen=True)
class Standing:
    """How far the judging of some responses has come."""

    responses: dict[str, Response]
    """The good ones, by the key of their judgment."""
    judged: frozenset[str]
    refused: dict[str, Judgment]
    """Answered without a verdict for good."""
    unfinished: dict[str, Judgment]
    """Records of those that are owed: what failed, and what is to be asked again."""

    @property
    def owed(self) -> list[str]:
        """Keys that are to be asked, in the order of the responses."""
        return [key for key in self.responses if key not in self.judged and key not in self.refused]

    @property
    def num_asks(self) -> int:
        """Judgments to be asked for: responses to one task that say the same share one."""
        return len(_group(self, self.owed).keys() - _group(self, self.judged).keys())

    def count(self) -> StageCount:
        """The account as it stands; what was never asked counts as failed."""
        tally = Tally("judge", total=len(self.responses), ok=len(self.judged))
        for judgment in self.refused.values():
            tally.add("refused", reason=judgment.reason)
        for key in self.owed:
            tally.add("failed", reason=self.unfinished[key].reason if key in self.unfinished else "not_asked")
        return tally.close()


def find_standing(
    judge: Judge, tasks: Mapping[str, Task], responses: Sequence[Response], ledger: Ledger, section: JudgeSection
) -> Standing:
    """What the ledger holds of `judge`'s judgments of the good ones among `responses`.

    A response that the judge did not give a verdict on is asked again while more than `max_unjudged` have none, `max_asks`
    times in all. So what a stage went on with stays as it is, and no later command changes its pairs by luck.
    """
    good = {judgment_key(judge, tasks[r.task], r): r for r in responses if r.error is None}
    judged = frozenset(ledger.done(Judgment, good))
    others = ledger.get(Judgment, (key for key in good if key not in judged))
    refused = {key: judgment for key, judgment in others.items() if judgment.refused and judgment.num_asked}
    if is_too_many(len(refused), len(good), section):
        refused = {key: judgment for key, judgment in refused.items() if judgment.num_asked >= section.max_asks}
    unfinished = {key: judgment for key, judgment in others.items() if key not in refused}
    return Standing(good, judged, refused, unfinished)


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


async def judge_responses(
    judge: Judge,
    tasks: Mapping[str, Task],
    standing: Standing,
    ledger: Ledger,
    meter: Meter,
    *,
    max_concurrency: int,
    on_progress: OnProgress,
) -> StageCount:
    """Judge what is owed; every judgment is in the ledger before it counts, with what all its attempts were billed.

    Responses to one task that say the same share one verdict, which is asked for and billed once.
    """
    tally = Tally("judge", total=len(standing.responses))
    tally.add("cached", len(standing.judged))
    for judgment in standing.refused.values():
        tally.add("refused", reason=judgment.reason)

    async def score(keys: Sequence[str]) -> Sequence[Judgment]:
        response, earlier = standing.responses[keys[0]], standing.unfinished.get(keys[0])
        meter.begin()
        verdict: Verdict | None = None
        try:
            num_asked = earlier.num_asked if earlier else 0
            verdict = await judge.score(tasks[response.task], response, num_asked=num_asked)
            return await keep(_add_up(_sign(verdict, judge, response, keys[0]), earlier), keys)
        finally:
            meter.end(verdict.usage if verdict else None)

    async def keep(judgment: Judgment, keys: Sequence[str]) -> Sequence[Judgment]:
        records = [_share(judgment, key, standing) for key in keys]
        await ledger.write(records)
        return records

    twins = _group(standing, standing.owed)
    known = _group(standing, standing.judged)
    for said in twins.keys() & known.keys():
        (judgment,) = ledger.get(Judgment, known[said][:1]).values()
        tally.add("ok", len(await keep(judgment, twins.pop(said))))
    return await work_off(
        twins.values(), score, tally, limit=max_concurrency, place=judge.place, on_progress=on_progress
    )


def _group(standing: Standing, keys: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """The keys of one task whose responses say the same, in their order."""
    groups: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        response = standing.responses[key]
        groups.setdefault((response.task, response.words), []).append(key)
    return groups


def _sign(verdict: Verdict, judge: Judge, response: Response, key: str) -> Judgment:
    fields = {name: getattr(verdict, name) for name in Verdict.model_fields}
    return Judgment(key=key, response=response.key, task=response.task, judge=judge.name, **fields)


def _share(judgment: Judgment, key: str, standing: Standing) -> Judgment:
    """The judgment of a response that says the same; what was billed stays with the one that was asked for."""
    if key == judgment.key:
        return judgment
    billed = standing.unfinished[key].usage if key in standing.unfinished else None
    return judgment.model_copy(update={"key": key, "response": standing.responses[key].key, "usage": billed})


def _add_up(judgment: Judgment, earlier: Judgment | None) -> Judgment:
    """The judgment with what was asked and billed before."""
    usages = [each.usage for each in (judgment, earlier) if each and each.usage]
    is_answered = judgment.error is None or judgment.refused
    changes = {
        "usage": sum(usages[1:], usages[0]) if usages else None,
        "num_asked": (earlier.num_asked if earlier else 0) + is_answered,
    }
    return judgment.model_copy(update=changes)
