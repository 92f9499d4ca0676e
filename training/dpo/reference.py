"""The reference's log-probs, computed once for all runs on the same pairs: a sweep, several seeds, a resumed run.

One SQLite file for each digest of weights (which covers tokenizer, processor and chat template), dtype (or 4 bits) and
image size; in it one number for each (prompt, response, image), the corruption of the image included. A batch's numbers are
committed before the next is computed, so that a killed run goes on where it was, and several processes may fill one file.

The number is that of the training's own pass (same trainer, dtype, sharing of prompts), without the adapter. Which rows
stand in one batch changes its rounding (float32: 1e-6); so batches are the rows in their order, and a batch with a number
missing is computed whole: a run that was killed here ends with the same numbers as one that was not.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from datasets import Dataset

from vcot.pipeline.errors import InputError, ServerError
from vcot.pipeline.records import content_key
from vcot.training.dpo.corruption import OTHER_IMAGES, digest_images
from vcot.training.dpo.objective import PreferenceTrainer
from vcot.training.dpo.rows import COLUMNS, REFERENCE_COLUMNS, render_pair
from vcot.training.model.template import Processor
from vcot.training.protocol.train_sections import TrainSection

OnPairs = Callable[[int, int], None]
"""Takes pairs done and pairs in all."""
_CORRUPTION_VERSION = 1
"""Raised when training/dpo/corruption.py draws otherwise."""
_MAX_VARIABLES = 500
_log = logging.getLogger(__name__)


class ReferenceCache:
    """Log-probs by key, on disk."""

    def __init__(self, directory: Path, digest: str, recipe: TrainSection) -> None:
        """Open or create the file for a base's `digest`. Raises InputError where it cannot be used."""
        held = recipe.dtype if recipe.base_weights == "full" else f"{recipe.dtype}-{recipe.base_weights}"
        name = f"{digest.removeprefix('sha256:')[:16]}-{held}-{recipe.max_image_side}.sqlite"
        self.path = directory / name
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=60)
            with self._connection:
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS logprobs (key TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID"
                )
        except (OSError, sqlite3.Error) as error:
            raise InputError(
                f"reference log-probs {self.path} cannot be used ({error}); remove them to have them computed again"
            ) from None

    def put(self, values: Mapping[str, float]) -> None:
        """Store all of `values`, or none; what is there already is kept."""
        with self._connection:
            self._connection.executemany("INSERT OR IGNORE INTO logprobs VALUES (?, ?)", values.items())

    def get(self, keys: Iterable[str]) -> dict[str, float]:
        """Those of `keys` that are there."""
        wanted = list(keys)
        found: dict[str, float] = {}
        for i in range(0, len(wanted), _MAX_VARIABLES):
            part = wanted[i : i + _MAX_VARIABLES]
            marks = ", ".join("?" * len(part))
            found.update(self._connection.execute(f"SELECT key, value FROM logprobs WHERE key IN ({marks})", part))  # noqa: S608 - only marks
        return found

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def attach_reference(
    trainer: PreferenceTrainer,
    recipe: TrainSection,
    directory: Path,
    digest: str,
    on_pairs: OnPairs,
    reference: PreferenceTrainer | None = None,
) -> None:
    """Give every row of `trainer` the reference's log-probs: found in `directory`, or computed now.

    The reference is the base of `trainer` or, where it is given, that of the trainer `reference`; `digest` is that base's.
    Several processes share the work; each must see `directory`. Raises ServerError for a log-prob that is no number.
    """
    with contextlib.closing(ReferenceCache(directory, digest, recipe)) as cache:
        for name in ("train_dataset", "eval_dataset"):
            if (rows := getattr(trainer, name)) is not None:
                setattr(trainer, name, _complete(reference or trainer, rows, recipe, cache, on_pairs))


def row_keys(rows: Dataset, processor: Processor, recipe: TrainSection) -> list[tuple[str, ...]]:
    """For each row a key for each of its kinds: chosen, rejected and, for mDPO, chosen with the corrupted image."""
    images = digest_images(rows)
    others = digest_images(rows, OTHER_IMAGES) if OTHER_IMAGES in rows.column_names else [None] * len(rows)
    keys = []
    for row, own, other in zip(rows.select_columns(list(COLUMNS[1:])), images, others, strict=True):
        pair = render_pair(row, processor)
        shown = [content_key(prompt=pair.prompt, text=text, images=own) for text in pair.rows]
        if recipe.method == "mdpo":
            corruption = [recipe.corruption, _CORRUPTION_VERSION, other]
            shown.append(content_key(prompt=pair.prompt, text=pair.chosen, images=own, corruption=corruption))
        keys.append(tuple(shown))
    return keys


def deal(batches: Sequence[int], rank: int, num_ranks: int) -> list[int]:
    """The rank's share of `batches`: as many as any other's, the last one of all more than once where they do not divide.

    Weights that are spread over the ranks are gathered by all of them together: one that computed less would be waited for.
    """
    rounds = math.ceil(len(batches) / num_ranks)
    return [batches[min(i * num_ranks + rank, len(batches) - 1)] for i in range(rounds)]


def _complete(
    trainer: PreferenceTrainer, rows: Dataset, recipe: TrainSection, cache: ReferenceCache, on_pairs: OnPairs
) -> Dataset:
    """`rows` with the columns of the reference, which is the base of `trainer`."""
    keys = row_keys(rows, trainer.processing_class, recipe)
    found = cache.get(key for kinds in keys for key in kinds)
    size, accelerator = trainer.args.per_device_eval_batch_size, trainer.accelerator
    owed = [i for i in range(0, len(rows), size) if any(k not in found for kinds in keys[i : i + size] for k in kinds)]
    accelerator.wait_for_everyone()  # a rank that looks after another has put would deal out other batches
    for done, begin in enumerate(deal(owed, accelerator.process_index, accelerator.num_processes)):
        on_pairs(done * size * accelerator.num_processes, len(owed) * size)
        batch = trainer.data_collator([rows[i] for i in range(begin, min(begin + size, len(rows)))])
        values = trainer.reference_logprobs(batch).T.tolist()
        if not all(math.isfinite(value) for row in values for value in row):
            raise ServerError(
                f"the reference's log-probs of the pairs from {begin} on are no numbers in {recipe.dtype}; train in a "
                "wider train.dtype, or see whether the base's weights are whole"
            )
        cache.put(
            {
                key: value
                for kinds, row in zip(keys[begin : begin + size], values, strict=True)
                for key, value in zip(kinds, row, strict=True)
            }
        )
    accelerator.wait_for_everyone()
    found = cache.get(key for kinds in keys for key in kinds)
    _log.info("reference log-probs of %d pairs, those of %d computed now: %s", len(rows), len(owed) * size, cache.path)
    for name, column in zip(REFERENCE_COLUMNS, zip(*keys, strict=True), strict=False):
        rows = rows.add_column(name, [found[key] for key in column])
    return rows
