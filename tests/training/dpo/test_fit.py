"""The recipe reaches TRL as it is written, and each of TRL's silent ways to train nothing is noticed."""

from __future__ import annotations

import json
import math

import pytest
import torch

from vcot.pipeline.errors import MachineError, ServerError
from vcot.services.recipes.recipe import load_recipe
from vcot.training.dpo import fit
from vcot.training.protocol.job import ADAPTER, PROGRESS

START = math.log(2)


def make_recipe(*overrides):
    return load_recipe("nano", overrides).train


@pytest.mark.parametrize(
    ("num_rows", "batch", "accumulation", "epochs", "steps"),
    [(10, 4, 1, 2, 6), (10, 4, 2, 2, 4), (8, 4, 2, 1, 1), (1, 8, 8, 1, 1), (10, 4, 1, 0.5, 2), (300, 4, 8, 2, 20)],
)
def test_step_count(num_rows, batch, accumulation, epochs, steps):
    settings = (f"train.batch_size={batch}", f"train.gradient_accumulation={accumulation}", f"train.epochs={epochs}")
    assert fit.count_steps(num_rows, make_recipe(*settings)) == steps


def test_evaluations_end_with_the_last_step():
    assert fit.evaluation_steps(10, 2) == {5, 10}
    assert fit.evaluation_steps(7, 3) == {2, 5, 7}
    assert fit.evaluation_steps(3, 10) == {1, 2, 3}


def test_recipe_reaches_trl(build):
    trainer, recipe = build("train.gradient_accumulation=2", "train.beta=0.3")
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.1)
    dropouts = [m.p for name, m in trainer.model.named_modules() if isinstance(m, torch.nn.Dropout) and "lora" in name]
    assert dropouts
    assert set(dropouts) == {0.1}, "TRL's disable_dropout makes the recipe's dropout 0"
    args = trainer.args
    assert (args.beta, args.learning_rate, args.num_train_epochs) == (0.3, recipe.learning_rate, recipe.epochs)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 2)
    assert args.max_length is None
    assert (args.bf16, args.fp16, args.gradient_checkpointing) == (False, False, False)
    assert trainer.ref_model is None
    assert list(trainer.model.peft_config) == ["default"], "a second adapter for the reference is not needed"


@pytest.mark.parametrize(("targets", "parts"), [("all-linear", 3), ("language-model", 1)])
def test_target_modules(build, targets, parts):
    trainer, _ = build(f"train.target_modules={targets}")
    adapted = [name for name, module in trainer.model.named_modules() if hasattr(module, "lora_B")]
    found = {part for part in ("vision_tower", "multi_modal_projector", "language_model") for n in adapted if part in n}
    assert len(found) == parts
    assert "language_model" in found
    assert not any("lm_head" in name for name in adapted)
    assert sum("language_model" in name for name in adapted) == 2 * 7
    assert fit.measure(trainer).num_modules == len(adapted)


def test_training_writes_the_curves(build, tmp_path):
    trainer, recipe = build("train.gradient_accumulation=2", "train.learning_rate=1e-2")
    assert fit.run_training(trainer, recipe, tmp_path) == 4
    points = [json.loads(line) for line in (tmp_path / PROGRESS).read_text().splitlines()]
    assert [(point["kind"][0], point["step"]) for point in points] == [
        ("v", 0),
        ("t", 1),
        ("t", 2),
        ("v", 2),
        ("t", 3),
        ("t", 4),
        ("v", 4),
    ]
    assert points[0]["loss"] == pytest.approx(START, abs=1e-6)
    assert points[1]["loss"] == pytest.approx(START, abs=1e-6)
    assert {point["num_steps"] for point in points} == {4}
    assert points[-1]["loss"] < START
    assert points[-1]["reward_margin"] > 0
    assert (tmp_path / ADAPTER / "adapter_model.safetensors").is_file()


def test_training_without_validation_pairs(build, rows, tmp_path):
    trainer, recipe = build("train.epochs=1", validation=rows[1].select([]))
    assert fit.run_training(trainer, recipe, tmp_path) == 3
    points = [json.loads(line) for line in (tmp_path / PROGRESS).read_text().splitlines()]
    assert [(point["kind"], point["step"]) for point in points] == [("train", 1), ("train", 2), ("train", 3)]


def test_training_that_ends_early_is_noticed(build, tmp_path):
    """A literal `<image>` in a text made TRL's collator raise StopIteration, which ends an epoch without an error."""
    trainer, recipe = build()
    collate, calls = trainer.data_collator, []

    def broken(examples):
        calls.append(1)
        if len(calls) == 3:
            raise StopIteration
        return collate(examples)

    trainer.data_collator = broken
    with pytest.raises(ServerError, match="of 6 steps"):
        fit.run_training(trainer, recipe, tmp_path)
    assert not (tmp_path / ADAPTER).exists()


def test_policy_that_is_not_the_reference_is_noticed(build, tmp_path):
    trainer, recipe = build()
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.05)
    with pytest.raises(ServerError, match=r"first validation loss is .*, not 0.6931"):
        fit.run_training(trainer, recipe, tmp_path)


def test_adapter_that_learned_nothing_is_noticed(build, tmp_path):
    trainer, recipe = build("train.learning_rate=1e-60")
    with pytest.raises(ServerError, match="nothing was learned"):
        fit.run_training(trainer, recipe, tmp_path)
    assert not (tmp_path / ADAPTER).exists()


def test_bfloat16_with_gradient_checkpointing(build, tmp_path):
    """Adapter in float32, base in bfloat16; the checks of the first loss hold there, too."""
    trainer, recipe = build("train.dtype=bfloat16", "train.gradient_checkpointing=true", "train.epochs=1")
    dtypes = {p.dtype for name, p in trainer.model.named_parameters() if "lora_" in name}
    assert (dtypes, trainer.model.dtype) == ({torch.float32}, torch.bfloat16)
    assert fit.run_training(trainer, recipe, tmp_path) == 3


def test_float16_needs_a_gpu(build, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="float16 needs a GPU"):
        build("train.dtype=float16")
