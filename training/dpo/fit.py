"""DPO and mDPO with LoRA, by TRL's trainer, exactly as the recipe says, and with its silent traps shut.

What is checked, since TRL does not: that at the start the policy is what it starts from (where that is the reference,
DPO's loss is log 2), that as many optimizer steps were done as the rows and the recipe ask for (an error in the data
loader ends training early without a word), that the adapter learned something, that no row was cut and that the
recipe's dropout is on.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO, TypeAlias

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig

from vcot.pipeline.errors import MachineError, ServerError
from vcot.pipeline.open_lists import TRL_LOSSES
from vcot.training.dpo.corruption import add_other_images
from vcot.training.dpo.losses import find_own_losses, start_loss, weigh_losses, weigh_unforeseen
from vcot.training.dpo.objective import GAP, TERM, PreferenceTrainer
from vcot.training.dpo.rows import PairCollator
from vcot.training.model.loading import DTYPES, Model, device, load_model
from vcot.training.model.model_card import find_hub_id
from vcot.training.model.sharded import load_sharded
from vcot.training.model.template import Processor
from vcot.training.protocol.job import ADAPTER, PROGRESS, STEPS, TrainProgress, fresh_directory, publish_directory
from vcot.training.protocol.resume import find_last_complete, mark_complete, step_of, truncate_progress
from vcot.training.protocol.trackers import PROJECT
from vcot.training.protocol.train_sections import Dtype, TrainSection

START_TOLERANCES: dict[Dtype, float] = {"float32": 1e-3, "float16": 2e-3, "bfloat16": 1e-2}
"""For a loss of 1, and in proportion for one that starts higher. The reference's log-probs may come from another batch,
whose rounding differs: on nano in bfloat16 by 0.003 of the loss where only one pass shared prompts, else not at all."""
MIN_SAVE_INTERVAL_S = 10.0
"""At least this long between two of TRL's checkpoints, and at most a twentieth of the time is spent on writing them."""
State: TypeAlias = Any
"""A transformers TrainerState, TrainerControl or TrainingArguments; the library ships no types."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapted:
    """The size of what is trained."""

    num_modules: int
    num_parameters: int


def count_steps(num_rows: int, recipe: TrainSection) -> int:
    """Optimizer steps of a whole training: the last batch of an epoch may be smaller, and so may its accumulation."""
    num_batches = math.ceil(num_rows / (recipe.batch_size * recipe.num_processes))
    return math.ceil(recipe.epochs * math.ceil(num_batches / recipe.gradient_accumulation))


def evaluation_steps(num_steps: int, num_evaluations: int) -> frozenset[int]:
    """The steps after which the validation loss is measured: evenly spread, the last step always among them."""
    count = min(num_steps, num_evaluations)
    return frozenset(round(i * num_steps / count) for i in range(1, count + 1))


def build_trainer(
    base: Path,
    train: Dataset,
    validation: Dataset,
    processor: Processor,
    recipe: TrainSection,
    job_directory: Path,
    run_name: str,
) -> PreferenceTrainer:
    """TRL's trainer for the checked rows, its adapter not yet trained; the rows still need the reference's log-probs
    (`vcot.training.dpo.reference.attach_reference`).

    Raises MachineError for a dtype that this machine cannot train in, CheckpointError for a base that cannot be loaded.
    """
    if recipe.dtype == "float16" and not torch.cuda.is_available():
        raise MachineError("train.dtype = float16 needs a GPU; use float32 or bfloat16 here")
    # First the arguments: while they live, DeepSpeed's ZeRO 3 spreads a model over the processes as it is loaded.
    arguments = training_arguments(recipe, job_directory / STEPS, run_name)
    return adapt_model(_load(base, recipe), train, validation, processor, recipe, arguments)


def _load(base: Path, recipe: TrainSection) -> Model:
    if recipe.accelerate_config == "fsdp" and recipe.num_processes > 1:
        return load_sharded(base, DTYPES[recipe.dtype], recipe.num_processes)
    return load_model(base, DTYPES[recipe.dtype], weights=recipe.base_weights)


def adapt_model(
    model: Model,
    train: Dataset,
    validation: Dataset,
    processor: Processor,
    recipe: TrainSection,
    arguments: DPOConfig,
) -> PreferenceTrainer:
    """`build_trainer` for a model in memory, which gets the adapter."""
    is_mdpo = recipe.method == "mdpo"
    if is_mdpo and recipe.corruption == "other_image":
        train, validation = add_other_images(train), add_other_images(validation)
    trainer = PreferenceTrainer(
        model=model,
        args=arguments,
        data_collator=PairCollator(processor, recipe.max_image_side, recipe.corruption if is_mdpo else None),
        train_dataset=train,
        eval_dataset=validation if len(validation) else None,
        processing_class=processor,
        peft_config=lora_config(model, recipe),
        conditional=is_mdpo,
        own_losses=find_own_losses(recipe),
    )
    trainer.remove_callback(PrinterCallback)
    if recipe.base_weights == "nf4":
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:  # TRL has put it into bfloat16, which loses small updates
                parameter.data = parameter.data.float()
    trainer.try_sharing(recipe.dtype)
    return trainer


def lora_config(model: Model, recipe: TrainSection) -> LoraConfig:
    """The recipe's adapter."""
    return LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=_targets(model, recipe),
        task_type="CAUSAL_LM",
    )


