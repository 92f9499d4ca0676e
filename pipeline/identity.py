"""Checkpoints on disk: what identifies one, and whether a directory can be served.

A checkpoint is a directory in the Hugging Face layout with `checkpoint.json` (a `CheckpointManifest`) beside the weights.
Its digest covers every file that can change an answer: weights, model config, tokenizer, processor and chat template. The
generation config is left out, since vLLM is told to ignore it. Only safetensors are taken (a pickle runs code).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from vcot.pipeline.errors import CheckpointError
from vcot.pipeline.files import read_record, write_record
from vcot.pipeline.manifest import CheckpointManifest

MANIFEST = "checkpoint.json"
_IDENTITY_PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "adapter_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*processor*.json",
    "chat_template*",
)
_SLOW_TOKENIZER = ("vocab.*", "merges.txt", "*.model")
"""What a tokenizer is made of where no tokenizer.json holds all of it."""


def compute_digest(directory: Path) -> str:
    """`sha256:<64 hex>` over the names and contents of the files that determine the checkpoint's answers.

    Raises CheckpointError where the directory or its weights are missing.
    """
    check_layout(directory)
    patterns = _IDENTITY_PATTERNS + (() if (directory / "tokenizer.json").is_file() else _SLOW_TOKENIZER)
    files = sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()})
    listing = "".join(f"{_file_digest(path)}  {path.name}\n" for path in files)
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_layout(directory: Path) -> None:
    """Raise CheckpointError unless `directory` holds a config and complete safetensors weights."""
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint {directory} does not exist; give a directory, a bundled name or a hub id")
    if not any((directory / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise CheckpointError(f"checkpoint {directory} has no config.json; it is not a Hugging Face checkpoint")
    if not any(directory.glob("*.safetensors")):
        raise CheckpointError(f"checkpoint {directory} has no *.safetensors weights; copy them there or name another")
    for index in directory.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"checkpoint {directory}: {index.name} names no shards ({error}); copy it again"
            ) from None
        missing = sorted(shard for shard in shards if not (directory / shard).is_file())
        if missing:
            raise CheckpointError(f"checkpoint {directory} lacks {missing[0]}, which {index.name} lists; copy it again")


def read_manifest(directory: Path) -> CheckpointManifest:
    """The manifest of a checkpoint directory, as written; `verify_checkpoint` also recomputes the digest."""
    remedy = "restore it, or make the checkpoint again"
    manifest = read_record(directory / MANIFEST, CheckpointManifest, CheckpointError, remedy=remedy)
    if manifest is None:
        raise CheckpointError(
            f"checkpoint {directory} has no {MANIFEST}; give one that `vcot merge` made (a base is the recipe's model)"
        )
    return manifest


def verify_checkpoint(directory: Path) -> CheckpointManifest:
    """The manifest, after recomputing the digest from the files. Raises CheckpointError where they differ."""
    manifest = read_manifest(directory)
    digest = compute_digest(directory)
    if digest != manifest.checkpoint.digest:
        raise CheckpointError(
            f"checkpoint {directory} has digest {digest[:19]}, but its {MANIFEST} says {manifest.checkpoint.digest[:19]}; "
            "its files were changed after it was made: restore them, or make it again"
        )
    return manifest


def write_manifest(directory: Path, manifest: CheckpointManifest) -> None:
    """Write `checkpoint.json` in one step: a reader sees the old one or the new one."""
    write_record(directory / MANIFEST, manifest)
