"""LoRA's dropout on a CPU, where torch takes 6 ns to draw one element of a mask, a tenth of nano's training step and more.

The gaps between the dropped elements of a row of independent draws are geometric, so drawing them gives the same
distribution with a tenth as many draws at the recipe's 0.1: 2 ns an element. The numbers come from torch's global
generator, as they would otherwise, so that a resumed run goes on with the same masks. They are other masks than torch's.
"""

from __future__ import annotations

import math

import torch

from training.model.loading import Model

MAX_P = 0.25
"""With more elements dropped torch's way is as fast."""


class SparseDropout(torch.nn.Dropout):
    """Dropout, drawn by gaps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` with each element dropped with probability p, and the others scaled by 1 / (1 - p); in evaluation, `x`."""
        return x * draw_mask(x.shape, self.p).to(x.dtype) if self.training else x


def draw_mask(shape: torch.Size, p: float) -> torch.Tensor:
    """0 with probability p, else 1 / (1 - p), each element for itself."""
    size = math.prod(shape)
    dropped = torch.zeros(0, dtype=torch.int64)
    while not len(dropped) or dropped[-1] < size:  # as good as always once: 8 standard deviations more than expected
        count = int(size * p + 8 * math.sqrt(size * p)) + 16
        gaps = torch.empty(count, dtype=torch.int64).geometric_(p).cumsum(0)
        dropped = torch.cat([dropped, gaps + (dropped[-1] if len(dropped) else -1)])
    mask = torch.full((size + 1,), 1 / (1 - p))
    mask[dropped.clamp(max=size)] = 0
    return mask[:size].view(shape)


def quicken_dropout(model: Model) -> None:
    """Give the adapter of a PEFT model on the CPU this dropout, where it is the faster one."""
    for module in model.modules():
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, torch.nn.Dropout) and dropout.p <= MAX_P:
                module.lora_dropout[name] = SparseDropout(dropout.p)
