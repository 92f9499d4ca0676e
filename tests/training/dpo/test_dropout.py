"""Masks drawn by gaps are independent draws with the recipe's probability, and a resumed run draws the same."""

from __future__ import annotations

import pytest
import torch

from training.dpo.dropout import SparseDropout, draw_mask

SHAPE = torch.Size((300, 1000))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.25])
def test_elements_are_dropped_for_themselves(p):
    torch.manual_seed(0)
    dropped = (draw_mask(SHAPE, p) == 0).double()
    for found, expected in [
        (dropped, p),
        (dropped[:, :1], p),
        (dropped[:, -1:], p),
        (dropped[:, 1:] * dropped[:, :-1], p * p),
        (dropped[1:] * dropped[:-1], p * p),
    ]:
        error = (expected * (1 - expected) / found.numel()) ** 0.5
        assert abs(found.mean() - expected) < 5 * error


@pytest.mark.parametrize("size", [1, 2, 7])
def test_short_masks(size):
    torch.manual_seed(0)
    masks = torch.stack([draw_mask(torch.Size((size,)), 0.1) for _ in range(3000)])
    assert masks.shape == (3000, size)
    assert (masks == 0).double().mean() == pytest.approx(0.1, abs=5 * (0.09 / masks.numel()) ** 0.5)


def test_kept_elements_are_scaled_and_gradients_take_the_same_mask():
    torch.manual_seed(0)
    x = torch.ones(SHAPE, requires_grad=True)
    dropped = SparseDropout(0.1)(x)
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.9).item()}
    assert torch.equal(SparseDropout(0.1).eval()(x), x)


def test_masks_come_from_the_generator_that_a_checkpoint_holds():
    state = torch.get_rng_state()
    first = draw_mask(SHAPE, 0.1)
    assert not torch.equal(draw_mask(SHAPE, 0.1), first)
    torch.set_rng_state(state)
    assert torch.equal(draw_mask(SHAPE, 0.1), first)


@pytest.mark.parametrize(("dropout", "kind"), [(0.1, SparseDropout), (0.5, torch.nn.Dropout), (0, torch.nn.Identity)])
def test_adapter_has_it_where_it_is_faster(build, dropout, kind):
    trainer, _ = build(f"train.lora_dropout={dropout}")
    found = [d for m in trainer.model.modules() if hasattr(m, "lora_dropout") for d in m.lora_dropout.values()]
    assert len(found) > 10
    assert {type(d) for d in found} == {kind}
