"""The rounds of a run (Wu et al. 2024): one, or several that each go on from the last one's policy.

Model: a `Round` is a policy and its questions, and all that follows from them: responses, pairs, training job, and the
policy that comes out, which the next round starts from. Nothing is stored but in the run, so that a round is the same
whichever command looks at it, and after any stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.errors import DataError, OwedError
from pipeline.judges import Judge, find_judge
from pipeline.judging import Standing, find_standing, find_unjudged_fault
from pipeline.pairs import PairSet, build_pairs, limit_pairs, split_pairs
from pipeline.publish import pairs_digest
from pipeline.records import Judgment, PreferencePair, Response, StageCount, Task
from pipeline.report import Warned
from pipeline.sample import SampleRequest, plan_requests
from pipeline.sources import load_round
from services.checkpoints.registry import Checkpoint
from services.run.session import Session
from training.protocol.job import REFERENCE, TrainJob, digest_losses


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

    def requests(self) -> list[SampleRequest]:
        """What the recipe asks of the starting policy."""
        section = self.session.run.recipe.sample
        return plan_requests(self.tasks, section.prompt, self.start.ref, section.params())

    def responses(self) -> list[Response]:
        """The good responses that are there, in the order of the plan. Raises OwedError where there is none."""
        run = self.session.run
        keys = [key for request in self.requests() for key in request.response_keys()]
        found = run.ledger.get(Response, keys)
        responses = [found[key] for key in keys if key in found and found[key].error is None]
        if not responses:
            raise OwedError(f"run {run.directory} holds no response to its recipe; run `vcot sample` first")
        if len(responses) < len(keys):
            self.session.report(
                Warned(f"{len(keys) - len(responses)} of {len(keys)} responses are missing; `vcot sample` asks again")
            )
        return responses

    def standing(self) -> Standing:
        """How far the judging of the responses that are there has come. Raises OwedError where there is none."""
        return self._find_standing(self.responses())

    def _find_standing(self, responses: list[Response]) -> Standing:
        run = self.session.run
        tasks = {task.id: task for task in self.tasks}
        return find_standing(make_judge(self.session), tasks, responses, run.ledger, run.recipe.judge)

    @property
    def num_unjudged(self) -> int:
        """Judgments that are owed, those of responses that are still to be sampled included."""
        keys = [key for request in self.requests() for key in request.response_keys()]
        found = self.session.run.ledger.get(Response, keys)
        settled = [response for response in found.values() if response.error is None or response.refused]
        return len(keys) - len(settled) + self._find_standing(settled).num_asks

    @cached_property
    def pairs(self) -> Pairs:
        """Best and worst response of each task. Raises OwedError where a response is not sampled or judged.

        What a judge gave no verdict on for good is left out, as far as the recipe tolerates that.
        """
        run, section = self.session.run, self.session.run.recipe.pairs
        standing = self.standing()
        if not standing.judged:
            name = make_judge(self.session).name
            raise OwedError(f"run {run.directory} holds no judgment by {name}; run `vcot judge` first")
        if standing.owed:
            raise OwedError(
                f"{len(standing.owed)} of {len(standing.responses)} responses are not judged yet; `vcot judge` goes on"
            )
        if (fault := find_unjudged_fault(standing.count(), run.recipe.judge)) is not None:
            raise OwedError(fault)
        found = run.ledger.get(Judgment, standing.judged)
        judgments = {r.key: found[key] for key, r in standing.responses.items() if key in found}
        made = build_pairs(
            self.tasks,
            list(standing.responses.values()),
            judgments,
            policy=section.policy,
            choose_cut=section.choose_cut,
        )
        pair_set = limit_pairs(made, section.num, section.seed)
        train, validation = split_pairs(pair_set.pairs, section.validation_fraction, section.seed)
        digest = pairs_digest(train, validation)
        directory, judged = run.path("pairs", digest[:12]), standing.count()
        return Pairs(pair_set, train, validation, digest, directory, tuple(judgments.values()), judged)

    @cached_property
    def job(self) -> TrainJob:
        """The training job on the round's pairs. Raises DataError where a pair's image is in the benchmark."""
        recipe = self.session.run.recipe
        asked = (task for split in recipe.eval_splits for task in self.session.questions(split).tasks)
        seen = {task.image.sha256 for task in asked if task.image}
        leak = next((pair.task for pair in self.pairs.pair_set.pairs if pair.image.sha256 in seen), None)
        if leak is not None:
            raise DataError(
                f"the image of pair {leak} is in the evaluation set too; take another split for one of them"
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
    train: list[PreferencePair]
    validation: list[PreferencePair]
    digest: str
    directory: Path
    """Where `pair_stage` puts them."""
    judgments: tuple[Judgment, ...]
    judged: StageCount
    """Of the responses that they were made from."""


def make_judge(session: Session) -> Judge:
    """The recipe's judge."""
    return find_judge(session.run.recipe.judge, session.run.images)
