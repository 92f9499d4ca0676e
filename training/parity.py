"""Whether two models answer alike: the log-probs of fixed responses to fixed images, compared token by token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.errors import CheckpointError, DataError
from pipeline.recipe import Dtype, TrainSection
from training.canary import TOLERANCES
from training.job import MergeReport
from training.models import Batch, Model, completion_logprobs
from training.pairs import PairCollator, check_pairs, load_pairs
from training.template import Processor

NUM_ROWS = 4
MIN_DIFFERENCE = 1e-5
"""Two float32 computations of the same weights differ by less; a policy that learned anything differs by more."""

MIN_RETENTION = 0.9
"""Measured on a small update: float16 keeps 97 %, bfloat16 28 %."""


@dataclass(frozen=True)
class Answers:
    """Log-probs of each response's tokens: float32, (responses, length - 1), 0 where no completion token stands."""

    logprobs: torch.Tensor

    def difference(self, other: Answers) -> float:
        """The largest absolute difference of one token's log-prob; infinite where either is not a number."""
        return float((self.logprobs - other.logprobs).abs().nan_to_num(nan=torch.inf).max())

    def change(self, base: Answers) -> torch.Tensor:
        """By how much each response's log-prob differs from the base's: (responses,)."""
        return (self.logprobs - base.logprobs).sum(dim=1)


def load_probe(pairs: Path, processor: Processor, recipe: TrainSection) -> Batch:
    """The first few pairs as one batch: what both models are asked. Raises DataError where no pair can be used."""
    rows = load_pairs(pairs / "train.parquet")
    limits = {"max_length": recipe.max_length, "max_image_side": recipe.max_image_side}
    kept, summary = check_pairs(rows.select(range(min(len(rows), 4 * NUM_ROWS))), processor, **limits)
    if not len(kept):
        raise DataError(
            f"none of the first {summary.num_rows} pairs in {pairs} can be used to compare; run `vcot pair` again"
        )
    return PairCollator(processor, recipe.max_image_side)(list(kept.select(range(min(len(kept), NUM_ROWS)))))


def ask(model: Model, probe: Batch) -> Answers:
    """How likely `model` finds the probe's responses."""
    return Answers(completion_logprobs(model, probe))


def retention(base: Answers, policy: Answers, rounded: Answers, merged: Answers) -> float:
    """The share of the policy's change that the merged model keeps: its projection on the policy's, 1 is all of it.

    `rounded` is the base in the dtype of the merged weights, so that its own rounding does not count as change.
    """
    change = policy.change(base)
    return float(change @ merged.change(rounded) / (change @ change))


def check_merge(report: MergeReport, dtype: Dtype) -> None:
    """The gate. Raises CheckpointError where the merged checkpoint is the base, or is not the policy."""
    name = report.checkpoint.name
    if report.num_changed_tensors == 0 or report.differs_from_base <= MIN_DIFFERENCE:
        raise CheckpointError(
            f"merged checkpoint {name} in {dtype} answers as its base does ({report.num_changed_tensors} tensors and "
            f"log-probs by {report.differs_from_base:.1e} changed): use a wider merge.dtype, or train more"
        )
    if not report.retention >= MIN_RETENTION:
        raise CheckpointError(
            f"merged checkpoint {name} keeps {report.retention:.0%} of what training changed, {dtype} rounds the rest away: "
            "use a wider merge.dtype, or train more"
        )
    if not report.max_abs_logprob <= TOLERANCES[dtype]:
        raise CheckpointError(
            f"merged checkpoint {name} answers otherwise than base + adapter: log-probs differ by "
            f"{report.max_abs_logprob:.1e}, {dtype} explains {TOLERANCES[dtype]:.0e}; use a wider merge.dtype"
        )
