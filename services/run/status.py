"""How far a run is, for someone who looks at it from outside: read from its recipe, ledger and files, while others write.

Each stage's account says what the ledger holds of what the recipe asks: requested = ok + failed + refused + owed. What a
running command adds (its rate, its own account with `cached`) it says itself, in a file (services/run/live.py).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from vcot.eval.evaluate import Questions
from vcot.pipeline.errors import OwedError, VcotError
from vcot.pipeline.gain import count_gains
from vcot.pipeline.judges import Judge
from vcot.pipeline.judges.cost import Cost
from vcot.pipeline.judging import find_standing
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.option_scores import list_owed_options
from vcot.pipeline.pairs import needs_gains
from vcot.pipeline.records import Response, Usage
from vcot.pipeline.sample import Group, SampleRequest
from vcot.pipeline.stage import Tally, batched
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.jobs.trainer import read_progress
from vcot.services.run.billing import read_whole_cost
from vcot.services.run.live import Live
from vcot.services.run.rounds import Round, list_rounds, make_judge
from vcot.services.run.session import Session
from vcot.services.run.stages import RunStatus, StageStatus
from vcot.training.protocol.job import JOB, read_status


class _Survey:
    """The figures of a run, as they are found; mutated by `look`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.stages: list[StageStatus] = []
        self.sampled: Usage | None = None
        self.scored: Usage | None = None
        self.judged: Cost | None = None
        self.problems: list[str] = []

    def look(self) -> None:
        """Read all that can be read; what cannot is a problem, told once."""
        with self._telling():
            self.sampled = self._session.run.ledger.sampled()
            self.scored = self._session.run.ledger.scored()
            self.judged = read_whole_cost(self._session)
        rounds: list[Round] = []
        with self._telling("sample"):
            rounds = list_rounds(self._session)
        for current in rounds:
            self._look_at_round(current, f" {current.number}" if len(rounds) > 1 else "")
        trained = [policy for current in rounds[-1:] for policy in self._find_policy(current)]
        self._look_at_evaluation([*(current.start for current in rounds[:1]), *trained])

    def _look_at_evaluation(self, checkpoints: Sequence[Checkpoint]) -> None:
        """What is asked of each checkpoint, and of the judge that scores the answers."""
        section, counts = self._session.run.recipe.eval, dict[str, Callable[[str], StageStatus]]()
        for checkpoint in checkpoints:
            counts[f"eval {checkpoint.ref.name}"] = partial(self._count_eval, checkpoint)
            if section.margins:
                counts[f"margins {checkpoint.ref.name}"] = partial(self._count_options, checkpoint)
        if section.judge is not None:
            counts["grade"] = partial(self._count_graded, checkpoints)
        for stage, count in counts.items():
            with self._telling(stage):
                self.stages.append(count(stage))

    def _look_at_round(self, current: Round, number: str) -> None:
        *members, judge = make_judge(self._session).walk()
        counts: dict[str, Callable[[str, Round], StageStatus]] = {
            f"sample{number}": self._count_sampled,
            **{f"judge{number}, {member.name}": partial(self._count_judgments, member) for member in members},
            f"judge{number}": partial(self._count_judgments, judge),
            **({f"gain{number}": _count_gains} if needs_gains(self._session.run.recipe.pairs) else {}),
            f"pair{number}": _count_pairs,
            f"train{number}": _count_steps,
        }
        for stage, count in counts.items():
            with self._telling(stage):
                self.stages.append(count(stage, current))

    def _find_policy(self, current: Round) -> Iterator[Checkpoint]:
        with self._telling():
            if (policy := current.policy) is not None:
                yield policy

    @contextmanager
    def _telling(self, stage: str = "") -> Iterator[None]:
        """What is owed before a stage is its note; any other fault is a problem."""
        try:
            yield
        except OwedError as error:
            if stage:
                self.stages.append(StageStatus(stage=stage, note=str(error)))
        except VcotError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))

    def _count_sampled(self, name: str, current: Round) -> StageStatus:
        return _count_responses(name, current.requests(), self._session.run.ledger)

    def _count_judgments(self, judge: Judge, name: str, current: Round) -> StageStatus:
        return _count_judged(name, judge, current.groups, self._session.run.ledger)

    @property
    def _questions(self) -> Questions:
        return self._session.questions(self._session.run.recipe.eval.split)

    def _count_eval(self, checkpoint: Checkpoint, name: str) -> StageStatus:
        return _count_responses(name, self._questions.requests(checkpoint.ref), self._session.run.ledger)

    def _count_options(self, checkpoint: Checkpoint, name: str) -> StageStatus:
        """What failed is owed, as `vcot eval` asks for it again."""
        _, tally = list_owed_options(self._questions.option_requests(checkpoint.ref), self._session.run.ledger)
        return _as_status(name, tally, "questions with options, by image")

    def _count_graded(self, checkpoints: Sequence[Checkpoint], name: str) -> StageStatus:
        questions, ledger = self._questions, self._session.run.ledger
        assert questions.judge is not None
        groups = list(questions.answers([checkpoint.ref for checkpoint in checkpoints], ledger))
        return _count_judged(name, questions.judge, groups, ledger)

    @property
    def is_finished(self) -> bool:
        """Whether every stage's work is done, those of the last round and the evaluation of its policy included."""
        num_evaluated = sum(stage.stage.startswith("eval ") for stage in self.stages)
        is_open = any(stage.owed or stage.failed or not stage.requested for stage in self.stages)
        return num_evaluated > 1 and not is_open and not self.problems