def measure(trainer: PreferenceTrainer) -> Adapted:
    """How many modules carry an adapter, and how many parameters are trained."""
    modules = [module for module in trainer.model.modules() if hasattr(module, "lora_B")]
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    return Adapted(num_modules=len(modules), num_parameters=sum(p.numel() for p in parameters))


def run_training(
    trainer: PreferenceTrainer, recipe: TrainSection, job_directory: Path, *, from_reference: bool = True
) -> int:
    """Train from the last complete checkpoint, or the start, and put the adapter into place; returns the step count.

    `from_reference` says that the base is the reference, so that the loss at the start is known.

    Raises ServerError where one of the module's checks fails.
    """
    checkpoint = find_last_complete(job_directory / STEPS, recipe.num_processes)
    expected = count_steps(len(trainer.train_dataset), recipe)
    trainer.args.eval_on_start = checkpoint is None and trainer.eval_dataset is not None
    if checkpoint is not None:
        _log.info("resuming after step %d of %d", step_of(checkpoint), expected)
    elif trainer.own_losses or not from_reference:
        _check_adapter_is_new(trainer)
    if rank := trainer.accelerator.process_index:
        torch.manual_seed(recipe.seed + rank)  # with one seed, all ranks would drop out the same
    with _progress_file(trainer, job_directory / PROGRESS, checkpoint) as (file, spent_s):
        trainer.add_callback(_Curves(file, spent_s, recipe, check_start=from_reference and checkpoint is None))
        trainer.add_callback(
            _Pace(evaluation_steps(expected, recipe.num_evaluations), has_validation=bool(trainer.eval_dataset))
        )
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights = trainer.trained_weights()
    if trainer.is_world_process_zero():
        _check_end(trainer.state.global_step, expected, weights)
        partial = fresh_directory(job_directory / f".{ADAPTER}.partial")
        policy = trainer.accelerator.unwrap_model(trainer.model)
        policy.save_pretrained(partial, state_dict=weights)
        _finish_adapter(partial, find_hub_id(Path(policy.name_or_path)))
        publish_directory(partial, job_directory / ADAPTER)
        shutil.rmtree(job_directory / STEPS, ignore_errors=True)  # optimizer states, of no more use
    return expected


def _finish_adapter(directory: Path, hub: tuple[str, str] | None) -> None:
    """What PEFT wrote, readable for whom the umask allows, and without this machine's path of the base.

    `hub` is the base's id and revision there.
    """
    path = directory / "adapter_config.json"
    name, revision = hub or (None, None)
    config = json.loads(path.read_text("utf-8")) | {"base_model_name_or_path": name, "revision": revision}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    shutil.copymode(path, directory / "adapter_model.safetensors")


