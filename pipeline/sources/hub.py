"""Data sets from the Hugging Face hub: one split at one revision, read with `datasets` (imported when first used).

Model: the split's Parquet files, and no other split's, are fetched into the hub's ordinary cache, where a later run finds
them without the network (`HF_HUB_OFFLINE=1`). A revision that is a commit pins every byte. Images stay encoded until they
are drawn: a data set of several gigabytes is memory-mapped, never held.

Limits: data sets that the hub keeps as `<split>-<shard>-of-<shards>...parquet`, in one folder. A
repository that holds several configurations is refused, since a recipe cannot name one of them.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vcot.pipeline.errors import DataError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.records import ImageRef, Split
from vcot.pipeline.sources.drafts import StoreImage

_REMEDY = "check the network, or set path to a copy of the official files"


@dataclass(frozen=True)
class HubRow:
    """A row of a data set: its number, its columns other than the image, and its images."""

    number: int
    columns: dict[str, Any]
    images: tuple[StoreImage, ...]


def hub_key(name: str, revision: str | None) -> str:
    """Which data: the name on the hub, and the revision where one is given."""
    return f"{name}@{revision}" if revision else name


def iterate_hub(
    name: str,
    revision: str | None,
    split: Split,
    image: str = "image",
    download: Callable[[str], bytes] | None = None,
) -> Iterator[HubRow]:
    """The rows of split `split` of hub data set `name`, with images as `iterate_table` has them. Raises DataError."""
    where = f"{name}, split {split}"
    data = open_table(
        "parquet", _fetch(name, revision, split), lambda error: _cannot_load(name, revision, split, error)
    )
    if image and image not in data.column_names:
        raise DataError(f"hub data set {name} has no column {image}, only {', '.join(data.column_names)}; set path")
    return iterate_table(data, image, where, Path(), download)


def open_table(
    kind: Literal["parquet", "json"], files: Sequence[Path], explain: Callable[[Exception], DataError]
) -> Any:
    """Files as a data set of `datasets`, memory-mapped. Raises what `explain` makes of an error."""
    # Heavy, and of no use to a run on official files.
    import datasets

    named = [glob.escape(str(path)) for path in files]  # datasets takes them for patterns
    try:
        with _without_bars():
            return datasets.load_dataset(kind, data_files={"rows": named}, split="rows")
    except StopIteration:  # of a file without a byte
        raise explain(EOFError("it is empty")) from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise explain(error.__cause__ if isinstance(error.__cause__, Exception) else error) from None


@contextmanager
def _without_bars() -> Iterator[None]:
    """The bars of `datasets` are not drawn among what a command says; whoever had them has them again."""
    import datasets

    are_shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if are_shown:
            datasets.enable_progress_bars()


def iterate_table(
    data: Any, image: str, where: str, folder: Path, download: Callable[[str], bytes] | None = None
) -> Iterator[HubRow]:
    """The rows of a data set with its column of images, one or a list of them in each row; an empty name for none.

    Paths are relative to `folder`; what is an address is downloaded, where that is allowed.
    """
    data = _leave_encoded(data, image) if image else data

    def image_of(number: int, place: int) -> StoreImage:
        def store_image(store: ImageStore) -> ImageRef:
            shown = data[number][image]
            one = shown[place] if isinstance(shown, list) else shown
            return _store(store, one, f"of row {number} of {where}", folder, download)

        return store_image

    for number, columns in _read_rows(data, where):
        shown = columns.pop(image) if image else None
        num_images = len(shown) if isinstance(shown, list) else int(shown is not None)
        yield HubRow(number, columns, tuple(image_of(number, place) for place in range(num_images)))


def _read_rows(data: Any, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows with their numbers, as they are drawn.

    Raises DataError for a text in another encoding, which Arrow reads and Python does not.
    """
    number = 0
    try:
        for columns in data:
            yield number, columns
            number += 1
    except UnicodeDecodeError as error:
        raise DataError(f"{where}, row {number} holds a text that is not UTF-8 ({error}); save it as UTF-8") from None


def _leave_encoded(data: Any, image: str) -> Any:
    """The data set with its column of images as they are stored."""
    import datasets

    feature = data.features[image]
    one = getattr(feature, "feature", feature)
    if isinstance(one, datasets.Value) and one.dtype in ("string", "null"):
        return data
    encoded = datasets.Image(decode=False)
    with _without_bars():
        return data.cast_column(image, encoded if one is feature else datasets.List(encoded))


def _fetch(name: str, revision: str | None, split: Split) -> list[Path]:
    """The split's files in the hub's cache, all of them. Raises DataError."""
    from huggingface_hub import snapshot_download

    patterns = [f"{split}-*.parquet", f"*/{split}-*.parquet"]
    try:
        folder = snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns)
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        raise _cannot_load(name, revision, split, error) from None
    files = sorted(Path(folder).rglob(f"{split}-*.parquet"))
    if lacking := _find_lack(files, split):
        raise _cannot_load(name, revision, split, lacking)
    return files


def _find_lack(files: Sequence[Path], split: Split) -> str | None:
    """What is missing of a split, or too much; a download that was broken off, or another split's, leaves a folder that
    looks whole.
    """
    if not files:
        return f"there is no {split}-*.parquet in it"
    if len(folders := sorted({path.parent.name for path in files})) > 1:
        return f"it has {split} in {' and '.join(folders)}, and nothing says which is meant"
    found = re.search(r"-of-(\d+)", files[0].name)
    if found is not None and len(files) != int(found[1]):
        return f"{len(files)} of its {int(found[1])} Parquet files are in the cache"
    return None


def _cannot_load(name: str, revision: str | None, split: Split, error: Exception | str) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"hub data set {hub_key(name, revision)}, split {split}, cannot be loaded ({reason}); {_REMEDY}")


def _store(
    store: ImageStore,
    image: dict[str, Any] | str | None,
    where: str,
    folder: Path,
    download: Callable[[str], bytes] | None,
) -> ImageRef:
    """An undecoded image: its bytes, or the path of a file."""
    if image is None:
        raise DataError(f"an image {where} is empty; correct the row or leave it out")
    if isinstance(image, dict) and image["bytes"] is not None:
        return store.put_bytes(image["bytes"], where=where)
    path = str(image["path"] if isinstance(image, dict) else image)
    if "://" in path and download is None:
        raise DataError(f"image {path} {where} is an address; set tasks.columns.allow_urls=true, or give a file's path")
    if "://" in path and download is not None:
        return store.put_bytes(download(path), where=f"{path} {where}")
    return store.put_file(folder / path)
