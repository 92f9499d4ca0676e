"""What bench/swap_mutations.py puts in wrongly, and its count of what was seen: pure but for the files of a checkpoint."""

from __future__ import annotations

import collections
import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from bench.engine import say

Tensors = dict[str, npt.NDArray[Any]]
_NOT_LIVE = "no checkpoint is live"
KINDS = ("missing", "zeroed", "scaled", "exchanged", "rounded")
_GUARDS = (  # by what the refusal says
    ("files", ("was changed while", "files were changed", "not what was registered")),
    ("cache", ("prefix cache",)),
    ("tensors", ("tensors in the engine",)),
    ("canary", ("canary",)),
    ("shape", ("another shape", "cannot be loaded in place", "would not be served exactly")),
    ("engine", ("vLLM answered", "vLLM did not answer")),
    ("claim", ("started anew",)),
)


@dataclass(frozen=True)
class Mutation:
    """One tensor of a file, wrong in one way."""

    kind: str
    tensor: str

    def of(self, weights: Tensors, order: list[str]) -> Tensors | None:
        """The file's tensors; None where that changes no bit, or cannot be done."""
        changed, old = dict(weights), weights[self.tensor]
        if self.kind == "missing":
            del changed[self.tensor]
            return changed
        if self.kind == "exchanged":
            begin = order.index(self.tensor) + 1
            other = next((n for n in (*order[begin:], *order[:begin]) if weights[n].shape == old.shape), self.tensor)
            changed[self.tensor], changed[other] = weights[other], old
        else:
            changed[self.tensor] = _CHANGES[self.kind](old)
        return None if np.array_equal(changed[self.tensor], old) else changed


def _scaled(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return (values * np.float32(1.01)).astype(np.float32)


def _rounded(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """To bfloat16 and back."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32).reshape(values.shape)


_CHANGES: dict[str, Callable[[npt.NDArray[Any]], npt.NDArray[Any]]] = {
    "zeroed": np.zeros_like,
    "scaled": _scaled,
    "rounded": _rounded,
}


def mutations(weights: Tensors, every: int) -> Iterator[tuple[Mutation, Tensors]]:
    """Each mutation that changes something, or one in `every`, with the file's tensors."""
    order = sorted(weights)
    found = (Mutation(kind, name) for name in order for kind in KINDS)
    changing = ((m, changed) for m in found if (changed := m.of(weights, order)) is not None)
    return itertools.islice(changing, 0, None, every)


@dataclass
class Target:
    """A right checkpoint, and where wrong ones of it are put."""

    directory: Path
    file: str

    @property
    def weights(self) -> Tensors:
        return load_file(self.directory / self.file)

    def write(self, folder: Path, weights: Tensors) -> Path:
        """A copy with other weights."""
        if not folder.is_dir():
            shutil.copytree(self.directory, folder)
        (folder / self.file).unlink(missing_ok=True)
        save_file(weights, folder / self.file, metadata={"format": "pt"})
        return folder


@dataclass
class Score:
    """What became of the attempts. Mutated by `count` only."""

    by_guard: collections.Counter[str] = field(default_factory=collections.Counter)
    by_way: collections.Counter[str] = field(default_factory=collections.Counter)
    by_mutation: collections.Counter[str] = field(default_factory=collections.Counter)
    passed: list[tuple[str, str, Mutation | None]] = field(default_factory=list)
    """Way, name and mutation of those that were swapped in."""
    harmless: list[str] = field(default_factory=list)
    """Calls that were skipped, and every answer was the right one all the same."""
    unjudged: list[str] = field(default_factory=list)
    """Attempts while nothing was live, which say nothing of any guard."""
    num_ruined: int = 0
    """Engines that had to be started anew."""
    right_swaps: int = 0
    false_alarms: int = 0

    def count_right(self, way: str, refusal: str | None) -> None:
        """A swap with nothing wrong."""
        if refusal is not None and _NOT_LIVE in refusal:
            self.unjudged.append(f"{way}/right")
            return
        self.right_swaps += 1
        if refusal is not None:
            self.false_alarms += 1
            say(f"false alarm by {way}: {refusal}")

    def count(self, way: str, what: str, mutation: Mutation | None, refusal: str | None) -> None:
        name = f"{way}/{what}" + (f"/{mutation.kind}/{mutation.tensor}" if mutation else "")
        if refusal is None:
            self.passed.append((way, name, mutation))
            say(f"swapped in: {name}")
            return
        if _NOT_LIVE in refusal:
            self.unjudged.append(name)
            say(f"not judged: {name}: {refusal}")
            return
        refusal = refusal.partition(" could not be brought back")[0]  # what follows is of the weights before
        guard = next((guard for guard, words in _GUARDS if any(word in refusal for word in words)), "other")
        if guard == "other":
            say(f"{name}: {refusal}")
        self.by_guard[guard] += 1
        self.by_way[way] += 1
        self.by_mutation[f"{what}/{mutation.kind}" if mutation else what] += 1
