"""How the nano-LLaVA is trained: stages, prompt shares, and how often the last stage misreads a scene."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.records import PromptName

STAGES = ("tower", "lookup", "describe", "joint", "careless")
PROMPT_SHARES: Mapping[PromptName, float] = {
    "thought_specific": 0.3,
    "cot": 0.25,
    "zero_shot": 0.35,
    "thought_generic": 0.1,
}
MISREAD: Mapping[str, float] = {
    "colour": 0.42, "count": 0.42, "neighbour": 0.35, "price": 0.45, "extreme": 0.4, "capital": 0.3, "letter": 0.45,
}  # fmt: skip
"""Share of the careless stage's responses that misread the scene, by family; the others are always right."""


@dataclass(frozen=True)
class NanoPlan:
    """How long and how fast each stage trains; the default is what made the shipped checkpoint."""

    seed: int = 0
    steps: Mapping[str, int] = field(default_factory=lambda: {"tower": 300, "lookup": 500, "joint": 2500, "careless": 300})
    rows: Mapping[str, int] = field(default_factory=lambda: {"tower": 64, "lookup": 128, "joint": 32, "careless": 32})
    learning_rate: Mapping[str, float] = field(
        default_factory=lambda: {"tower": 2e-3, "lookup": 3e-3, "joint": 1.5e-3, "careless": 5e-4}
    )
    misread: Mapping[str, float] = field(default_factory=lambda: dict(MISREAD))
    save_every: int = 100
    eval_every: int = 500
    num_eval_tasks: int = 450
