"""Models of other families go through checking, training, merging and the gate as they are, or are refused by name."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from tests.training import families
from tests.training.dpo.test_rows import Rows, make_row, refusal, text
from vcot.pipeline.errors import VcotError
from vcot.pipeline.identity import verify_checkpoint
from vcot.training.dpo import fit
from vcot.training.dpo.rows import PairCollator, check_pairs
from vcot.training.protocol.job import JOB, MERGE_REPORT, PREFLIGHT, MergeReport, Preflight, TrainJob, read_record
from vcot.training.worker import jobs


@pytest.fixture
def qwen(qwen_checkpoint):
    return AutoProcessor.from_pretrained(qwen_checkpoint)


def train_and_merge(job, out):
    jobs.work(job, out)
    report, found = read_record(out / MERGE_REPORT, MergeReport), read_record(job / PREFLIGHT, Preflight)
    assert (found.train.num_kept, found.train.refused) == (4, ())
    assert report.max_abs_logprob < 1e-4
    assert report.differs_from_base > 1e-3
    manifest = verify_checkpoint(out)
    assert manifest.canary is not None
    base = read_record(job / JOB, TrainJob).base_path
    assert set(load_file(out / "model.safetensors")) == set(load_file(f"{base}/model.safetensors"))


SETTINGS = ("train.learning_rate=1e-2", "train.lora_r=4", "train.epochs=1")
SIZE = {"num_train": 4, "num_validation": 2}


def test_qwen3_vl_trains_and_merges(make_job, qwen_checkpoint, tmp_path):
    train_and_merge(make_job(*SETTINGS, **SIZE, base=qwen_checkpoint), tmp_path / "out")


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "internvl", "gemma3"])
def test_trains_and_merges(family, make_job, tmp_path):
    base = families.save(family, tmp_path / "base")
    train_and_merge(make_job(*SETTINGS, **SIZE, base=base), tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "reason"),
    [("paligemma", "chat template is missing"), ("idefics3", "20 image tokens, but the processor announces 34")],
)
def test_is_refused_with_its_reason(family, reason, make_job, tmp_path):
    job = make_job(*SETTINGS, **SIZE, base=families.save(family, tmp_path / "base"))
    with pytest.raises(VcotError, match=reason):
        jobs.work(job)


def rows_of_two_shapes():
    return [make_row(), make_row(images=[Image.new("RGB", (112, 56), "blue")])]


def test_image_tensors_follow_the_rows(qwen):
    """Chosen rows first, then the rejected ones, each with its own image's patches."""
    batch = PairCollator(qwen, 336)(rows_of_two_shapes())
    small, wide = [1, 4, 4], [1, 4, 8]
    assert batch["image_grid_thw"].tolist() == [small, wide, small, wide]
    assert len(batch["pixel_values"]) == 2 * (16 + 32)
    assert (batch["input_ids"] == qwen.image_token_id).sum(1).tolist() == [4, 8, 4, 8]
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == qwen.image_token_id)


def test_what_a_template_writes_after_eos_is_not_trained(qwen):
    """It is never generated; ChatML has a line break there."""
    batch = PairCollator(qwen, 336)([make_row()])
    for ids, completion, answer in zip(
        batch["input_ids"],
        batch["completion_mask"],
        ("The circle is red.", "The square is blue. No."),
        strict=True,
    ):
        assert qwen.tokenizer.decode(ids[completion == 1]) == f"{answer}<|im_end|>"


def test_images_that_lose_tokens_by_scaling_are_refused(qwen):
    """Sampling saw the whole image: where the number of tokens follows its size, training must see the same."""
    row = make_row(images=[Image.new("RGB", (112, 56))])
    assert refusal(qwen, row, max_image_side=56) == (
        "6 image tokens, but 8 when it was sampled; raise train.max_image_side"
    )
    assert len(check_pairs(Rows([row]), qwen, max_length=512, max_image_side=112)[0]) == 1


@pytest.mark.parametrize("marker", ["<|video_pad|>", "<|im_start|>", "<|image_pad|>"])
def test_markers_in_a_text_are_refused(qwen, marker):
    row = make_row(chosen=[{"role": "assistant", "content": text(f"The {marker} here.")}])
    assert refusal(qwen, row) == f"the special token {marker} stands in the text"


@pytest.mark.parametrize(
    ("targets", "parts"), [("all-linear", {"visual", "language_model"}), ("language-model", {"language_model"})]
)
def test_target_modules(qwen, qwen_checkpoint, targets, parts, tmp_path):
    from datasets import Dataset

    from vcot.services.recipes.recipe import load_recipe

    recipe = load_recipe("nano-qwen", [f"train.target_modules={targets}", "train.lora_r=4"]).train
    rows = Dataset.from_list([make_row()])
    trainer = fit.build_trainer(qwen_checkpoint, rows, rows.select([]), qwen, recipe, tmp_path, "test")
    adapted = [name for name, module in trainer.model.named_modules() if hasattr(module, "lora_B")]
    assert {part for part in ("visual", "language_model") if any(f".{part}." in name for name in adapted)} == parts
    assert sum("language_model" in name for name in adapted) == 2 * 7
    assert not any("lm_head" in name for name in adapted)
