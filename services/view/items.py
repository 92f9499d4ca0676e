"""What is known of a task: everything that was asked about it, as a row of the viewer's index."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

from vcot.eval.evaluate import Questions
from vcot.eval.scorer import score_choice
from vcot.pipeline.gain import list_candidates, list_owed, read_gains
from vcot.pipeline.judges import Judge
from vcot.pipeline.judging import Seen, list_judged, look_at_judgments
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.pairs import PAIR_POLICIES, count_picked, needs_gains
from vcot.pipeline.records import CheckpointRef, Response, Score, Task
from vcot.pipeline.sample import Group, Groups, SampleRequest
from vcot.pipeline.stage import Tally
from vcot.services.run.rounds import Round
from vcot.services.view.index import IndexedAnswer, IndexedRequest

ANY = "*"
"""In a mark: whichever checkpoint, or setting."""


@dataclass
class Look:
    """One task, as it was found; mutated while it is looked at."""

    task: Task
    asked: list[IndexedRequest] = field(default_factory=list)
    marks: set[str] = field(default_factory=set)
    """What it can be filtered by, as `kind|value`, or `outcome|checkpoint|setting`."""
    texts: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """Chosen minus rejected score, of each pair."""
    num_good: int = 0
    num_lost: int = 0
    """Failed or refused."""
    is_open: bool = False
    """Whether an answer may come in an error's place, or in a gap, of which the ledger tells no news."""

    def count(self, responses: Iterable[Response], num_asked: int) -> None:
        """Take in the responses to one request, errors included."""
        responses = list(responses)
        for response in responses:
            if response.text is not None:
                self.num_good += 1
                self.texts.append(response.text)
            else:
                self.num_lost += 1
                self.marks.add(f"{'refused' if response.refused else 'failed'}|{response.reason or 'unknown'}")
                self.is_open |= not response.refused
        self.is_open |= 0 < len(responses) < num_asked

    def mark_outcome(self, outcome: str, checkpoint: str, setting: str) -> None:
        """So that it is found by outcome alone, and with checkpoint, setting or both."""
        self.marks |= {f"{outcome}|{one}|{other}" for one in (checkpoint, ANY) for other in (setting, ANY)}


class Shelf(Protocol):
    """Tasks that were asked for one purpose."""

    @property
    def slug(self) -> str:
        """Its name in addresses."""

    @property
    def title(self) -> str:
        """Its name for people."""

    @property
    def tasks(self) -> Sequence[Task]:
        """In the order in which they are shown."""

    def look(self, tasks: Sequence[Task]) -> Iterator[Look]:
        """At some of them."""


@dataclass(frozen=True)
class Sampled:
    """The tasks of a round, with the chains that pairs are made of."""

    current: Round
    judge: Judge
    slug: str
    title: str

    @property
    def tasks(self) -> Sequence[Task]:
        """As `Shelf` says, and `look`."""
        return self.current.tasks

    def look(self, tasks: Sequence[Task]) -> Iterator[Look]:
        """At some of them."""
        ledger, plan = self.current.session.run.ledger, replace(self.current.requests(), tasks=tasks)
        groups = list(Groups(plan, ledger))
        judged = look_at_judgments(self.judge, groups, ledger, whole=True)
        for request, group, (_, seen) in zip(plan, groups, judged, strict=True):
            yield self._look(request, group, seen)

    def _look(self, request: SampleRequest, group: Group, seen: Sequence[Seen]) -> Look:
        look = Look(request.task)
        look.count(group.found, request.sampling.n)
        is_whole = not look.is_open and len(group.found) == request.sampling.n and all(one.judgment for one in seen)
        places = self._pick(look, seen) if is_whole else {}
        judgments = {one.response.key: one for one in seen}
        for one in seen:
            _note_judgment(look, one)
        answered = [
            _answer(response, judgments.get(response.key), _score(request.task, response), places)
            for response in group.found
        ]
        asked = IndexedRequest(
            checkpoint=request.checkpoint.name,
            prompt=request.prompt,
            temperature=request.sampling.temperature,
            responses=tuple(answered),
        )
        for outcome in {each.outcome for each in answered if each.outcome}:
            look.mark_outcome(outcome, asked.checkpoint, asked.setting)
        look.asked.append(asked)
        return look

    def _pick(self, look: Look, seen: Sequence[Seen]) -> dict[str, str]:
        """The responses in the task's pairs; where there is none, why, as a mark."""
        run, tally = self.current.session.run, Tally("pair", total=0)
        section, judged = run.recipe.pairs, list_judged(seen)
        if needs_gains(section):
            ((_, judged),) = read_gains([(look.task, judged)], run.ledger)
            look.is_open |= bool(list_owed(list_candidates(look.task, judged, section)))
        pairs = count_picked(tally, PAIR_POLICIES.resolve(section.policy), look.task, judged, section)
        look.marks.add("pair|made" if pairs else f"no pair|{next(iter(tally.reasons))}")
        look.gaps = [chosen.score - rejected.score for chosen, rejected in pairs]
        places = {rejected.response.key: "rejected" for _, rejected in pairs}
        return places | {chosen.response.key: "chosen" for chosen, _ in pairs}