@contextmanager
def _progress_file(
    trainer: PreferenceTrainer, path: Path, checkpoint: Path | None
) -> Iterator[tuple[TextIO | None, float]]:
    """The curves up to `checkpoint`, open for more, and the seconds spent until then; no file for any but the first rank."""
    if not trainer.is_world_process_zero():
        yield None, 0.0
        return
    spent_s = truncate_progress(path, step_of(checkpoint) if checkpoint else -1)
    with path.open("a", encoding="utf-8") as file:
        yield file, spent_s


def _check_adapter_is_new(trainer: PreferenceTrainer) -> None:
    """With another reference than the base, or a loss of one's own, the loss at the start is not known; the policy must be
    the base all the same.
    """
    rows = range(min(len(trainer.train_dataset), trainer.args.per_device_train_batch_size))
    effect = trainer.adapter_effect(trainer.data_collator([trainer.train_dataset[i] for i in rows]))
    if effect:
        raise ServerError(
            f"the adapter moves log-probs by up to {effect:.4f} before training; the base has an adapter already"
        )


def _check_end(done: int, expected: int, weights: Mapping[str, torch.Tensor]) -> None:
    if done != expected:
        raise ServerError(
            f"training ended after {done} of {expected} steps; a row broke the data loader, see worker.log"
        )
    learned = [bool(weight.any()) for name, weight in weights.items() if "lora_B" in name]
    if not any(learned):
        raise ServerError(f"after {done} steps all {len(learned)} adapter matrices are still zero: nothing was learned")
    if not all(torch.isfinite(weight).all() for name, weight in weights.items() if "lora_" in name):
        raise ServerError(
            f"after {done} steps the adapter holds values that are not numbers; lower train.learning_rate"
        )
    _log.info("%d of %d adapted modules learned", sum(learned), len(learned))


def training_arguments(recipe: TrainSection, steps: Path, run_name: str) -> DPOConfig:
    """The recipe in TRL's terms, without losses of one's own, which TRL does not know; its checkpoints go to `steps`."""
    weights = {name: weight for name, weight in weigh_losses(recipe).items() if name in TRL_LOSSES}
    return DPOConfig(
        output_dir=str(steps),
        project=PROJECT,
        run_name=run_name,
        beta=recipe.beta,
        loss_type=list(weights),
        loss_weights=list(weights.values()),
        label_smoothing=recipe.label_smoothing,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        gradient_checkpointing=recipe.gradient_checkpointing,
        bf16=recipe.dtype == "bfloat16",
        fp16=recipe.dtype == "float16",
        use_cpu=device().type == "cpu",
        seed=recipe.seed,
        data_seed=recipe.seed,  # else each rank's own seed would deal out the pairs, some of them twice
        ddp_find_unused_parameters=True,  # the tower's last layer has an adapter, but no part in the answer
        max_length=None,  # the preflight has refused long rows; cutting one loses image tokens or the whole response
        disable_dropout=False,  # TRL's default would make the recipe's dropout 0
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",  # _Pace decides
        save_strategy="no",
        save_total_limit=2,
        report_to=list(recipe.report_to) or "none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _targets(model: Model, recipe: TrainSection) -> str:
    """PEFT's target: every linear layer, or a pattern for those of the language model (lm_head is in neither)."""
    if recipe.target_modules == "all-linear":
        return "all-linear"
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    leaves = {
        name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)
    }
    return rf"{prefix.replace('.', chr(92) + '.')}\..*\.({'|'.join(sorted(leaves))})"


