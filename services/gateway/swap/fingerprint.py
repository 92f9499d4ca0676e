"""What a checkpoint's files are, byte by byte, and what an engine's tensors must be that loaded them.

Model: vLLM's `/weight_checker` gives a SHA-256 of each tensor that an engine holds. It is compared with the files', in the
type that the engine computes in, for whatever an engine stores as the files do: under the same name, or with those that it
fuses one after the other (q, k and v; gate and up), or with rows of zeros behind a vocabulary. Which those are is not known
but learned (`Layout`): a tensor that was the file's on a verified engine is held to it from then on. So one that an engine
transposes, packs, quantizes or shards is never held to anything, and the canary must do for it. On a CPU that is each
linear layer: packed elsewhere, it hashes as the empty string.

Limits: a server's first checkpoint sets the layout and is held to nothing by it. The hashing takes the engine 15 ms for
nano, and SHA-256's own time, about a second for each GB, for a larger model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vcot.pipeline.errors import CheckpointError
from vcot.services.checkpoints.integrity import FileState, check_digest, stat_files
from vcot.services.checkpoints.registry import Checkpoint
from vcot.training.protocol.train_sections import Dtype

_EMPTY = hashlib.sha256().hexdigest()
_FUSED = {".q_proj.": (".qkv_proj.", (".q_proj.", ".k_proj.", ".v_proj."))} | {
    ".gate_proj.": (".gate_up_proj.", (".gate_proj.", ".up_proj."))
}
"""What the first part's name becomes, and the parts."""
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
_VOCABULARY_ROWS = 64
"""A vocabulary is filled up with zeros to a multiple of these."""
_STORED: dict[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Tensor:
    """One that an engine may hold."""

    num_bytes: int
    digests: frozenset[str]
    """Any of these is right."""


@dataclass(frozen=True)
class Fingerprint:
    """A checkpoint's files as they were when they were read, and the tensors by the name that an engine may give them."""

    files: FileState
    tensors: Mapping[str, Tensor]


@dataclass
class Layout:
    """What engines of a kind store as the files do. Mutated by those that verify them."""

    _known: set[tuple[int, str, int]] = field(default_factory=set)
    """Number of ranks, name and size."""

    def fault(self, held: Mapping[str, str], fingerprint: Fingerprint) -> str | None:
        """Which tensors of an engine are not the files', as a clause; `held` is SHA-256 by rank and name."""
        wrong = [
            name
            for name, tensor, digest, key in self._each(held, fingerprint)
            if key in self._known and digest not in tensor.digests
        ]
        if not wrong:
            return None
        return f"{len(wrong)} tensors in the engine are not the files' ({min(wrong)})"

    def learn(self, held: Mapping[str, str], fingerprint: Fingerprint) -> None:
        """The engine was verified to hold what the fingerprint is of."""
        self._known.update(key for _, tensor, digest, key in self._each(held, fingerprint) if digest in tensor.digests)

    def _each(
        self, held: Mapping[str, str], fingerprint: Fingerprint
    ) -> Iterator[tuple[str, Tensor, str, tuple[int, str, int]]]:
        num_ranks = len({key.rpartition(":")[0] for key in held})
        for key, digest in held.items():
            name = key.rpartition(":")[2].replace(".base_layer.", ".")
            tensor = fingerprint.tensors.get(name)
            if tensor is not None and digest != _EMPTY:
                yield name, tensor, digest, (num_ranks, name, tensor.num_bytes)


def read_fingerprint(checkpoint: Checkpoint, dtype: Dtype) -> Fingerprint:
    """Read every file. Raises CheckpointError where they are not what was registered."""
    files = stat_files(checkpoint.directory)
    check_digest(checkpoint.directory, checkpoint.ref)
    tensors = _tensors(checkpoint.directory, dtype) if checkpoint.ref.kind != "adapter" else {}
    fingerprint = Fingerprint(files, tensors)
    check_unchanged(checkpoint, fingerprint)
    return fingerprint


def check_unchanged(checkpoint: Checkpoint, fingerprint: Fingerprint) -> None:
    """Raise CheckpointError where a file was written since it was read."""
    if (now := stat_files(checkpoint.directory)) != fingerprint.files:
        changed = sorted({name for name, *_ in set(now) ^ set(fingerprint.files)})
        raise CheckpointError(
            f"{', '.join(changed[:3])} in {checkpoint.directory} was changed while {checkpoint.ref.name} was loaded; "
            "restore it, or make the checkpoint again"
        )


def _tensors(directory: Path, dtype: Dtype) -> dict[str, Tensor]:
    stored = dict(_stored(directory))
    return {name: _tensor(name, parts, dtype) for name, parts in _named(stored)}


@dataclass(frozen=True)
class _Stored:
    data: npt.NDArray[np.uint8]
    dtype: Dtype
    shape: tuple[int, ...]


def _stored(directory: Path) -> Iterator[tuple[str, _Stored]]:
    """Each tensor of the files whose type is known, not read yet."""
    for path in sorted(directory.glob("*.safetensors")):
        data = np.memmap(path, mode="r")
        begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
        for name, entry in json.loads(data[8:begin].tobytes()).items():
            if name != "__metadata__" and entry["dtype"] in _STORED:
                first, last = (begin + offset for offset in entry["data_offsets"])
                yield name, _Stored(data[first:last], _STORED[entry["dtype"]], tuple(entry["shape"]))


def _named(stored: dict[str, _Stored]) -> Iterator[tuple[str, list[_Stored]]]:
    """What an engine may hold, and of which tensors of the files."""
    for name, tensor in stored.items():
        yield name, [tensor]
        for first, (fused, parts) in _FUSED.items():
            names = [name.replace(first, part) for part in parts]
            if first in name and all(part in stored for part in names):
                yield name.replace(first, fused), [stored[part] for part in names]


def _tensor(name: str, parts: list[_Stored], dtype: Dtype) -> Tensor:
    digest, num_bytes = hashlib.sha256(), 0
    for part in parts:
        data = _cast(part, dtype)
        digest.update(data)
        num_bytes += len(data)
    digests = {digest.hexdigest()}
    if name.endswith(_VOCABULARY) and parts[0].shape:
        rows = parts[0].shape[0]
        digest.update(bytes(num_bytes // rows * (-rows % _VOCABULARY_ROWS)))
        digests.add(digest.hexdigest())
    return Tensor(num_bytes, frozenset(digests))


def _cast(tensor: _Stored, dtype: Dtype) -> bytes:
    """The bytes in that type, rounded to the nearest even as torch does."""
    if tensor.dtype == dtype:
        return tensor.data.tobytes()
    values = _as_float32(tensor)
    if dtype == "bfloat16":
        bits = values.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
    with np.errstate(over="ignore"):
        return values.astype(np.float16 if dtype == "float16" else np.float32).tobytes()


def _as_float32(tensor: _Stored) -> npt.NDArray[np.float32]:
    if tensor.dtype == "bfloat16":
        return (tensor.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return tensor.data.view(np.float16 if tensor.dtype == "float16" else np.float32).astype(np.float32)
