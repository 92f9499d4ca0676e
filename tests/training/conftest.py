"""Checked rows of the small checkpoint, and trainers for them."""

from __future__ import annotations

import pytest
import torch

from vcot.pipeline.identity import compute_digest
from vcot.services.recipes.recipe import load_recipe

SMALL = ("train.batch_size=4", "train.lora_r=4", "train.lora_alpha=8", "train.num_evaluations=2")


@pytest.fixture(scope="session")
def rows(pairs_of, checkpoint):
    """Ten training and four validation rows, and the processor."""
    from transformers import AutoProcessor

    from vcot.training.dpo.rows import check_pairs, load_pairs

    directory, _ = pairs_of(10, 4)
    processor = AutoProcessor.from_pretrained(checkpoint)
    checked = [
        check_pairs(load_pairs(directory / f"{name}.parquet"), processor, max_length=512, max_image_side=336)[0]
        for name in ("train", "validation")
    ]
    return (*checked, processor)


@pytest.fixture
def build(rows, checkpoint, tmp_path):
    """Makes a trainer that is ready to train, and its recipe; of the small checkpoint, unless `base` is another."""
    from vcot.training.dpo import fit
    from vcot.training.dpo.reference import attach_reference
    from vcot.training.model.loading import load_processor

    def make(
        *overrides, base=None, validation=None, reference=tmp_path / "reference", on_pairs=lambda done, total: None
    ):
        recipe = load_recipe("nano", [*SMALL, *overrides]).train
        held_out = rows[1] if validation is None else validation
        processor = load_processor(base)[0] if base else rows[2]
        trainer = fit.build_trainer(base or checkpoint, rows[0], held_out, processor, recipe, tmp_path, "test")
        attach_reference(trainer, recipe, reference, compute_digest(base or checkpoint), on_pairs)
        return trainer, recipe

    return make


@pytest.fixture
def disturb():
    """Gives a trainer an adapter as if trained a while: its policy is no longer the reference."""

    def change(trainer, scale=0.3):
        generator = torch.Generator().manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)

    return change


@pytest.fixture
def first_batch():
    """The first rows of a trainer as it sees them."""

    def make(trainer, count=4):
        return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(count)]))

    return make
