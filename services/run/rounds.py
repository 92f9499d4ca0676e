"""The rounds of a run (Wu et al. 2024): one, or several that each go on from the last one's policy.

Model: a `Round` is a policy and its questions, and all that follows from them: responses, pairs, training job, and the
policy that comes out, which the next round starts from. Nothing is stored but in the run, so that a round is the same
whichever command looks at it, and after any stop.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from vcot.pipeline.errors import DataError, OwedError
from vcot.pipeline.gain import list_candidates, list_owed, read_gains
from vcot.pipeline.judges import Judge, find_judge
from vcot.pipeline.judging import Counting, Standing, find_standing, find_unjudged_fault, list_judged, look_at_judgments
from vcot.pipeline.pair_preview import PairsPreview, Previewing
from vcot.pipeline.pairs import (
    Couple,
    Judged,
    PairSet,
    PreferencePair,
    build_pairs,
    limit_pairs,
    needs_gains,
    read_pairs,
    split_pairs,
)
from vcot.pipeline.publish import pairs_digest
from vcot.pipeline.records import StageCount, Task
from vcot.pipeline.report import OnSteps, Report, Warned, progress
from vcot.pipeline.sample import Group, Groups, Plan
from vcot.pipeline.sources import load_round
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.run.session import Session
from vcot.training.protocol.job import REFERENCE, TrainJob, digest_losses


def list_rounds(session: Session) -> list[Round]:
    """The rounds that can be worked on: the first, and each whose predecessor's policy is there."""
    rounds = [Round(session, 1, session.base)]
    while len(rounds) < session.run.recipe.rounds.num and (policy := rounds[-1].policy) is not None:
        rounds.append(Round(session, len(rounds) + 1, policy))
    return rounds