class _Curves(TrainerCallback):  # type: ignore[misc]
    """Writes each logged step and evaluation as one TrainProgress line, and checks the loss at the start."""

    def __init__(self, file: TextIO | None, spent_s: float, recipe: TrainSection, *, check_start: bool) -> None:
        self._file = file
        self._recipe = recipe
        self._begin_s = time.monotonic() - spent_s
        self._checks_start = check_start

    def on_log(self, args: object, state: State, control: object, logs: Mapping[str, float], **_: object) -> None:
        """TRL logs `loss` after a step, and `eval_loss` after an evaluation."""
        if "loss" in logs:
            self._write("train", "", state, logs)
        elif "eval_loss" in logs:
            self._write("validation", "eval_", state, logs)

    def _write(
        self, kind: Literal["train", "validation"], prefix: str, state: State, logs: Mapping[str, float]
    ) -> None:
        if not math.isfinite(logs[f"{prefix}loss"]):
            raise ServerError(
                f"the loss is not a number any more at step {state.global_step} of {state.max_steps}; lower "
                "train.learning_rate, or train in a wider train.dtype"
            )
        point = TrainProgress(
            kind=kind,
            step=state.global_step,
            num_steps=state.max_steps,
            epoch=state.epoch or 0.0,
            loss=logs[f"{prefix}loss"],
            terms={
                name.removeprefix(prefix + TERM): value
                for name, value in logs.items()
                if name.startswith(prefix + TERM)
            },
            gap=logs.get(GAP) if kind == "validation" else None,
            reward_margin=logs.get(f"{prefix}rewards/margins"),
            reward_accuracy=logs.get(f"{prefix}rewards/accuracies"),
            learning_rate=logs.get("learning_rate"),
            elapsed_s=time.monotonic() - self._begin_s,
        )
        if self._file is not None:
            self._file.write(point.model_dump_json() + "\n")
            self._file.flush()
        if kind == "validation":
            _log.info("step %d of %d: validation loss %.4f", point.step, point.num_steps, point.loss)
        self._check_start(point)

    def _check_start(self, point: TrainProgress) -> None:
        """Before its first update the policy is the reference: the adapter's output is zero, with or without dropout.

        What depends on the model is subtracted. A validation loss that holds it is not checked: where several ranks share
        the last batch, its terms and its loss are not averaged over the same rows.
        """
        is_first = self._checks_start and point.step == (1 if point.kind == "train" else 0)
        unforeseen = weigh_unforeseen(self._recipe)
        if not is_first or (point.kind == "validation" and unforeseen):
            return
        expected, tolerance = start_loss(self._recipe), START_TOLERANCES[self._recipe.dtype]
        found = point.loss - sum(weight * point.terms[name] for name, weight in unforeseen.items())
        if not abs(found - expected) <= tolerance * max(1.0, expected):
            raise ServerError(
                f"the first {point.kind} loss is {found:.4f}, not {expected:.4f}: policy and reference differ before "
                "training; the base has dropout of its own, or an adapter already, or the reference's log-probs are "
                "of another model (remove the run's reference folder)"
            )


class _Pace(TrainerCallback):  # type: ignore[misc]
    """Decides after which steps to evaluate and to save; marks a saved checkpoint as complete.

    When a checkpoint is saved depends on the clock, the first rank's, but not what follows: saving draws no random number.
    """

    def __init__(self, evaluations: frozenset[int], *, has_validation: bool) -> None:
        self._evaluations = evaluations if has_validation else frozenset()
        self._saved_s = time.monotonic()
        self._interval_s = MIN_SAVE_INTERVAL_S

    def on_step_end(self, args: object, state: State, control: State, **_: object) -> None:
        """Called after each optimizer step; the trainer evaluates first, then saves."""
        control.should_evaluate = state.global_step in self._evaluations
        due = time.monotonic() - self._saved_s >= self._interval_s and state.global_step < state.max_steps
        control.should_save = broadcast_object_list([due])[0]
        if control.should_save:
            self._saved_s = time.monotonic()

    def on_save(self, args: State, state: State, control: object, **_: object) -> None:
        """Called when TRL has written a checkpoint."""
        PartialState().wait_for_everyone()  # each rank has written its random state
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        now = time.monotonic()
        self._interval_s = max(MIN_SAVE_INTERVAL_S, 20 * (now - self._saved_s))
        self._saved_s = now
