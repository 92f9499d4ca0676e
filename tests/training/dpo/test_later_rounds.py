"""A job that starts from one checkpoint and is held to another: the loss, and what is checked at the start."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from vcot.pipeline.errors import CheckpointError, ServerError
from vcot.pipeline.files import write_record
from vcot.pipeline.identity import compute_digest
from vcot.pipeline.records import CheckpointRef
from vcot.training.dpo import fit
from vcot.training.dpo.rows import PairCollator, load_pairs
from vcot.training.model.loading import completion_logprobs, load_model, load_processor
from vcot.training.protocol.job import JOB, PROGRESS, TrainJob, TrainProgress, read_record
from vcot.training.worker.jobs import work


@pytest.fixture(scope="module")
def last_policy(checkpoint, tmp_path_factory):
    """The small checkpoint with other weights: what a round before made of it."""
    from safetensors.torch import load_file, save_file

    directory = shutil.copytree(checkpoint, tmp_path_factory.mktemp("policy") / "policy")
    weights = load_file(directory / "model.safetensors")
    draw = torch.Generator().manual_seed(1)
    moved = {name: w + 0.05 * torch.randn(w.shape, generator=draw).to(w.dtype) for name, w in weights.items()}
    save_file(moved, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def later_job(make_job, last_policy):
    """A job of round 2, held to the seed; returns its directory."""
    directory = make_job("train.epochs=1", "train.lora_dropout=0")
    job = read_record(directory / JOB, TrainJob)
    start = CheckpointRef(name="dpo-1", digest=compute_digest(last_policy), kind="merged", parent=job.base.digest)
    fields = {"base": start, "base_path": str(last_policy), "round": 2}
    seed = {"reference": job.base, "reference_weights": job.base_path}
    write_record(directory / JOB, job.model_copy(update=fields | seed))
    return directory


def read_points(directory):
    return [TrainProgress.model_validate_json(line) for line in (directory / PROGRESS).read_text().splitlines()]


def margins(directory, pairs):
    """Chosen minus rejected log-prob of each validation pair under a model."""
    processor, _ = load_processor(directory)
    batch = PairCollator(processor, 336)(list(load_pairs(pairs / "validation.parquet")))
    chosen, rejected = completion_logprobs(load_model(directory, torch.float32), batch).sum(dim=1).view(2, -1)
    return chosen - rejected


def test_the_loss_at_the_start_is_that_of_the_last_policy_against_the_seed(later_job, last_policy, checkpoint):
    job = read_record(later_job / JOB, TrainJob)
    work(later_job)
    first = read_points(later_job)[0]
    policy, seed = (margins(directory, Path(job.pairs_path)) for directory in (last_policy, checkpoint))
    expected = float(-logsigmoid(job.train.beta * (policy - seed)).mean())
    assert (first.kind, first.step) == ("validation", 0)
    assert first.loss == pytest.approx(expected, abs=1e-4)
    assert abs(expected - math.log(2)) > 1e-3


def test_a_reference_that_was_altered_is_refused(later_job, last_policy):
    job = read_record(later_job / JOB, TrainJob)
    write_record(later_job / JOB, job.model_copy(update={"reference_weights": str(last_policy)}))
    with pytest.raises(CheckpointError, match="the job was made for"):
        work(later_job)


def test_an_adapter_that_is_not_new_is_noticed_where_the_loss_says_nothing(build, tmp_path):
    trainer, recipe = build()
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.05)
    with pytest.raises(ServerError, match="the base has an adapter already"):
        fit.run_training(trainer, recipe, tmp_path, from_reference=False)
