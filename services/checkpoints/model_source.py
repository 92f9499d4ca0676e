"""Where a recipe's model is: it comes with vcot, lies in a directory, or is downloaded from the hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import vcot.training
from vcot.pipeline.errors import CheckpointError
from vcot.pipeline.sections import ModelSection
from vcot.services.checkpoints.naming import is_name

_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "README.md")


def find_model(model: ModelSection, progress: Callable[[str], None] = lambda _: None) -> Path:
    """The directory of a bundled name, a plain path or a hub id, downloaded if need be. Raises CheckpointError."""
    local = _find_local(model)
    if local is not None:
        return local
    if not is_hub_id(model):
        names = sorted(p.name for p in _bundled_folder().glob("*/")) or ["none"]
        raise CheckpointError(
            f"checkpoint {model.source!r} is no directory, hub id or bundled name ({', '.join(names)})"
        )
    progress(f"looking up {model.source} on the hub")
    return _download(model)


def is_hub_id(model: ModelSection) -> bool:
    """Whether the model is to come from the hub: it looks like OWNER/NAME, and is no directory here."""
    return _find_local(model) is None and re.fullmatch(r"\w[\w.-]*/[\w.-]+", model.source) is not None


def is_bundled(model: ModelSection) -> bool:
    """Whether the model comes with vcot."""
    return is_name(model.source) and (_bundled_folder() / model.source).is_dir()


def _find_local(model: ModelSection) -> Path | None:
    if is_bundled(model):
        return _bundled_folder() / model.source
    path = Path(model.source).expanduser()
    return path.absolute() if path.is_dir() else None


def _bundled_folder() -> Path:
    return Path(vcot.training.__path__[0]) / "checkpoints"


def _download(model: ModelSection) -> Path:
    from huggingface_hub import snapshot_download  # half a second, and only for hub models
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model.source, revision=model.revision, allow_patterns=list(_HUB_FILES)))
    except RepositoryNotFoundError:
        why = "the hub has no such model, or it needs a login (HF_TOKEN)"
    except LocalEntryNotFoundError:
        why = "the hub cannot be reached and the model is not in its cache; give a directory instead"
    except (HfHubHTTPError, OSError, ValueError) as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    raise CheckpointError(f"model {model.source} could not be fetched: {why}")
