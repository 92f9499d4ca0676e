"""Whether a checkpoint answers as the policy that was trained: the rule, free of torch, so that any process can apply it.

Model: `probe.json` beside a checkpoint's weights holds pairs of responses with the token ids that they were trained as,
and how likely three models of Hugging Face's found each token, in float32: the base, base + adapter (the policy), and
the checkpoint as stored. Whoever serves the checkpoint asks for the same responses, teacher-forced, and compares:

    token ids               equal: template, BOS and image tokens are those of the training
    log-probs, per token    within FORCED_TOLERANCES of the checkpoint as stored: the same weights, and all of them
    reward margins          those that DPO trained, beta (log-ratio of chosen - of rejected): not lost by rounding

One measure says what is lost: the pairs' reward margins, as they came out against as they were trained. Their mean is what a
reader knows; the gate is on their error, since rounding noise can leave the mean as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from vcot.pipeline.errors import CheckpointError
from vcot.pipeline.files import write_record
from vcot.pipeline.records import CheckpointRef, Record
from vcot.training.protocol.job import MergeReport, Retention
from vcot.training.protocol.train_sections import Dtype

PROBE = "probe.json"
TOLERANCES: dict[Dtype, float] = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.15}
"""Of a greedy token's log-prob, by the type that computed it. Measured between HF in float32 and vLLM on nano: 5e-7, 0.002
and 0.006; these leave room for deeper models and other kernels."""
FORCED_TOLERANCES: dict[Dtype, float] = {dtype: 5 * tolerance for dtype, tolerance in TOLERANCES.items()}
"""Of a teacher-forced token's, which may be an unlikely one, and moves more: 6e-6, 0.004 and 0.061 on nano."""
MIN_DIFFERENCE = 1e-5
"""Two float32 computations of the same weights differ by less; a policy that learned anything differs by more."""
NO_NUMBER = 1e9
"""What a difference counts as that is no number: beyond every tolerance, and a record can hold it."""
MAX_LOSS = 0.05
"""The share of the reward margins that rounding may change."""
MAX_UNQUANTIZED_LOSS = 0.3
"""The share that may change by leaving the 4-bit base that an adapter was trained on: 0.04 to 0.16 on nano and nano-qwen
(docs/lab-notes.md), whose narrow layers are the worst case; twice that is a fault of another kind."""

Margins: TypeAlias = npt.NDArray[np.float64]
"""One reward margin for each pair, in nats."""
Logprobs: TypeAlias = tuple[tuple[float, ...], ...]
"""Of each response's tokens; the responses are chosen and rejected of the first pair, of the second, ..."""


class ProbeRow(Record):
    """One response."""

    text: str
    tokens: tuple[int, ...]
    """Prompt and response as trained, image tokens expanded, up to EOS."""


class ProbePair(Record):
    """Two responses to one prompt."""

    prompt: tuple[dict[str, Any], ...]
    """Messages in OpenAI's format, images as data URLs."""
    chosen: ProbeRow
    rejected: ProbeRow


class Probe(Record):
    """`probe.json`: what a server of the checkpoint must answer. `base`, `policy` and `stored` are float32 log-probs."""

    checkpoint: CheckpointRef
    beta: float
    pairs: tuple[ProbePair, ...]
    closing: tuple[int, ...] = ()
    """What the chat template writes behind each response's EOS: served, and not trained."""
    base: Logprobs
    policy: Logprobs
    stored: Logprobs


@dataclass(frozen=True)
class Answers:
    """How likely one model finds each token of the probe's responses."""

    logprobs: tuple[npt.NDArray[np.float64], ...]

    @classmethod
    def of(cls, logprobs: Sequence[Sequence[float]]) -> Answers:
        """From plain numbers."""
        return cls(tuple(np.asarray(row, dtype=np.float64) for row in logprobs))

    def record(self) -> Logprobs:
        """As plain numbers."""
        return tuple(tuple(row.tolist()) for row in self.logprobs)

    def difference(self, other: Answers) -> float:
        """The largest absolute difference of one token's log-prob; NO_NUMBER where either is none."""
        worst = max(np.abs(a - b).max() for a, b in zip(self.logprobs, other.logprobs, strict=True))
        return float(np.nan_to_num(worst, nan=NO_NUMBER, posinf=NO_NUMBER))

    def margins(self, base: Answers, beta: float) -> Margins:
        """The reward margin of each pair: beta * (log-ratio of chosen - log-ratio of rejected) (Rafailov et al. 2023)."""
        ratios = np.array([a.sum() - b.sum() for a, b in zip(self.logprobs, base.logprobs, strict=True)])
        margins: Margins = beta * (ratios[0::2] - ratios[1::2])
        return margins


