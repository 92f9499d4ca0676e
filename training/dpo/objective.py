"""What training minimises: TRL's losses of chosen against rejected, and mDPO's two terms beside them.

mDPO (Wang et al. 2024, arXiv 2406.11839, equations 4 to 6) adds to DPO, each with weight 1,

    conditional   -log sigmoid(beta * (ratio of the chosen response with its image
                                       - ratio of the chosen response with a corrupted image))
    anchor        -log sigmoid(beta * ratio of the chosen response with its image - delta),  delta = 0

where a ratio is log policy - log reference, summed over the response's tokens. Images are corrupted as
`training/dpo/corruption.py` says.

There is **one forward a step**: the reference's log-probs are columns of the rows, where TRL reads them from the batch, and
the conditional rows and, where the model allows it, shared prompts go through the policy's only pass. TRL's own
`_compute_loss` does the rest with the scores of that pass, its metrics included.

Limits: where several ranks share an evaluation's last batch and it does not fill them, pairs are repeated, and the loss and
its terms (not the margins and the accuracy) count some of the repeats.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing, prepare_deepspeed
from trl.trainer.utils import use_adapter

from vcot.training.dpo.losses import OwnLoss
from vcot.training.dpo.rows import REFERENCE_COLUMNS
from vcot.training.dpo.sharing import TokenScores, find_fault, score, score_shared
from vcot.training.model.loading import Batch, Model
from vcot.training.protocol.train_sections import Dtype

GAP = "eval_gap"
"""What the gap between evaluation and training loss is logged as."""
TERM = "terms/"
"""What the names of the loss's parts begin with in TRL's logs."""
_NUM_TRIED = 4
"""Pairs that are scored both ways before prompts are shared."""
_LAYOUT = ("input_ids", "attention_mask", "completion_mask")


def conditional_loss(chosen: torch.Tensor, corrupted: torch.Tensor, beta: float) -> torch.Tensor:
    """The mean over the pairs' log-ratios of the chosen response, with its image and with the corrupted one: (pairs,)."""
    return -logsigmoid(beta * (chosen - corrupted)).mean()


def anchor_loss(chosen: torch.Tensor, beta: float) -> torch.Tensor:
    """The mean over the pairs' log-ratios of the chosen response, with delta = 0: (pairs,)."""
    return -logsigmoid(beta * chosen).mean()


class PreferenceTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer for rows that carry the reference's log-probs; with `conditional`, for mDPO.

    A batch is a PairCollator's: chosen, rejected and, with `conditional`, the chosen rows again with corrupted images.
    `own_losses` are added to those of TRL that the arguments name, of which there may be none.
    """

    def __init__(self, *args: Any, conditional: bool, own_losses: Sequence[OwnLoss], **options: Any) -> None:
        super().__init__(*args, **options)
        self.precompute_ref_logps = True  # the argument is refused for images, the columns are read all the same
        self.conditional = conditional
        self.own_losses = own_losses
        self.shares_prompts = False
        self.sharing_fault: str | None = None
        self._early_engine: Any = None
        self._evaluated_pairs: list[int] = []

    def count_pairs(self, batch: Batch) -> int:
        """Number of pairs in a batch."""
        return len(batch["input_ids"]) // (3 if self.conditional else 2)

    def score(self, model: Model, batch: Batch) -> TokenScores:
        """The batch's rows, in one forward."""
        return score_shared(model, batch, self.count_pairs(batch)) if self.shares_prompts else score(model, batch)

    def try_sharing(self, dtype: Dtype) -> None:
        """Share prompts from now on, if the model allows it; `sharing_fault` says why not."""
        rows = [self.train_dataset[i] for i in range(min(len(self.train_dataset), _NUM_TRIED))]
        batch = self._prepare_inputs(self.data_collator(rows))
        with self._frozen():
            self.sharing_fault = find_fault(self.model, batch, self.count_pairs(batch), dtype)
        self.shares_prompts = self.sharing_fault is None

    def reference_logprobs(self, batch: Batch) -> torch.Tensor:
        """What the reference, the model without its adapter, makes of each row: float32 on the CPU, (kinds, pairs).

        The kinds are chosen, rejected and, with `conditional`, chosen with the corrupted image.
        """
        with self._frozen(), use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=None):
            scored = self.score(self.model, self._prepare_inputs(batch))
        sums: torch.Tensor = scored.log_probs.float().sum(dim=1).cpu()
        return sums.view(-1, self.count_pairs(batch))

    def adapter_effect(self, batch: Batch) -> float:
        """The largest change that the adapter makes to a row's log-prob."""
        with self._frozen():
            scored = self.score(self.model, self._prepare_inputs(batch))
        sums = scored.log_probs.float().sum(dim=1).cpu().view(-1, self.count_pairs(batch))
        return float((sums - self.reference_logprobs(batch)).abs().max())

    def train(self, *args: Any, **options: Any) -> Any:
        """TRL's training, with an engine of its own."""
        if self._early_engine is not None:
            self._early_engine.destroy()
            self._early_engine = None
        return super().train(*args, **options)

    def _gather(self) -> None:
        """Under ZeRO 3 a layer's weights are gathered by an engine: before training, which makes its own, by this one."""
        if is_deepspeed_zero3_enabled() and self._early_engine is None:
            self._early_engine = prepare_deepspeed(self.model, self.accelerator)

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """The adapter's weights by name, and perhaps the base's; gathered where processes hold parts, so all call this."""
        if is_deepspeed_zero3_enabled():
            weights: dict[str, torch.Tensor] = self.model_wrapped._zero3_consolidated_16bit_state_dict(
                exclude_frozen_parameters=True
            )
        else:
            weights = self.accelerator.get_state_dict(self.model_wrapped)
        return weights

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """The model in evaluation, as training would compute it."""
        self._gather()
        was_training = self.model.training
        self.model.eval()
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self.accelerator.autocast(),
        ):
            yield
        self.model.train(was_training)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, to the trackers, too; an evaluation with its gap: its loss minus the mean training loss since the last.

        TRL averages an evaluation's metrics over its batches, whose last may be of one pair; here each pair counts alike.
        """
        if "eval_loss" in logs:
            counts, total = self._evaluated_pairs, sum(self._evaluated_pairs)
            for name, values in self._metrics["eval"].items():
                if len(values) == len(counts):
                    mean = sum(value * count for value, count in zip(values, counts, strict=True)) / total
                    self._metrics["eval"][name] = [mean]
            self._evaluated_pairs = []
            since = itertools.takewhile(lambda entry: "eval_loss" not in entry, reversed(self.state.log_history))
            losses = [entry["loss"] for entry in since if "loss" in entry]
            if losses:
                logs[GAP] = logs["eval_loss"] - sum(losses) / len(losses)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Batch) -> int:
        """None are counted: transformers would go through all parameters at each step, for a total that nobody reads."""
        return 0

    def _compute_loss(self, model: Model, inputs: Batch, return_outputs: bool) -> torch.Tensor:
        num_pairs = self.count_pairs(inputs)
        scored = self.score(model, inputs)
        pairs = {name: inputs[name][: 2 * num_pairs] for name in _LAYOUT}
        references = {name: inputs[name] for name in REFERENCE_COLUMNS if name in inputs}
        loss: torch.Tensor = super()._compute_loss(
            lambda **_: scored[: 2 * num_pairs], {**pairs, **references}, return_outputs
        )
        policy = scored.log_probs.sum(dim=1).view(-1, num_pairs)
        reference = torch.stack(list(references.values()))
        terms = {}
        if "sft" in self.loss_types:
            is_chosen = inputs["completion_mask"][:num_pairs, 1:].bool()
            terms["sft"] = -scored.log_probs[:num_pairs][is_chosen].mean()
        for own in self.own_losses:
            terms[own.name] = own.mean(policy, reference, self.beta)
            loss = loss + own.weight * terms[own.name]
        if self.conditional:
            chosen, _, corrupted = policy - reference
            terms["preference"] = loss
            terms["conditional"] = conditional_loss(chosen, corrupted, self.beta)
            terms["anchor"] = anchor_loss(chosen, self.beta)
            loss = loss + terms["conditional"] + terms["anchor"]
        metrics = self._metrics["train" if self.model.training else "eval"]
        if not self.model.training:  # TRL's own count the repeats that fill up the last batch of several ranks
            chosen, rejected, *_ = self.beta * (policy - reference).detach()
            margins = self.accelerator.gather_for_metrics(chosen - rejected)
            self._evaluated_pairs.append(len(margins))
            metrics["rewards/margins"][-1] = margins.mean().item()
            metrics["rewards/accuracies"][-1] = (margins > 0).float().mean().item()
        for name, term in terms.items():
            metrics[TERM + name].append(self.accelerator.gather(term.detach()).mean().item())
        return loss
