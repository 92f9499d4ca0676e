"""Features of a frozen tower are those of the model itself, and are computed once an image."""

from __future__ import annotations

import pytest
import torch

from training.dpo import fit
from training.dpo.features import Features, keep_features

FROZEN = "train.target_modules=language-model"


def backbone(trainer):
    return trainer.model.get_base_model().model


@pytest.fixture
def count():
    """Counts the images that go through a trainer's tower."""

    def start(trainer):
        seen = []
        backbone(trainer).vision_tower.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
        return seen

    return start


def plain(trainer):
    """The trainer with the model's own method."""
    del backbone(trainer).get_image_features
    return trainer


def test_log_probs_are_those_of_the_model_itself(build, first_batch):
    kept, own = build(FROZEN)[0], plain(build(FROZEN)[0])
    batch = first_batch(kept)
    for _ in range(2):
        with torch.no_grad():
            difference = kept.score(kept.model, batch).log_probs - own.score(own.model, batch).log_probs
        assert difference.abs().max() < 1e-5


def test_each_image_passes_the_tower_once(build, count, tmp_path):
    trainer, recipe = build(FROZEN, "train.epochs=2", reference=tmp_path / "other")
    seen = count(trainer)
    backbone(trainer).get_image_features._known.clear()
    fit.run_training(trainer, recipe, tmp_path)
    images = {image.tobytes() for rows in (trainer.train_dataset, trainer.eval_dataset) for [image] in rows["images"]}
    assert set(seen) == {1}
    assert len(seen) == len(images)


def test_training_ends_with_the_same_adapter(build, tmp_path):
    trainers = build(FROZEN), (plain(build(FROZEN)[0]), build(FROZEN)[1])
    ends = []
    for number, (trainer, recipe) in enumerate(trainers):
        (tmp_path / str(number)).mkdir()
        torch.manual_seed(0)
        fit.run_training(trainer, recipe, tmp_path / str(number))
        ends.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert ends[0].keys() == ends[1].keys()
    assert max(float((ends[0][n] - ends[1][n]).abs().max()) for n in ends[0]) < 1e-5


def test_a_tower_that_is_trained_computes_its_features_anew(build):
    trainer, _ = build()
    assert not isinstance(backbone(trainer).__dict__.get("get_image_features"), Features)
    assert not keep_features(trainer.model)


def test_ranks_that_share_a_tower_pass_it_together(build):
    trainer, _ = build(FROZEN, "train.accelerate_config=fsdp")
    assert not isinstance(backbone(trainer).__dict__.get("get_image_features"), Features)


def test_a_tower_with_dropout_computes_its_features_anew(build):
    trainer = plain(build(FROZEN)[0])
    trainer.model.get_base_model().config.vision_config.attention_dropout = 0.1
    assert not keep_features(trainer.model)


def test_what_does_not_fit_is_computed_anew(build, first_batch):
    trainer = plain(build(FROZEN)[0])
    own = backbone(trainer).get_image_features
    pixels = first_batch(trainer)["pixel_values"][:2]
    size = own(pixel_values=pixels, return_dict=True).pooler_output[0].numel() * 4
    features = Features(own, max_bytes=size)
    first, again = features(pixels).pooler_output, features(pixels).pooler_output
    assert len(features._known) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_an_image_of_another_content_has_features_of_its_own(build, first_batch):
    trainer, _ = build(FROZEN)
    pixels = first_batch(trainer)["pixel_values"][:1]
    given = [backbone(trainer).get_image_features(pixels + shift).pooler_output[0] for shift in (0.0, 0.5)]
    assert not torch.equal(*given)


def test_models_of_another_kind_are_left_alone(qwen_checkpoint, build):
    trainer, _ = build(FROZEN, base=qwen_checkpoint)
    before = trainer.model.get_base_model().model.get_image_features
    with torch.no_grad():
        assert trainer.score(trainer.model, trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]])))
    assert not isinstance(before, Features) or not before._known


def test_a_model_that_gives_something_else_is_tried_once():
    asked = []

    def compute(pixel_values, **_):
        asked.append(len(pixel_values))
        return "something else"

    features = Features(compute)
    assert [features(torch.zeros(3, 3, 2, 2)) for _ in range(2)] == ["something else"] * 2
    assert asked == [1, 3, 3]
