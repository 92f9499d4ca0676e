"""Data sets from the Hugging Face hub, read with `datasets` (imported when first used: it takes a second).

Images stay encoded until they are drawn: a data set of several gigabytes is memory-mapped, never held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.images import ImageStore
from pipeline.records import ImageRef, Split
from pipeline.sources.drafts import StoreImage


@dataclass(frozen=True)
class HubRow:
    """A row of a hub data set: its number in the split, its columns other than the image, and its image."""

    number: int
    columns: dict[str, Any]
    store_image: StoreImage | None
    """None where the row has no image."""


def iterate_hub(name: str, split: Split) -> Iterator[HubRow]:
    """The rows of split `split` of hub data set `name`. Raises DataError where it cannot be loaded."""
    # Heavy, and of no use to a run on local files.
    import datasets

    try:
        data = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"hub data set {name}, split {split}, cannot be loaded ({reason}); "
            "check the network, or set path to a copy of the official files"
        ) from None
    if "image" not in data.column_names:
        raise DataError(f"hub data set {name} has no column image, only {', '.join(data.column_names)}; set path")
    data = data.cast_column("image", datasets.Image(decode=False))

    def image_of(number: int) -> StoreImage:
        return lambda store: _store(store, data[number]["image"], f"of row {number} of {name}, split {split}")

    for number, columns in enumerate(data):
        image = columns.pop("image")
        yield HubRow(number, columns, None if image is None else image_of(number))


def _store(store: ImageStore, image: dict[str, Any], where: str) -> ImageRef:
    """An undecoded image: its bytes, or the path of a file in the hub's cache."""
    if image["bytes"] is not None:
        return store.put_bytes(image["bytes"], where=where)
    return store.put_file(Path(image["path"]))
