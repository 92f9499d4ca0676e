"""A checkpoint's weight files, read and written tensor by tensor.

Model: a checkpoint is rewritten file by file, under the same names and in the same order, each tensor as it was or changed.
In memory is one tensor at a time (and the pages of one file that the system keeps mapped), however large the checkpoint.
A safetensors file is a length, a JSON header and the tensors' bytes; the header's sizes follow from the types, so it can be
written before the tensors are read. safetensors' own writer takes all tensors of a file at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from vcot.training.protocol.train_sections import Dtype

FLOATS: dict[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""As safetensors calls them."""
_BY_WIDTH: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
_ALIGNMENT = 8
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Cast:
    """A rounding of floating-point tensors: to each of `to` in turn. Tensors of other types stay as they are."""

    to: tuple[Dtype, ...] = ()

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, rounded."""
        for dtype in self.to if tensor.is_floating_point() else ():
            tensor = tensor.to(getattr(torch, dtype))
        return tensor

    def name(self, stored: str) -> str:
        """What a tensor of the safetensors type `stored` becomes."""
        names = {dtype: name for name, dtype in FLOATS.items()}
        return names[self.to[-1]] if self.to and stored in FLOATS else stored

    def rounds(self, dtypes: set[Dtype]) -> bool:
        """Whether it can change the values of tensors of these types."""
        return any(step not in (dtype, "float32") for step in self.to for dtype in dtypes)


Change = Callable[[str, torch.Tensor], torch.Tensor]
"""Takes a tensor's name and the tensor, and returns one of the same shape."""


def weight_files(directory: Path) -> list[Path]:
    """The checkpoint's files of weights, by name."""
    return sorted(directory.glob("*.safetensors"))


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in the checkpoint's files, under the name that it has there."""
    return {name: tuple(file.get_slice(name).get_shape()) for file, name in _tensors(directory)}


def stored_dtypes(directory: Path) -> set[Dtype]:
    """The types that the checkpoint's weights are written in; a packed type counts as float32, which holds any."""
    return {FLOATS.get(file.get_slice(name).get_dtype(), "float32") for file, name in _tensors(directory)}


def narrowest(*dtypes: Dtype) -> Dtype:
    """The one that rounds most."""
    return min(dtypes, key=_BY_WIDTH.index)


def rewrite_weights(source: Path, target: Path, cast: Cast, change: Change = lambda name, tensor: tensor) -> None:
    """Write the weights of `source` into the directory `target`, each tensor changed and then cast.

    Files, their order and their index stay; of the index, only the total size follows the types.
    """
    for file in weight_files(source):
        _rewrite_file(file, target / file.name, cast, change)
    for path in source.glob("*.safetensors.index.json"):
        text = path.read_text("utf-8")
        index, total = json.loads(text), sum(_num_bytes(file) for file in weight_files(target))
        if index.get("metadata", {}).get("total_size", total) != total:
            index["metadata"]["total_size"] = total
            text = json.dumps(index, indent=2) + "\n"
        (target / path.name).write_text(text, "utf-8")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a small file of tensors; unlike safetensors' own writer, readable for whom the umask allows."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    described = {name: (names[tensor.dtype], tuple(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()}
    with path.open("wb") as out:
        _write_header(out, described, {"format": "pt"})
        for tensor in tensors.values():
            _write_tensor(out, tensor)


def _tensors(directory: Path) -> Iterator[tuple[Any, str]]:
    """Each tensor's open file and name."""
    for path in weight_files(directory):
        with safe_open(path, "pt") as file:
            for name in file.offset_keys():
                yield file, name


def _rewrite_file(source: Path, target: Path, cast: Cast, change: Change) -> None:
    with safe_open(source, "pt") as file, target.open("wb") as out:
        names = file.offset_keys()
        described = {name: _describe(file, name, cast) for name in names}
        _write_header(out, described, file.metadata())
        for name in names:
            _write_tensor(out, cast(change(name, file.get_tensor(name))))


def _describe(file: Any, name: str, cast: Cast) -> tuple[str, tuple[int, ...], int]:
    """Type, shape and number of bytes of a tensor as it will be written; nothing of it is read."""
    tensor, stored = file.get_tensor(name), file.get_slice(name).get_dtype()
    width = getattr(torch, cast.to[-1]).itemsize if cast.name(stored) != stored else tensor.itemsize
    return cast.name(stored), tuple(tensor.shape), tensor.numel() * width


def _write_header(
    out: BinaryIO, described: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str] | None
) -> None:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape, num_bytes) in described.items():
        begin, end = end, end + num_bytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    out.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)


def _write_tensor(out: BinaryIO, tensor: torch.Tensor) -> None:
    out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _num_bytes(file: Path) -> int:
    """Bytes of the file's tensors."""
    with file.open("rb") as opened:
        return file.stat().st_size - _LENGTH_BYTES - int.from_bytes(opened.read(_LENGTH_BYTES), "little")
