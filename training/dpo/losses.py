"""The losses that a recipe names: TRL's, what each is before training, and those of one's own.

A loss of one's own is a function that `train.losses` names as `package.module:object` (docs/extending.md). It is
imported here, in the process that trains, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vcot.pipeline.errors import RecipeError
from vcot.pipeline.open_lists import LOSSES, TRL_LOSSES
from vcot.training.protocol.train_sections import TrainSection

PairLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Takes the log-probs of chosen and rejected responses, (pairs,) each, the reference's of both, and beta; gives (pairs,)."""


@dataclass(frozen=True)
class OwnLoss:
    """A loss of one's own."""

    name: str
    """As the recipe names it."""
    weight: float
    function: PairLoss

    def mean(self, policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
        """The mean over the pairs; `policy` and `reference` hold log-probs of chosen and rejected responses, (2, pairs).

        Raises RecipeError where the function returns anything but one number for each pair.
        """
        values = self.function(policy[0], policy[1], reference[0], reference[1], beta)
        if not isinstance(values, torch.Tensor) or values.shape != policy[0].shape:
            found = f"shape {tuple(values.shape)}" if isinstance(values, torch.Tensor) else type(values).__name__
            raise RecipeError(
                f"train.losses: {self.name} returned {found}, and must return a tensor of shape {tuple(policy[0].shape)}: "
                "one number for each pair"
            )
        return values.mean()


def weigh_losses(recipe: TrainSection) -> dict[str, float]:
    """The weight of each of the recipe's losses, by name."""
    return dict(zip(recipe.losses, recipe.loss_weights or (1.0,) * len(recipe.losses), strict=True))


def find_own_losses(recipe: TrainSection) -> tuple[OwnLoss, ...]:
    """The recipe's losses that are not TRL's, imported. Raises RecipeError for one that is not found."""
    weights = weigh_losses(recipe)
    return tuple(OwnLoss(name, weights[name], LOSSES.resolve(name)) for name in weights if name not in TRL_LOSSES)


def weigh_unforeseen(recipe: TrainSection) -> dict[str, float]:
    """The weights of those losses whose value before training depends on the model: `sft`, and any of one's own."""
    return {name: w for name, w in weigh_losses(recipe).items() if name == "sft" or name not in TRL_LOSSES}


def start_loss(recipe: TrainSection) -> float:
    """The loss while policy and reference agree, without the unforeseen losses, from each one's definition in TRL."""
    unforeseen = weigh_unforeseen(recipe)
    foreseen = sum(w * _start(name, recipe) for name, w in weigh_losses(recipe).items() if name not in unforeseen)
    return foreseen + (2 * math.log(2) if recipe.method == "mdpo" else 0.0)


def _start(name: str, recipe: TrainSection) -> float:
    """One of TRL's losses at log-ratios of 0; those that are not named here are a log-sigmoid of 0."""
    smoothing = recipe.label_smoothing
    match name:
        case "hinge" | "apo_zero" | "apo_down":
            return 1.0
        case "ipo":
            return (0.5 / recipe.beta) ** 2
        case "sppo_hard":
            return 2 * (0.5 / recipe.beta) ** 2
        case "nca_pair" | "bco_pair":
            return 2 * math.log(2)
        case "discopop":
            return (math.log(2) + 1) / 2
        case "exo_pair":
            return -math.log(2) - math.log(smoothing * (1 - smoothing)) / 2
        case _:
            return math.log(2)