def _note_judgment(look: Look, one: Seen) -> None:
    found = one.judgment
    if found is not None and found.score is not None:
        look.scores.append(found.score)
        look.texts.append(found.rationale)
    elif found is not None:
        look.marks.add(f"{'not judged' if found.refused else 'judging failed'}|{found.reason or 'unknown'}")
        look.is_open = True  # a later command may ask again


def _score(task: Task, response: Response) -> Score | None:
    """Against gold, of a question with options; any other is the judge's to score."""
    return score_choice(task, response) if task.answer is not None and task.choices else None


def _answer(response: Response, seen: Seen | None, score: Score | None, places: Mapping[str, str]) -> IndexedAnswer:
    return IndexedAnswer(
        key=response.key,
        judgment=seen.key if seen and seen.judgment else None,
        score=seen.judgment.score if seen and seen.judgment else None,
        outcome=score.value if score else None,
        answer=score.answer if score else None,
        place=places.get(response.key, ""),
    )


@dataclass(frozen=True)
class Evaluated:
    """The benchmark's questions, as several checkpoints answered them; the first is the base."""

    questions: Questions
    checkpoints: Sequence[CheckpointRef]
    ledger: Ledger
    slug: str = "eval"
    title: str = "Evaluation"

    @property
    def tasks(self) -> Sequence[Task]:
        """As `Shelf` says, and `look`."""
        return self.questions.tasks

    @cached_property
    def _requests(self) -> Mapping[str, Sequence[tuple[str, SampleRequest]]]:
        """By task: every request about it, with the image that it shows."""
        found: dict[str, list[tuple[str, SampleRequest]]] = defaultdict(list)
        for checkpoint in self.checkpoints:
            for shown in self.questions.section.images:
                for request in self.questions.requests(checkpoint, [shown]):
                    found[request.task.id].append((shown, request))
        return found

    def look(self, tasks: Sequence[Task]) -> Iterator[Look]:
        """At some of them."""
        asked = {task.id: self._requests[task.id] for task in tasks}
        keys = [key for own in asked.values() for _, request in own for key in request.response_keys()]
        found = self.ledger.get(Response, keys)
        for task in tasks:
            yield self._look(task, asked[task.id], found)

    def _look(self, task: Task, requests: Sequence[tuple[str, SampleRequest]], found: Mapping[str, Response]) -> Look:
        look = Look(task)
        right: dict[tuple[str, str], list[bool]] = defaultdict(list)  # by checkpoint and setting, under all seeds
        for shown, request in requests:
            responses = [found[key] for key in request.response_keys() if key in found]
            look.count(responses, request.sampling.n)
            scores = self.questions.score(responses, self.ledger)
            asked = IndexedRequest(
                checkpoint=request.checkpoint.name,
                prompt=request.prompt,
                temperature=request.sampling.temperature,
                shown=shown,
                responses=tuple(
                    _answer(*each, {}) for each in zip(responses, [None] * len(responses), scores, strict=True)
                ),
            )
            look.asked += [asked] if responses else []
            if shown == "true":
                for score in scores:
                    look.mark_outcome(score.value or "failed", asked.checkpoint, asked.setting)
                right[asked.checkpoint, asked.setting] += [score.value == "correct" for score in scores if score.value]
        self._mark_flips(look, {asked: sum(values) / len(values) for asked, values in right.items() if values})
        return look

    def _mark_flips(self, look: Look, shares: Mapping[tuple[str, str], float]) -> None:
        """Where a later checkpoint answers a question right more seldom than the base, or more often."""
        for (checkpoint, setting), share in shares.items():
            before = shares.get((self.checkpoints[0].name, setting))
            if before is not None and share != before:
                look.mark_outcome("lost" if share < before else "gained", checkpoint, setting)