@dataclass(frozen=True)
class Round:
    """One pass of sample, judge, pair, train and merge. What it holds is read from the run when it is first asked for."""

    session: Session
    number: int
    """From 1."""
    start: Checkpoint
    """Samples the responses, and is what training starts from: the base, then the policy of the round before."""

    @property
    def reference(self) -> Checkpoint:
        """What training pulls towards."""
        seeded = self.number > 1 and self.session.run.recipe.rounds.reference == "seed"
        return self.session.base if seeded else self.start

    @cached_property
    def tasks(self) -> list[Task]:
        """The questions that the round's preference data is made of; no earlier round saw their images."""
        run = self.session.run
        return load_round(run.recipe.tasks, self.number, run.directory, None if run.is_read else run.images)

    def requests(self) -> Plan:
        """What the recipe asks of the starting policy."""
        section = self.session.run.recipe.sample
        return Plan(self.tasks, section.prompt, self.start.ref, section.params())

    @property
    def groups(self) -> Groups:
        """What was answered, task by task, in the order of the plan."""
        return Groups(self.requests(), self.session.run.ledger)

    @contextmanager
    def _going_through(self) -> Iterator[Iterator[Group]]:
        """The groups, with progress for whoever listens."""

        def advance(on_steps: OnSteps) -> Iterator[Group]:
            for number, group in enumerate(self.groups):
                on_steps(number, len(self.tasks), "")
                yield group

        with progress(self.session.report, "tasks") as on_steps:
            yield advance(on_steps)

    def standing(self, judge: Judge) -> Standing:
        """How far the judging of the responses that are there has come. Raises OwedError where there is none."""
        with self._going_through() as groups:
            standing = find_standing(judge, groups, self.session.run.ledger, judge.section)
        self._check_sampled(standing)
        return standing

    def _check_sampled(self, standing: Standing) -> None:
        """Raise OwedError where nothing was sampled, and say so where something is missing."""
        run = self.session.run
        if not standing.num_responses:
            raise OwedError(f"run {run.directory} holds no response to its recipe; run `vcot sample` first")
        if standing.num_responses < self._num_asked:
            missing = self._num_asked - standing.num_responses
            self.session.report(
                Warned(f"{missing} of {self._num_asked} responses are missing; `vcot sample` asks again")
            )

    def _check_judged(self, standing: Standing) -> None:
        """Raise OwedError where a response is to be judged yet, or too many are without a verdict."""
        run = self.session.run
        if not standing.num_judged:
            name = make_judge(self.session).name
            raise OwedError(f"run {run.directory} holds no judgment by {name}; run `vcot judge` first")
        if standing.num_owed:
            raise OwedError(
                f"{standing.num_owed} of {standing.num_responses} responses are not judged yet; `vcot judge` goes on"
            )
        if (fault := find_unjudged_fault(standing.count(), run.recipe.judge)) is not None:
            raise OwedError(fault)

    @property
    def _num_asked(self) -> int:
        """Responses that the recipe asks for."""
        return len(self.tasks) * self.session.run.recipe.sample.k

    def count_unjudged(self, judge: Judge) -> int:
        """Requests that are owed to a judge's model, as a rule; those about responses that are not sampled yet, too."""
        num_each, num_later = self.session.run.recipe.sample.k, 0

        def watch(groups: Iterable[Group]) -> Iterator[Group]:
            nonlocal num_later
            for group in groups:
                if sum(response.error is None or response.refused for response in group.found) == num_each:
                    yield group
                else:
                    num_later += judge.count_requests(judge.section, num_each)

        with self._going_through() as groups:
            standing = find_standing(judge, watch(groups), self.session.run.ledger, judge.section)
        return standing.num_requests + num_later

    def _read_judged(self, counting: Counting) -> Iterator[tuple[Task, list[Judged]]]:
        """Each task with those of its responses that have a score; `counting` sees all of them."""
        with self._going_through() as groups:
            ledger = self.session.run.ledger
            for task, seen in look_at_judgments(make_judge(self.session), groups, ledger, whole=True):
                counting.add(seen)
                yield task, list_judged(seen)

    def _close(self, counting: Counting) -> StageCount:
        """The account of the responses. Raises OwedError where one is not sampled or judged."""
        standing = counting.close()
        self._check_sampled(standing)
        self._check_judged(standing)
        return standing.count()

    def candidates(self) -> Iterator[tuple[Task, list[Judged]]]:
        """Each task with those of its responses whose image gain decides whether they are chosen, and what is known of it.

        Raises OwedError, at the end, where a response is not sampled or judged.
        """
        run = self.session.run
        counting = Counting(make_judge(self.session), run.recipe.judge)
        for task, judged in read_gains(self._read_judged(counting), run.ledger):
            yield task, list_candidates(task, judged, run.recipe.pairs)
        self._close(counting)

    @cached_property
    def pairs(self) -> Pairs:
        """The round's pairs. Raises OwedError where a response is not sampled or judged, or a gain is not asked.

        What a judge gave no verdict on for good is left out, as far as the recipe tolerates that.
        """
        run, section = self.session.run, self.session.run.recipe.pairs
        counting, scores = Counting(make_judge(self.session), run.recipe.judge), array("d")

        num_owed, goes_by_gains = 0, needs_gains(section)

        def watch() -> Iterator[tuple[Task, list[Judged]]]:
            nonlocal num_owed
            groups = self._read_judged(counting)
            for task, judged in read_gains(groups, run.ledger) if goes_by_gains else groups:
                scores.extend(one.score for one in judged)
                if goes_by_gains:
                    num_owed += len(list_owed(list_candidates(task, judged, section)))
                yield task, judged

        made = build_pairs(watch(), section)
        count = self._close(counting)
        if num_owed:
            raise OwedError(f"what the image adds to {num_owed} responses is not asked yet; `vcot pair` asks")
        pair_set = limit_pairs(made, section.num, section.seed)
        train, validation = split_pairs(pair_set.pairs, section.validation_fraction, section.seed)
        with reading_texts(self.session.report, self.read, len(pair_set.pairs)) as read:
            digest = pairs_digest(read(train), read(validation))
        directory = run.path("pairs", digest[:12])
        return Pairs(pair_set, train, validation, self.read, digest, directory, scores, count)

    def preview(self) -> PairsPreview:
        """What each pair policy would make of the same responses. Raises OwedError as `pairs` does."""
        run = self.session.run
        counting = Counting(make_judge(self.session), run.recipe.judge)
        previewing = Previewing(run.recipe.pairs)
        for task, judged in read_gains(self._read_judged(counting), run.ledger):
            previewing.add(task, judged)
        self._close(counting)
        return previewing.close()

    def read(self, couples: Iterable[Couple]) -> Iterator[PreferencePair]:
        """Pairs of the round with their texts."""
        return read_pairs(couples, self.tasks, self.session.run.ledger)

    def read_rationales(self, pair: PreferencePair) -> dict[str, str]:
        """What the judge said of the responses to the pair's task, by their keys."""
        task = next(task for task in self.tasks if task.id == pair.task)
        ledger, requests = self.session.run.ledger, replace(self.requests(), tasks=[task])
        found = look_at_judgments(make_judge(self.session), Groups(requests, ledger), ledger, whole=True)
        return {seen.response.key: seen.judgment.rationale for _, group in found for seen in group if seen.judgment}

    @cached_property
    def job(self) -> TrainJob:
        """The training job on the round's pairs. Raises DataError where a pair's image is in the benchmark, and may not be.

        That alone needs no file of an image; what else is compared, services/run/overlap_gate.py does before.
        """
        recipe = self.session.run.recipe
        asked = (task for split in recipe.eval_splits for task in self.session.questions(split).tasks)
        seen = {image.sha256 for task in asked for image in task.images}
        pairs = self.pairs.pair_set.pairs
        leak = next((pair.task for pair in pairs if any(image.sha256 in seen for image in pair.images)), None)
        if leak is not None and not recipe.tasks.allow_overlap:
            raise DataError(
                f"an image of pair {leak} is in the evaluation set too; take another split for one of them, or set "
                "tasks.allow_overlap=true"
            )
        return TrainJob(
            base=self.start.ref,
            base_path=str(self.start.directory),
            pairs_path=str(self.pairs.directory),
            pairs_digest=self.pairs.digest,
            round=self.number,
            train=recipe.train,
            loss_sources=digest_losses(recipe.train),
            merge=recipe.merge,
            serve_dtype=recipe.serve.dtype,
            reference_path=str(self.session.run.path(REFERENCE)),
            reference=None if self.reference is self.start else self.reference.ref,
            reference_weights=None if self.reference is self.start else str(self.reference.directory),
        )

    @property
    def job_directory(self) -> Path:
        """Where the trainer worker does the job."""
        return self.session.job_directory(self.job)

    @property
    def policy(self) -> Checkpoint | None:
        """What the round made of its starting policy; None as long as it is not there.

        Raises DataError where the recipe, changed meanwhile, asks for what may not be: that is no "not yet".
        """
        try:
            name = self.job.checkpoint_name
        except OwedError:
            return None
        return self.session.registry.find_made(name)


@dataclass(frozen=True)
class Pairs:
    """The pairs of a round."""

    pair_set: PairSet
    train: list[Couple]
    validation: list[Couple]
    read: ReadPairs
    digest: str
    directory: Path
    """Where `pair_stage` puts them."""
    scores: Sequence[float]
    """Of all judged responses, task by task."""
    judged: StageCount
    """Of the responses that they were made from."""


ReadPairs = Callable[[Iterable[Couple]], Iterable[PreferencePair]]
"""Gives pairs their texts, a few at a time."""


@contextmanager
def reading_texts(report: Report, read: ReadPairs, num_pairs: int) -> Iterator[ReadPairs]:
    """`read`, with progress over `num_pairs` in all for whoever listens."""
    num_read = 0
    with progress(report, "pairs") as on_steps:

        def advance(couples: Iterable[Couple]) -> Iterator[PreferencePair]:
            nonlocal num_read
            for pair in read(couples):
                on_steps(num_read, num_pairs, "")
                num_read += 1
                yield pair

        yield advance


def make_judge(session: Session) -> Judge:
    """The recipe's judge."""
    return find_judge(session.run.recipe.judge, session.run.images)
