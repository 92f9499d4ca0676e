"""The reference is forwarded once for all runs on the same pairs, and training ends where plain TRL's does."""

from __future__ import annotations

import copy
import sqlite3

import pytest
import torch
from datasets import concatenate_datasets
from trl import DPOTrainer

from vcot.pipeline.errors import InputError, ServerError
from vcot.services.recipes.recipe import load_recipe
from vcot.training.dpo import fit
from vcot.training.dpo.objective import PreferenceTrainer
from vcot.training.dpo.reference import ReferenceCache, attach_reference, deal, row_keys
from vcot.training.dpo.rows import REFERENCE_COLUMNS, PairCollator
from vcot.training.model.loading import load_model

MDPO = "train.method=mdpo"


def train_weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("dropout", [0, 0.1])
def test_training_ends_where_plain_trl_does(build, rows, checkpoint, tmp_path, dropout):
    """Plain TRL computes the reference on the fly, and each prompt twice; the dropout is the same where none is shared."""
    trainer, recipe = build(f"train.lora_dropout={dropout}", "train.learning_rate=1e-3")
    trainer.shares_prompts = False
    trainer.train()
    model = load_model(checkpoint, torch.float32)
    plain = DPOTrainer(
        model=model,
        args=fit.training_arguments(recipe, tmp_path / "plain", "plain"),
        data_collator=PairCollator(rows[2], recipe.max_image_side),
        train_dataset=rows[0],
        processing_class=rows[2],
        peft_config=fit.lora_config(model, recipe),
    )
    start = train_weights(plain)
    plain.train()
    assert (train_weights(plain) - train_weights(trainer)).abs().max() < 1e-5  # Adam divides rounding by rounding
    assert (train_weights(plain) - start).abs().max() > 1e-4
    for ours, theirs in zip(logged(trainer), logged(plain), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-4)


def logged(trainer):
    """What TRL logs of each step, but for the accuracy, where the first step's margins are zero but for rounding."""
    return [
        {name: value for name, value in entry.items() if name != "rewards/accuracies"}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def test_reference_is_not_forwarded_in_training(build, tmp_path):
    trainer, recipe = build(MDPO)
    calls = []
    trainer.model.get_base_model().get_decoder().register_forward_hook(
        lambda module, a, out: calls.append(module.training)
    )
    fit.run_training(trainer, recipe, tmp_path)
    assert calls.count(True) == 6, "one forward for each of two times three batches"
    assert calls.count(False) == 3, "one for each of three evaluations of one batch"


def test_second_run_computes_nothing(build, monkeypatch):
    first, _ = build(MDPO)
    monkeypatch.setattr(PreferenceTrainer, "reference_logprobs", None)
    second, _ = build(MDPO, "train.seed=7", "train.learning_rate=1e-2", "train.lora_dropout=0.5", "train.batch_size=2")
    third, _ = build()
    for name in REFERENCE_COLUMNS:
        assert first.train_dataset[name] == second.train_dataset[name]
    assert third.train_dataset[REFERENCE_COLUMNS[0]] == first.train_dataset[REFERENCE_COLUMNS[0]]
    assert REFERENCE_COLUMNS[2] not in third.train_dataset.column_names
    with pytest.raises(TypeError):
        build(MDPO, "train.corruption=blank")
    with pytest.raises(TypeError):
        build("train.max_image_side=28")


def test_interrupted_computation_goes_on(build, tmp_path):
    undisturbed, _ = build(reference=tmp_path / "undisturbed")

    def interrupt(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(on_pairs=interrupt)
    progress = []
    resumed, _ = build(on_pairs=lambda done, total: progress.append((done, total)))
    assert progress == [(0, 8), (4, 8), (0, 4)]
    for name in REFERENCE_COLUMNS[:2]:
        assert resumed.train_dataset[name] == undisturbed.train_dataset[name]


def test_key_tells_what_changes_the_number(rows):
    train, _, processor = rows
    recipe = load_recipe("nano", [MDPO]).train
    keys = row_keys(train, processor, recipe)
    assert len({key for kinds in keys for key in kinds}) == 3 * len(train)
    assert row_keys(train, processor, recipe) == keys
    texts, images = train.remove_columns("images"), train.select_columns(["images"])
    moved = concatenate_datasets([texts, images.select([*range(1, len(train)), 0])], axis=1)
    assert not set(row_keys(moved, processor, recipe)[0]) & set(keys[0]), "another image"
    other_template = copy.deepcopy(processor)
    other_template.chat_template = processor.chat_template.replace("USER", "HUMAN").replace("upper()", "lower()")
    assert not set(row_keys(train, other_template, recipe)[0]) & set(keys[0]), "another prompt"
    corrupted = row_keys(train, processor, recipe.model_copy(update={"corruption": "blank"}))
    assert [same == key for same, key in zip(corrupted[0], keys[0], strict=True)] == [True, True, False]


def test_stale_numbers_are_noticed(build, tmp_path):
    trainer, _ = build()
    (path,) = (tmp_path / "reference").iterdir()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE logprobs SET value = value + abs(random() % 100) / 10.0")
    trainer, recipe = build()
    with pytest.raises(ServerError, match="reference's log-probs are of another model"):
        fit.run_training(trainer, recipe, tmp_path)


def test_one_file_for_each_weights_dtype_and_image_size(tmp_path):
    recipe = load_recipe("nano").train
    changes = ({}, {"dtype": "bfloat16"}, {"max_image_side": 28}, {"seed": 9, "beta": 0.5, "lora_r": 2})
    paths = [ReferenceCache(tmp_path, "sha256:ab", recipe.model_copy(update=change)).path for change in changes]
    assert len(set(paths)) == 3
    assert paths[3] == paths[0]
    assert ReferenceCache(tmp_path, "sha256:cd", recipe).path not in paths


def test_file_that_is_no_cache_is_named(tmp_path):
    recipe = load_recipe("nano").train
    cache = ReferenceCache(tmp_path, "sha256:ab", recipe)
    cache.close()
    cache.path.write_bytes(b"junk" * 1000)
    with pytest.raises(InputError, match="remove them to have them computed again"):
        ReferenceCache(tmp_path, "sha256:ab", recipe)


def test_good_number_is_never_replaced(tmp_path):
    cache = ReferenceCache(tmp_path, "sha256:ab", load_recipe("nano").train)
    cache.put({"a": 1.0, "b": 2.0})
    cache.put({"a": 3.0})
    assert cache.get(["a", "b", "c"]) == {"a": 1.0, "b": 2.0}


def test_ranks_compute_as_many_batches_each():
    """One that computed less would leave the others waiting for its part of the weights."""
    assert [deal([0, 4, 8, 12, 16], rank, 3) for rank in range(3)] == [[0, 12], [4, 16], [8, 16]]
    assert deal([], 1, 2) == []


def test_a_log_prob_that_is_no_number_is_said(build, tmp_path):
    """SQLite stores none where a number must be: the row's key was then missing, and training ended in a KeyError."""
    trainer, recipe = build()
    next(trainer.model.get_base_model().get_decoder().parameters()).data.fill_(float("nan"))
    with pytest.raises(ServerError, match="no numbers in float32; train in a wider"):
        attach_reference(trainer, recipe, tmp_path / "other", "sha256:ab", lambda *_: None)
