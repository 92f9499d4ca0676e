"""What an evaluation finds, as records: a row of the paper's Table 1, and the difference of two checkpoints."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vcot.pipeline.records import CheckpointRef, Interval, PromptName, Record


class EvalResult(Record):
    """One row of the paper's Table 1: one checkpoint, prompt and temperature."""

    checkpoint: CheckpointRef
    prompt: PromptName
    temperature: float
    seed: int
    num_samples: int
    """Responses per question."""
    accuracy: dict[str, Interval]
    """By `Avg` and the benchmark's columns; one without questions is absent. An unparsable answer counts as not correct."""
    no_answer: float
    """Share of answered requests without an answer that could be parsed, those that were cut off among them."""
    cut: float = 0.0
    """Share of answered requests whose response was cut off at its longest length."""
    chance: float
    """Expected accuracy of a uniform guess on the same questions."""
    num_scored: int
    num_failed: int


class Difference(Record):
    """Two checkpoints on the same questions, under one prompt and temperature: `policy` minus `base`."""

    base: CheckpointRef
    policy: CheckpointRef
    prompt: PromptName
    temperature: float
    accuracy: Interval
    """The paired difference of the accuracies, in [-1, 1]."""
    p_value: float
    """Two-sided, that the two are equally good."""
    p_holm: float
    """`p_value` after Holm's correction for all the differences that are reported together."""
    mde: float
    """The smallest true difference that this benchmark finds with 80 % power at the 5 % level."""
    num_questions: Annotated[int, Field(ge=1)]
    """Questions that both answered, readably or not."""
    better_on: tuple[int, int] = (0, 0)
    """On how many questions base, and policy, is the better one; McNemar's exact test is about these."""
    p_exact: float | None = None
    """McNemar's p-value after the same correction; None in what was written before there was such a test."""