def _count_responses(name: str, requests: Iterable[SampleRequest], ledger: Ledger) -> StageStatus:
    """What the ledger holds of what is asked, a few requests at a time; good responses are only counted."""
    total = num_ok = 0
    outcomes, reasons = Counter[str](), Counter[str]()
    for chunk in batched(requests, 64):
        keys = [key for request in chunk for key in request.response_keys()]
        good = ledger.done(Response, keys)
        total, num_ok = total + len(keys), num_ok + len(good)
        for response in ledger.get(Response, (key for key in keys if key not in good)).values():
            outcomes["refused" if response.refused else "failed"] += 1
            reasons[response.reason or "unknown"] += 1
    owed = total - num_ok - sum(outcomes.values())
    return StageStatus(stage=name, requested=total, ok=num_ok, owed=owed, reasons=reasons, **outcomes)


def _count_judged(name: str, judge: Judge, groups: Iterable[Group], ledger: Ledger) -> StageStatus:
    """What the ledger holds of a judge's verdicts on the good responses of `groups`."""
    found = find_standing(judge, groups, ledger, judge.section)
    failed = {reason: number for reason, number in found.owed.items() if reason != "not_asked"}
    return StageStatus(
        stage=name,
        requested=found.num_responses,
        ok=found.num_judged,
        failed=sum(failed.values()),
        refused=sum(found.refused.values()),
        owed=found.owed.get("not_asked", 0),
        reasons=Counter(found.refused) + Counter(failed),
        note=f"by {judge.name}, of the responses that are there",
    )


def _count_gains(name: str, current: Round) -> StageStatus:
    """What failed is owed, as `vcot pair` asks for it again."""
    tally = count_gains(candidates for _, candidates in current.candidates())
    asks = "; `vcot pair` asks" if tally.finished < tally.total else ""
    return _as_status(name, tally, f"of the responses that may be chosen{asks}")


def _as_status(name: str, tally: Tally, note: str) -> StageStatus:
    """An account of what is there already: what has no outcome yet is owed."""
    return StageStatus(
        stage=name,
        requested=tally.total,
        ok=tally.cached,
        refused=tally.refused,
        owed=tally.total - tally.finished,
        reasons=tally.reasons,
        note=note,
    )


def _count_pairs(name: str, current: Round) -> StageStatus:
    count, pairs = current.pairs.pair_set.count, current.pairs
    is_there = pairs.directory.is_dir()
    note = f"{len(pairs.train)} training + {len(pairs.validation)} validation" + (
        "" if is_there else ", not written yet"
    )
    numbers = count.model_dump(include={"requested", "ok", "failed", "refused", "reasons"})
    return StageStatus(stage=name, note=note, **numbers)


def _count_steps(name: str, current: Round) -> StageStatus:
    """Steps of the training job."""
    directory = current.job_directory
    if not (directory / JOB).is_file():
        return StageStatus(stage=name, note="not begun")
    status = read_status(directory)
    points = [point for point in read_progress(directory) if point.kind == "train"]
    total = status.num_steps or (points[-1].num_steps if points else 0)
    done = total if status.state == "done" else min(total, points[-1].step if points else 0)
    note = f"{status.state}{f': {status.message}' if status.message else ''}"
    return StageStatus(stage=name, requested=total, ok=done, owed=total - done, note=note)


async def look_at_run(session: Session, live: Live | None, holder: int | None, now: float) -> RunStatus:
    """All of it. Nothing is waited for, and nothing is written."""
    survey = _Survey(session)
    await asyncio.to_thread(survey.look)
    is_at_work = bool(holder) or (holder is None and live is not None and live.end is None)
    state = (
        "at work" if is_at_work else "damaged" if survey.problems else "finished" if survey.is_finished else "stopped"
    )
    return RunStatus(
        run=str(session.run.directory),
        state=state,
        recipe=session.run.recipe.name,
        holder=holder,
        live=live,
        live_age_s=now - live.updated_at if live else None,
        stages=tuple(survey.stages),
        sampled=survey.sampled,
        scored=survey.scored,
        judged=survey.judged,
        problems=tuple(survey.problems),
    )
