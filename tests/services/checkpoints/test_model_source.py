from pathlib import Path

import pytest

from tests.hub_cache import write_snapshot
from vcot.pipeline.errors import CheckpointError
from vcot.pipeline.sections import ModelSection
from vcot.services.checkpoints.model_source import find_model


@pytest.mark.parametrize("source", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_source_that_is_nothing_is_said_in_one_sentence(source: str) -> None:
    with pytest.raises(CheckpointError, match="no directory, hub id or bundled name") as caught:
        find_model(ModelSection(source=source))
    assert "\n" not in str(caught.value)


def test_a_hub_model_is_the_revision_that_the_recipe_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` has moved on since."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    old, new = (
        write_snapshot(tmp_path, "model", "owner/model", revision, {"config.json": revision.encode()})
        for revision in ("a" * 40, "b" * 40)
    )
    assert find_model(ModelSection(source="owner/model", revision="a" * 40)) == old
    assert find_model(ModelSection(source="owner/model")) == new
    with pytest.raises(CheckpointError, match="could not be fetched"):
        find_model(ModelSection(source="owner/model", revision="c" * 40))


def test_an_unreachable_hub_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="could not be fetched") as caught:
        find_model(ModelSection(source="llava-hf/not-in-any-cache"))
    assert "\n" not in str(caught.value)
