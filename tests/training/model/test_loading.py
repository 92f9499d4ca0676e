"""A checkpoint that is damaged is a sentence, whichever of its files it is."""

import shutil
from pathlib import Path

import pytest
import torch

from vcot.pipeline.errors import CheckpointError
from vcot.training.model.loading import load_model, load_processor

NANO = Path(__file__).parents[3] / "training" / "checkpoints" / "nano"


@pytest.fixture
def damaged(tmp_path):
    """A copy of nano with one file's content replaced."""

    def damage(name, content):
        copy = tmp_path / "copy"
        shutil.copytree(NANO, copy)
        (copy / name).write_bytes(content((NANO / name).read_bytes()))
        return copy

    return damage


FAULTS = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "bytes": lambda data: b"\xff\xfe\x00junk",
    "array": lambda data: b"[1]",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_weights_or_config(damaged, name, fault):
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        load_model(damaged(name, FAULTS[fault]), torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"])
def test_damaged_processor(damaged, name, fault):
    with pytest.raises(CheckpointError, match="has no usable processor") as caught:
        load_processor(damaged(name, FAULTS[fault]))
    assert "\n" not in str(caught.value)
