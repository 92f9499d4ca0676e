"""What a recipe says of training: `[train]`, `[sweep]` and `[merge]`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from vcot.pipeline.fields import Count, Section, Seed
from vcot.pipeline.open_lists import LOSSES

Dtype = Literal["float32", "bfloat16", "float16"]
BaseWeights = Literal["full", "nf4"]
SearchMode = Literal["one_at_a_time", "grid"]
Corruption = Literal["crop", "blank", "noise", "other_image"]
_SMOOTHED = ("robust", "aot", "aot_unpaired", "exo_pair")
"""Those of TRL's losses that label smoothing changes."""


class TrainSection(Section):
    """The trainer's job."""

    method: Literal["dpo", "mdpo"] = "dpo"
    """`dpo` (Rafailov et al. 2023), or `mdpo` (Wang et al. 2024): with preference of the true image, and an anchor."""
    losses: Annotated[tuple[Annotated[str, AfterValidator(LOSSES.check)], ...], Field(min_length=1)] = ("sigmoid",)
    """Losses, added up: TRL's (`sigmoid` is DPO's, `sft` the chosen response's), or one's own as `package.module:name`."""
    loss_weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """A weight for each of `losses`; without it, 1."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of preferences taken to be wrong; for `robust`, `aot`, `aot_unpaired` and `exo_pair`, which needs it."""
    corruption: Corruption = "crop"
    """What mDPO corrupts an image by: a random `crop` that keeps 1 to 20 %, `blank`, `noise`, or `other_image`."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the pull towards the reference."""
    lora_r: Count = 64
    """Rank of the adapter."""
    lora_alpha: Count = 128
    """Scale of the adapter: updates are multiplied by alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout on the adapter's input."""
    target_modules: Literal["all-linear", "language-model"] = "all-linear"
    """`all-linear` adapts tower, projector and language model; `language-model` leaves the first two as they are."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate."""
    schedule: Literal["linear", "constant"] = "linear"
    """How the learning rate goes on from its peak: `linear` falls to 0 at the last step, `constant` stays."""
    epochs: Annotated[float, Field(gt=0)] = 2
    """Passes over the pairs."""
    batch_size: Count = 8
    """Pairs per device and step."""
    gradient_accumulation: Count = 1
    """Steps that are added up before an update."""
    max_image_side: Annotated[int, Field(ge=14)] = 336
    """Longer images are scaled down to this side, in pixels, to bound memory."""
    max_length: Count = 2048
    """Longest row in tokens, image tokens included; longer rows are refused before training, never cut."""
    dtype: Dtype = "bfloat16"
    """The type that training computes in."""
    base_weights: BaseWeights = "full"
    """What the frozen base is held in: `full` is `dtype`; `nf4` is 4 bits a weight (QLoRA), for GPUs of 24 GB."""
    gradient_checkpointing: bool = True
    """Recompute activations to save memory."""
    num_evaluations: Count = 10
    """How often the validation loss is measured over the whole training."""
    seed: Seed = 0
    """Of the adapter's start, the order of pairs, and dropout."""
    report_to: tuple[Literal["wandb", "trackio"], ...] = ()
    """Trackers besides the run's own files."""
    worker: Literal["local", "remote"] = "local"
    """Who trains: `local` is a process of the command's own, `remote` a `vcot worker` that sees the run's directory."""
    num_processes: Count = 1
    """Processes, one per GPU, on all machines together; `batch_size` is each one's."""
    num_machines: Count = 1
    """Machines that share the processes evenly; on each but the first a `vcot worker` waits for jobs."""
    address: str | None = None
    """The first machine's address in the network of the others; without it, the one that its default route leaves by."""
    accelerate_config: str = "ddp"
    """How they share the work: `ddp`, `fsdp`, `zero2`, `zero3` (DeepSpeed), or the path of an accelerate config file."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.loss_weights and len(self.loss_weights) != len(self.losses):
            raise ValueError(f"{len(self.loss_weights)} loss_weights for {len(self.losses)} losses; give each its own")
        if self.base_weights == "nf4" and self.accelerate_config in ("fsdp", "zero3"):
            raise ValueError(f"base_weights = nf4 cannot be spread by {self.accelerate_config}; take ddp or zero2")
        if len(set(self.losses)) != len(self.losses):
            raise ValueError("a loss is named twice in losses; give it a weight instead")
        if self.num_processes % self.num_machines:
            raise ValueError(f"{self.num_machines} machines cannot share {self.num_processes} processes evenly")
        if "exo_pair" in self.losses and not self.label_smoothing:
            raise ValueError("exo_pair is infinite without label_smoothing; its authors take 1e-3")
        if self.label_smoothing and not set(self.losses) & set(_SMOOTHED):
            raise ValueError(
                f"label_smoothing = {self.label_smoothing:g} changes none of the losses {', '.join(self.losses)}; take one "
                f"of {', '.join(_SMOOTHED)}, or leave it out"
            )
        return self

    @property
    def processes_per_machine(self) -> int:
        """Of `num_processes`."""
        return self.num_processes // self.num_machines


class SweepSection(Section):
    """The search for training settings, around those of `train`."""

    mode: SearchMode = "one_at_a_time"
    """`one_at_a_time` varies each setting while the others are as in `train`; `grid` trains the product of the lists."""
    num_pairs: Count = 2000
    """Pairs that the search is done on, drawn by image; 0.9 of them train where `pairs.validation_fraction` is 0.1."""
    epochs: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1, 2, 3, 4, 5)
    """Passes over the pairs; one at a time, all are read off one training of the most."""
    learning_rate: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1e-6, 5e-6, 1e-5, 5e-5)
    """Peak learning rates."""
    lora_dropout: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=1)] = (0.1, 0.5, 0.8)
    """Dropouts on the adapter's input."""
    lora_alpha: Annotated[tuple[Count, ...], Field(min_length=1)] = (64, 128, 256)
    """Scales of the adapter."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Validation losses within this share of the lowest count as equal; the smallest gap then decides."""
    seed: Seed = 0
    """Which pairs are drawn."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        odd = next((num for num in self.epochs if num != int(num)), None)
        if self.mode == "one_at_a_time" and odd is not None:
            raise ValueError(
                f'epochs holds {odd:g}, but they are read at the ends of epochs; give whole numbers, or mode = "grid"'
            )
        return self


class MergeSection(Section):
    """How the adapter becomes a servable checkpoint."""

    serve_as: Literal["merged", "adapter"] = "merged"
    """`merged` adds the adapter to the base's weights; `adapter` serves it beside them (target_modules = language-model)."""
    dtype: Literal["auto"] | Dtype = "auto"
    """The type of the merged weights; `auto` is the base's own, or float32 where that would round the update away."""
