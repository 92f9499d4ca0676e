"""mDPO's terms are what the paper says, the reference is not forwarded in training, and shared prompts change nothing."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback
from trl import DPOConfig

from vcot.pipeline.errors import RecipeError, ServerError
from vcot.pipeline.open_lists import TRL_LOSSES
from vcot.services.recipes.recipe import load_recipe
from vcot.training.dpo import fit
from vcot.training.dpo.losses import start_loss
from vcot.training.dpo.objective import anchor_loss, conditional_loss
from vcot.training.dpo.sharing import score
from vcot.training.protocol.job import ADAPTER, PROGRESS, STEPS
from vcot.training.protocol.resume import find_last_complete

NANO = Path(fit.__file__).parents[1] / "checkpoints" / "nano"
START = math.log(2)
MDPO = "train.method=mdpo"
EXACT = "train.lora_dropout=0"


def read_points(job):
    return [json.loads(line) for line in (job / PROGRESS).read_text().splitlines()]


def term_values(trainer, batch):
    """The loss and its terms, with their graph."""
    trainer.model.train()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, batch)
    return loss, {k: values[-1] for k, values in trainer._metrics["train"].items() if k.startswith("terms/")}


def test_each_term_is_log_2_before_training(build, first_batch):
    trainer, _ = build(MDPO)
    loss, terms = term_values(trainer, first_batch(trainer))
    assert loss.item() == pytest.approx(3 * START, abs=1e-5)
    assert terms == {
        f"terms/{name}": pytest.approx(START, abs=1e-5) for name in ("preference", "conditional", "anchor")
    }


@pytest.mark.parametrize("base", [None, NANO])
def test_terms_are_the_papers(build, disturb, first_batch, base):
    """Recomputed from plain forwards of policy and reference, each row alone."""
    trainer, recipe = build(MDPO, EXACT, base=base)
    disturb(trainer)
    batch = first_batch(trainer)
    _, terms = term_values(trainer, batch)
    model = trainer.model.eval()
    with torch.no_grad():
        policy = score(model, batch).log_probs.sum(1).view(3, 4)
        with model.disable_adapter():
            reference = score(model, batch).log_probs.sum(1).view(3, 4)
    chosen, rejected, corrupted = policy - reference
    sigmoid = torch.sigmoid
    expected = {
        "preference": -sigmoid(recipe.beta * (chosen - rejected)).log().mean(),
        "conditional": -sigmoid(recipe.beta * (chosen - corrupted)).log().mean(),
        "anchor": -sigmoid(recipe.beta * chosen).log().mean(),
    }
    assert terms == {f"terms/{name}": pytest.approx(value.item(), abs=1e-5) for name, value in expected.items()}
    assert all(abs(value - START) > 1e-4 for value in terms.values())


@pytest.mark.parametrize("term", [lambda a, b: conditional_loss(a, b, 0.3), lambda a, b: anchor_loss(a, 0.3)])
def test_gradients_of_the_terms_alone(term):
    ratios = [torch.randn(3, dtype=torch.double, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(term, ratios)


@pytest.mark.parametrize("base", [None, NANO])
@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("method", ["train.method=dpo", MDPO])
def test_gradient_agrees_with_finite_differences(build, disturb, method, sharing, first_batch, base):
    trainer, _ = build(method, EXACT, base=base)
    disturb(trainer)
    trainer.shares_prompts = sharing
    trainer.model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in first_batch(trainer).items()}
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    loss = trainer.compute_loss(trainer.model, batch)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    direction = [g / g.norm().clamp(min=1e-9) for g in gradients]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    step, values = 1e-4, []
    for sign in (1, -2):
        for parameter, way in zip(parameters, direction, strict=True):
            parameter.data.add_(sign * step * way)
        values.append(trainer.compute_loss(trainer.model, batch).item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope.item(), rel=1e-3)
    assert slope > 1e-3


def test_loss_depends_on_the_corrupted_pixels(build, disturb, first_batch):
    trainer, _ = build(MDPO, EXACT)
    disturb(trainer)
    batch = first_batch(trainer)
    before, terms = term_values(trainer, batch)
    pixels = batch["pixel_values"]
    corrupted = torch.cat([pixels[:8], pixels[8:].flip(0) + 0.5])
    after, changed = term_values(trainer, {**batch, "pixel_values": corrupted})
    assert abs(after.item() - before.item()) > 1e-6
    assert changed["terms/conditional"] != terms["terms/conditional"]
    assert (changed["terms/preference"], changed["terms/anchor"]) == (
        terms["terms/preference"],
        terms["terms/anchor"],
    )


@pytest.mark.parametrize("kind", ["crop", "other_image"])
def test_mdpo_trains_and_logs_its_terms(build, tmp_path, kind):
    trainer, recipe = build(MDPO, f"train.corruption={kind}", "train.epochs=1", "train.learning_rate=1e-2")
    assert fit.run_training(trainer, recipe, tmp_path) == 3
    points = read_points(tmp_path)
    assert points[0]["loss"] == pytest.approx(3 * START, abs=1e-5)
    for point in points:
        assert set(point["terms"]) == {"preference", "conditional", "anchor"}
        if point["kind"] == "train":
            assert point["loss"] == pytest.approx(sum(point["terms"].values()), abs=1e-4)
    assert points[-1]["loss"] < points[0]["loss"]


def test_every_loss_of_trl_starts_where_it_is_expected(build, first_batch):
    trainer, recipe = build("train.beta=0.3")
    batch = first_batch(trainer)
    trainer.label_smoothing = 0.1
    for name in TRL_LOSSES:
        trainer.loss_types, trainer.loss_weights = [name], [2.0]
        changed = {"losses": (name,), "loss_weights": (2.0,), "label_smoothing": 0.1}
        loss, terms = term_values(trainer, batch)
        rest = loss.item() - 2 * terms.get("terms/sft", 0)
        assert rest == pytest.approx(start_loss(recipe.model_copy(update=changed)), abs=1e-4), name


def test_losses_are_those_of_trl():
    (described,) = [f.metadata["help"] for f in fields(DPOConfig) if f.name == "loss_type"]
    assert set(re.findall(r"`'(\w+)'`", described)) == set(TRL_LOSSES)


def test_sft_beside_dpo_is_checked_without_its_own_value(build, tmp_path):
    settings = ('train.losses=["sigmoid", "sft"]', "train.loss_weights=[1.0, 0.5]", "train.epochs=1")
    trainer, recipe = build(*settings)
    fit.run_training(trainer, recipe, tmp_path)
    first = next(point for point in read_points(tmp_path) if point["kind"] == "train")
    assert first["terms"]["sft"] > 1
    assert first["loss"] - 0.5 * first["terms"]["sft"] == pytest.approx(START, abs=1e-4)


def test_policy_that_is_not_the_reference_is_noticed_beside_sft(build, disturb, tmp_path):
    trainer, recipe = build('train.losses=["sigmoid", "sft"]')
    disturb(trainer)
    with pytest.raises(ServerError, match=r"first train loss is .*, not 0.6931"):
        fit.run_training(trainer, recipe, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (('train.losses=["sigmod"]',), "there is no loss 'sigmod'; do you mean sigmoid"),
        (('train.losses=["sigmoid", "sft"]', "train.loss_weights=[1.0]"), "1 loss_weights for 2 losses"),
        (('train.losses=["sft", "sft"]',), "named twice"),
        (('train.losses=["exo_pair"]',), "infinite without label_smoothing"),
        (("train.label_smoothing=0.1",), "changes none of the losses sigmoid; take one of robust"),
        (("train.corruption=blur",), "train.corruption = 'blur'"),
    ],
)
def test_wrong_objectives_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("nano", settings)


def test_start_check_of_validation_leaves_sft_out(build, tmp_path):
    """Several ranks do not average it over the rows that the loss is averaged over."""
    trainer, recipe = build('train.losses=["sigmoid", "sft"]', "train.batch_size=3", "train.epochs=1")
    assert fit.run_training(trainer, recipe, tmp_path) == 4


class Interruption(TrainerCallback):
    """Ctrl-C in the second epoch."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_interrupted_mdpo_ends_with_the_same_adapter(build, tmp_path, monkeypatch):
    """With the reference's log-probs from disk, and the same corrupted images; tests/e2e kills the process."""
    monkeypatch.setattr(fit, "MIN_SAVE_INTERVAL_S", 0.0)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed.mkdir()
    disturbed.mkdir()
    fit.run_training(*build(MDPO), undisturbed)
    trainer, recipe = build(MDPO)
    trainer.args.output_dir = str(disturbed / STEPS)
    trainer.add_callback(Interruption())
    with pytest.raises(KeyboardInterrupt):
        fit.run_training(trainer, recipe, disturbed)
    assert find_last_complete(disturbed / STEPS) is not None
    fit.run_training(*build(MDPO), disturbed)
    one, other = ((job / ADAPTER / "adapter_model.safetensors").read_bytes() for job in (undisturbed, disturbed))
    assert one == other


def test_each_validation_pair_counts_alike_however_they_are_batched(build, disturb, rows):
    """Ten pairs in batches of 4, 4 and 2: TRL counted those of the last twice in margins, accuracy and terms."""
    found = []
    for size in (1, 4):
        trainer, _ = build(MDPO, EXACT, f"train.batch_size={size}", validation=rows[0])
        disturb(trainer)
        found.append(trainer.evaluate())
    names = ["loss", "rewards/margins", "rewards/accuracies", *(f"terms/{n}" for n in ("preference", "anchor"))]
    alone, batched = ([values[f"eval_{name}"] for name in names] for values in found)
    assert batched == pytest.approx(alone, rel=1e-4)
