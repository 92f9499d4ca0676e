"""Preference pairs -> a Parquet data set that TRL and `datasets` read; data_card.py writes its card.

The columns are TRL's vision preference format (images, prompt, chosen, rejected as conversations) and, beside it, where
each row comes from. The folder is a hub data set as it is: `load_dataset(folder)` gives the two splits, with datasets 3
to 5.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcot.pipeline.files import replacing_folder
from vcot.pipeline.images import ImageStore
from vcot.pipeline.pairs import PreferencePair
from vcot.pipeline.public import public_name
from vcot.pipeline.records import canonical_json
from vcot.pipeline.stage import batched

if TYPE_CHECKING:
    import pyarrow
    from datasets import Features

_SPLITS = ("train", "validation")
_NOT_HASHED: Any = {"images": {"__all__": {"path"}}, "chosen_judgment": True, "rejected_judgment": True}
"""Of a row: where an image lies says nothing of the data, and a judgment's key follows from its response and judge."""
_ROW_GROUP = 256


@dataclass(frozen=True)
class SplitSize:
    """Of a split as written."""

    num_examples: int
    num_bytes: int
    """In memory, as Arrow holds it."""
    num_bytes_on_disk: int
    chosen_words: Sequence[int] = ()
    """How long each chosen response is."""
    rejected_words: Sequence[int] = ()


def pairs_digest(train: Iterable[PreferencePair], validation: Iterable[PreferencePair]) -> str:
    """SHA-256 of the rows of both splits, paths left out: the `content_key` of `rows=[train, validation]`, row by row."""
    digest = hashlib.sha256(b'{"rows":[[')
    _hash_rows(digest, train)
    digest.update(b"],[")
    _hash_rows(digest, validation)
    digest.update(b"]]}")
    return digest.hexdigest()


def _hash_rows(digest: hashlib._Hash, pairs: Iterable[PreferencePair]) -> None:
    for number, pair in enumerate(pairs):
        row = pair.model_dump(mode="json", exclude=_NOT_HASHED)
        if len(pair.images) == 1:  # as it is named since pairs had no other number of images
            row["image"] = row.pop("images")[0]
        digest.update(b"," * bool(number) + canonical_json(row))


def publish_pairs(
    train: Iterable[PreferencePair],
    validation: Iterable[PreferencePair],
    images: ImageStore,
    directory: Path,
    *,
    card: Callable[[Mapping[str, SplitSize]], str],
) -> None:
    """Write `train.parquet`, `validation.parquet` and `README.md` to `directory`, renamed into place when complete.

    `card` writes the last, from the splits' sizes.
    """
    if directory.is_dir():
        return
    with replacing_folder(directory) as folder:
        sizes = {
            name: _write_parquet(folder / f"{name}.parquet", pairs, images)
            for name, pairs in zip(_SPLITS, (train, validation), strict=True)
        }
        (folder / "README.md").write_text(card(sizes), "utf-8")


def _write_parquet(path: Path, pairs: Iterable[PreferencePair], images: ImageStore) -> SplitSize:
    """In row groups, so that memory holds one group's images only."""
    import pyarrow as pa  # with datasets, a second that `--help` need not pay
    import pyarrow.parquet as pq

    schema, num_bytes, chosen, rejected = _schema(), 0, array("I"), array("I")
    with pq.ParquetWriter(path, schema) as writer:
        for chunk in batched(pairs, _ROW_GROUP):
            table = pa.Table.from_pylist(list(_rows(chunk, images)), schema=schema)
            writer.write_table(table)
            num_bytes += table.nbytes
            chosen.extend(len(pair.chosen.split()) for pair in chunk)
            rejected.extend(len(pair.rejected.split()) for pair in chunk)
    return SplitSize(len(chosen), num_bytes, path.stat().st_size, chosen, rejected)


def _schema() -> pyarrow.Schema:
    """The columns' types, their features as every version of datasets reads them."""
    features = _features()
    metadata = {"info": {"features": _as_lists(features.to_dict())}}
    return features.arrow_schema.with_metadata({"huggingface": json.dumps(metadata)})


def _as_lists(feature: Any) -> Any:
    """Features as JSON, with a list as a list of one feature: datasets 3 does not know the type `List` of datasets 4."""
    if not isinstance(feature, dict):
        return feature
    if feature.get("_type") == "List":
        return [_as_lists(feature["feature"])]
    return {name: _as_lists(value) for name, value in feature.items()}


def _features() -> Features:
    from datasets import Features, Image, List, Value

    turn = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    text, score = Value("string"), Value("float64")
    return Features(
        images=List(Image()),
        prompt=turn,
        chosen=turn,
        rejected=turn,
        task=text,
        chosen_score=score,
        rejected_score=score,
        judge=text,
        policy=text,
        chosen_response=text,
        rejected_response=text,
        chosen_judgment=text,
        rejected_judgment=text,
    )


def _rows(pairs: Sequence[PreferencePair], images: ImageStore) -> Iterator[dict[str, Any]]:
    for pair in pairs:
        places = [{"type": "image", "text": None}] * len(pair.images)
        yield {
            "images": [{"bytes": data, "path": Path(ref.path).name} for ref, data in images.read_all(pair.images)],
            "prompt": [{"role": "user", "content": [*places, {"type": "text", "text": pair.prompt}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": pair.chosen}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": pair.rejected}]}],
            "task": pair.task,
            "chosen_score": pair.chosen_score,
            "rejected_score": pair.rejected_score,
            "judge": name_judge(pair.judge),
            "policy": pair.policy,
            "chosen_response": pair.chosen_key,
            "rejected_response": pair.rejected_key,
            "chosen_judgment": pair.chosen_judgment,
            "rejected_judgment": pair.rejected_judgment,
        }


def name_judge(judge: str) -> str:
    """A judge as others may know it: one that is a model by the last name of a path."""
    kind, colon, model = judge.partition(":")
    return kind + colon + public_name(model)