def compare_margins(before: Margins, after: Margins) -> Retention:
    """What is left of the reward margins, over all pairs. Nothing is kept of margins that are no numbers."""
    if not (np.isfinite(before).all() and np.isfinite(after).all()) or not before.any():
        return Retention(before=0.0, after=0.0, kept=0.0, kept_se=0.0, error=NO_NUMBER)
    power = before @ before
    kept = before @ after / power
    rest = after - kept * before
    return Retention(
        before=float(before.mean()),
        after=float(after.mean()),
        kept=float(kept),
        kept_se=float(np.sqrt(rest @ rest / max(1, len(before) - 1) / power)),
        error=float(np.linalg.norm(after - before) / np.sqrt(power)),
    )


def loses(retention: Retention) -> bool:
    """Whether rounding the weights changed more of the margins than MAX_LOSS. Computed in float32: there is no noise."""
    return not retention.error <= MAX_LOSS


def check_merge(report: MergeReport, remedy: str) -> None:
    """The gate of a new checkpoint. Raises CheckpointError where it is the base, or is not the policy."""
    name, dtype = report.checkpoint.name, report.dtype
    if report.num_changed_tensors == 0 or report.differs_from_base <= MIN_DIFFERENCE:
        raise CheckpointError(
            f"checkpoint {name} in {dtype} answers as its base does ({report.num_changed_tensors} tensors and "
            f"log-probs by {report.differs_from_base:.1e} changed): {remedy}"
        )
    left = report.unquantized
    if left is not None and not left.error <= MAX_UNQUANTIZED_LOSS:
        raise CheckpointError(
            f"checkpoint {name} keeps {left.kept:.0%} of the reward margins that were trained on the base in 4 bits, with "
            f"an error of {left.error:.0%} by adding the adapter to the base itself: train more, or with "
            "train.base_weights = full"
        )
    if loses(report.retention):
        raise CheckpointError(
            f"checkpoint {name} in {report.held} keeps {report.retention.kept:.0%} of the reward margins that were "
            f"trained, with an error of {report.retention.error:.0%} by rounding: {remedy}"
        )
    if not report.max_abs_logprob <= FORCED_TOLERANCES[report.held]:
        raise CheckpointError(
            f"checkpoint {name} answers otherwise than base + adapter: log-probs differ by "
            f"{report.max_abs_logprob:.1e}, {report.held} explains {FORCED_TOLERANCES[report.held]:.0e}; {remedy}"
        )


def find_served_fault(served: Answers, served_base: Answers, probe: Probe, dtype: Dtype) -> str | None:
    """Why what is served in `dtype` is not the policy, with the remedy, as a clause; None where it is.

    `dtype`'s own noise is in the served margins, so only a loss beyond two standard errors counts; a policy that cannot be
    told from its base in that noise is not served either.
    """
    stored, base = Answers.of(probe.stored), Answers.of(probe.base)
    for what, difference in (("base", served_base.difference(base)), ("checkpoint", served.difference(stored))):
        if not difference <= FORCED_TOLERANCES[dtype]:
            return (
                f"a log-prob of the {what} differs by {difference:.2g} from Hugging Face's, and {dtype} explains "
                f"{FORCED_TOLERANCES[dtype]:.2g}: not all of its weights are served, or others; merge it again"
            )
    kept = compare_served(served, served_base, probe)
    if not kept.kept > 2 * kept.kept_se:
        return (
            f"it cannot be told from its base: {kept.kept:.0%} +- {2 * kept.kept_se:.0%} of the trained reward margin is "
            f"left in {dtype}; serve in a wider serve.dtype, or train more"
        )
    if kept.kept + 2 * kept.kept_se < 1 - MAX_LOSS:
        return (
            f"{kept.kept:.0%} +- {2 * kept.kept_se:.0%} of the trained reward margin is left in {dtype}, where "
            f"{1 - MAX_LOSS:.0%} must be; serve in a wider serve.dtype"
        )
    return None


def compare_served(served: Answers, served_base: Answers, probe: Probe) -> Retention:
    """What serving leaves of the reward margins; the base is the one that is served, as in any evaluation."""
    trained = Answers.of(probe.policy).margins(Answers.of(probe.base), probe.beta)
    return compare_margins(trained, served.margins(served_base, probe.beta))


def write_probe(directory: Path, probe: Probe) -> None:
    """Put the probe beside the checkpoint's weights."""
    write_record(directory / PROBE, probe)


def read_probe(directory: Path) -> Probe | None:
    """The probe of a checkpoint directory; None where it has none. Raises CheckpointError for one that cannot be read."""
    try:
        return Probe.model_validate_json((directory / PROBE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{directory / PROBE} cannot be read ({error}); merge the checkpoint again") from None
