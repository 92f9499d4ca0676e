"""A row with a shared prompt scores as two plain ones, or prompts are not shared."""

from __future__ import annotations

import pytest
import torch
from trl.trainer import utils

from vcot.training.dpo import fit
from vcot.training.dpo.sharing import Packing, find_fault, plan_packing, score, score_shared
from vcot.training.model.loading import completion_logprobs

EXACT = "train.lora_dropout=0"


def test_packed_rows():
    """Prompt `1 2`, chosen `3 4 5`, rejected `6`; and a longer prompt with a shorter chosen response."""
    ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 7, 3, 0], [1, 2, 6, 0, 0], [1, 2, 7, 8, 0]])
    completion = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0]])
    packing = plan_packing({"input_ids": ids, "attention_mask": (ids > 0).long(), "completion_mask": completion}, 2)
    assert ids[packing.row, packing.column].tolist() == [[1, 2, 3, 4, 5, 2, 6], [1, 2, 7, 3, 7, 8, 3]]
    assert packing.column.tolist() == [[0, 1, 2, 3, 4, 1, 2], [0, 1, 2, 3, 2, 3, 3]]
    assert packing.segment.tolist() == [[0, 1, 1, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2, -1]]
    sees = packing.attention_mask[0, 0].int().tolist()
    assert sees[4] == [1, 1, 1, 1, 1, 0, 0]
    assert sees[6] == [1, 0, 0, 0, 0, 1, 1]
    assert packing.attention_mask.any(dim=-1).all(), "a position that sees nothing has no number"


@pytest.mark.parametrize("method", ["train.method=dpo", "train.method=mdpo"])
def test_log_probs_and_gradients_are_those_of_plain_rows(build, disturb, first_batch, method):
    trainer, _ = build(method, EXACT)
    disturb(trainer)
    batch = first_batch(trainer)
    results = []
    for scored in (score(trainer.model, batch), score_shared(trainer.model, batch, 4)):
        trainer.model.zero_grad()
        (scored.log_probs.sum(1) * torch.arange(1, len(batch["input_ids"]) + 1)).sum().backward()
        gradients = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
        results.append((scored, gradients))
    (plain, plain_gradients), (shared, shared_gradients) = results
    for name in ("log_probs", "entropy", "mean_logits", "is_top1"):
        torch.testing.assert_close(getattr(shared, name).float(), getattr(plain, name).float(), atol=3e-5, rtol=1e-5)
    assert (plain.log_probs != 0).sum() == batch["completion_mask"].sum()
    for one, other in zip(shared_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("sharing", [False, True])
def test_head_scores_the_responses_and_nothing_else(build, disturb, first_batch, monkeypatch, sharing):
    trainer, _ = build(EXACT)
    disturb(trainer)
    trainer.shares_prompts, batch = sharing, first_batch(trainer)
    kernel, seen = utils._ChunkedLogProbFunction, []
    apply = kernel.apply
    monkeypatch.setattr(kernel, "apply", lambda hidden, *rest: seen.append(len(hidden)) or apply(hidden, *rest))
    found = trainer.score(trainer.model, batch).log_probs
    assert seen == [int(batch["completion_mask"].sum())]
    plain = {name: value for name, value in batch.items() if not name.startswith("ref_")}
    torch.testing.assert_close(found.detach(), completion_logprobs(trainer.model, plain), atol=3e-5, rtol=1e-5)


def test_prompt_passes_once(build, first_batch):
    trainer, _ = build()
    seen = []
    decoder = trainer.model.get_base_model().get_decoder()
    decoder.register_forward_pre_hook(
        lambda _, a, kwargs: seen.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    batch = first_batch(trainer)
    trainer.compute_loss(trainer.model, batch)
    ((num_rows, _),) = seen
    assert (trainer.shares_prompts, num_rows, len(batch["input_ids"])) == (True, 4, 8)


@pytest.mark.parametrize("leak", ["other response", "positions"])
def test_model_that_scores_packed_rows_otherwise_is_found_out(build, first_batch, monkeypatch, leak):
    trainer, _ = build()
    if leak == "other response":
        length = lambda self: torch.ones(1, 1, self.row.size(1), self.row.size(1), dtype=torch.bool).tril()  # noqa: E731
        monkeypatch.setattr(
            Packing, "attention_mask", property(lambda self: length(self).expand(len(self.row), -1, -1, -1))
        )
    else:
        forward = trainer.model.forward
        monkeypatch.setattr(trainer.model, "forward", lambda position_ids=None, **rest: forward(**rest))
    trainer.try_sharing("float32")
    assert "log-probs differ by" in trainer.sharing_fault
    assert not trainer.shares_prompts


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("_attn_implementation_internal", "flash_attention_2", "attention by flash_attention_2, not sdpa"),
        ("rope_parameters", {"mrope_section": [1, 1, 2]}, "positions in three dimensions"),
        ("layer_types", ["full_attention", "sliding_attention"], "layers of sliding_attention"),
    ],
)
def test_unsupported_models(build, first_batch, monkeypatch, field, value, fault):
    trainer, _ = build()
    monkeypatch.setattr(trainer.model.config.get_text_config(), field, value, raising=False)
    assert find_fault(trainer.model, first_batch(trainer), 4, "float32") == fault


def test_training_without_sharing_ends_where_training_with_it_does(build, tmp_path):
    """Without dropout; with it the draws differ."""
    ends = []
    for sharing in (True, False):
        trainer, recipe = build(EXACT, "train.learning_rate=1e-3")
        assert trainer.shares_prompts
        trainer.shares_prompts = sharing
        job = tmp_path / str(sharing)
        job.mkdir()
        fit.run_training(trainer, recipe, job)
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]))
    assert (ends[0] - ends[1]).abs().max() < 1e-5
