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

MAX_DISTORTION = 0.1
"""Rounding to the merged dtype may change what training did by this share. Measured on nano with a base in that dtype
already, for updates that move a response's log-prob by 0.5, 0.05 and 0.005: float16 0.003, 0.05 and 0.8, bfloat16 0.03,
0.7 and 1."""


@dataclass(frozen=True)
class Answers:
    """Log-probs of each response's tokens: float32, (responses, length - 1), 0 where no completion token stands."""

    logprobs: torch.Tensor

    def difference(self, other: Answers) -> float:
        """The largest absolute difference of one token's log-prob; infinite where either is not a number."""
        return float((self.logprobs - other.logprobs).abs().nan_to_num(nan=torch.inf).max())

    def change(self, base: Answers) -> torch.Tensor:
        """By how much each token's log-prob differs from the base's: (responses, length - 1)."""
        return self.logprobs - base.logprobs


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


def retention(policy: torch.Tensor, merged: torch.Tensor) -> float:
    """The share of the policy's change of responses that the merged model keeps: its projection on the policy's."""
    kept, wanted = merged.sum(dim=1), policy.sum(dim=1)
    return float(wanted @ kept / (wanted @ wanted))


def distortion(policy: torch.Tensor, merged: torch.Tensor) -> float:
    """The distance between both changes of tokens, relative to the policy's. Unlike retention, it sees noise, too."""
    return float((merged - policy).norm() / policy.norm())


def check_merge(report: MergeReport, dtype: Dtype) -> None:
    """The gate. Raises CheckpointError where the merged checkpoint is the base, or is not the policy."""
    name = report.checkpoint.name
    if report.num_changed_tensors == 0 or report.differs_from_base <= MIN_DIFFERENCE:
        raise CheckpointError(
            f"merged checkpoint {name} in {dtype} answers as its base does ({report.num_changed_tensors} tensors and "
            f"log-probs by {report.differs_from_base:.1e} changed): use a wider merge.dtype, or train more"
        )
    if not report.distortion <= MAX_DISTORTION:
        raise CheckpointError(
            f"merged checkpoint {name} in {dtype} keeps {report.retention:.0%} of what training changed, with an error of "
            f"{report.distortion:.0%} by rounding: use a wider merge.dtype, or train more"
        )
    if not report.max_abs_logprob <= TOLERANCES[dtype]:
        raise CheckpointError(
            f"merged checkpoint {name} answers otherwise than base + adapter: log-probs differ by "
            f"{report.max_abs_logprob:.1e}, {dtype} explains {TOLERANCES[dtype]:.0e}; use a wider merge.dtype"
        )
