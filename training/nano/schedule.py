"""How a nano model is trained: stages, prompt shares, and how often the last stage misreads a scene."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vcot.pipeline.records import PromptName

ArchitectureName = Literal["llava", "qwen"]
STAGES = ("tower", "lookup", "describe", "joint", "careless")
PROMPT_SHARES: Mapping[PromptName, float] = {
    "thought_specific": 0.3,
    "cot": 0.25,
    "zero_shot": 0.35,
    "thought_generic": 0.1,
}
_STEPS: Mapping[ArchitectureName, Mapping[str, int]] = {
    "llava": {"tower": 450, "lookup": 250, "describe": 2500, "joint": 2000, "careless": 400},
    "qwen": {"tower": 450, "lookup": 250, "describe": 1200, "joint": 1100, "careless": 300},
}
_ROWS = {"tower": 64, "lookup": 48, "describe": 16, "joint": 16, "careless": 16}
_LEARNING_RATE = {"tower": 2e-3, "lookup": 1.5e-3, "describe": 1.5e-3, "joint": 1.2e-3, "careless": 8e-4}
_MISREAD = {
    "colour": 0.55,
    "price": 0.48,
    "letter": 0.54,
    "count": 0.3,
    "extreme": 0.5,
    "neighbour": 0.4,
    "capital": 0.42,
}


@dataclass(frozen=True)
class NanoPlan:
    """How long and how fast each stage trains."""

    architecture: ArchitectureName
    seed: int
    steps: Mapping[str, int]
    rows: Mapping[str, int] = field(default_factory=lambda: dict(_ROWS))
    """Conversations in a step."""
    learning_rate: Mapping[str, float] = field(default_factory=lambda: dict(_LEARNING_RATE))
    misread: Mapping[str, float] = field(default_factory=lambda: dict(_MISREAD))
    """Share of the careless stage's responses that misread the scene, by family; the others are always right."""
    save_every: int = 100
    eval_every: int = 1000
    num_eval_tasks: int = 450


def make_plan(architecture: ArchitectureName, seed: int = 0) -> NanoPlan:
    """What the shipped checkpoint of that architecture was made by."""
    return NanoPlan(architecture, seed, dict(_STEPS[architecture]))
