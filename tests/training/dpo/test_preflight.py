"""Before any training time is spent: what a step takes is held against what is free."""

import shutil

import pytest
import torch

from tests.nvidia import install_nvidia_smi
from vcot.pipeline.errors import MachineError
from vcot.pipeline.records import CheckpointRef
from vcot.services.recipes.recipe import load_recipe
from vcot.training.dpo.preflight import CheckedPairs, available_gib, check_job
from vcot.training.protocol.job import PREFLIGHT, PairSummary, Preflight, TrainJob, read_record
from vcot.training.protocol.shape import find_shape

ROWS = PairSummary(
    num_rows=2,
    num_kept=2,
    refused=(),
    refused_rows=(),
    max_length=1200,
    example="",
)


@pytest.fixture
def job(tmp_path):
    """Of the paper's recipe and model, of which there is a config only."""
    shutil.copy(find_shape("llava-hf/llava-1.5-7b-hf"), tmp_path / "config.json")
    recipe = load_recipe("paper")
    return TrainJob(
        base=CheckpointRef(name="base", digest="sha256:0", kind="base"),
        base_path=str(tmp_path),
        pairs_path=str(tmp_path),
        pairs_digest="0",
        train=recipe.train,
        merge=recipe.merge,
    )


@pytest.mark.parametrize(("free", "is_refused"), [(15.0, True), (20.5, False), (70.0, False)])
def test_what_surely_does_not_fit_is_refused_and_what_may_not_is_kept_for_the_warning(job, tmp_path, free, is_refused):
    found = CheckedPairs(train=ROWS, validation=ROWS)
    if is_refused:
        with pytest.raises(MachineError, match=r"needs at least .* and 15.0 GiB are free .*`vcot doctor`"):
            check_job(job, tmp_path, found, free)
    else:
        check_job(job, tmp_path, found, free)
    kept = read_record(tmp_path / PREFLIGHT, Preflight)
    assert (kept.available_gib, kept.memory.longest_row) == (free, 1200)
    assert (kept.memory.total > free) == (free < 70)


def test_what_is_free_is_asked_of_cuda_or_for_several_processes_of_the_driver(job, tmp_path, monkeypatch):
    install_nvidia_smi(tmp_path, monkeypatch, *(gib * 1024 for gib in (70, 30, 5)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (12 * 2**30, 80 * 2**30))
    assert available_gib(job.train) == 12.0
    assert available_gib(job.train.model_copy(update={"num_processes": 2})) == 30.0


def test_without_a_gpu_it_is_the_machines_memory_that_is_free(job, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert 0.1 < available_gib(job.train) < 10_000
