"""Preference pairs -> a Parquet data set that TRL and `datasets` read, with its card.

The columns are TRL's vision preference format (images, prompt, chosen, rejected as conversations) and, beside it, where
each row comes from. The folder is a hub data set as it is: `load_dataset(folder)` gives the two splits, with datasets 3
to 5.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.images import ImageStore
from pipeline.markdown import plain
from pipeline.pairs import Couple
from pipeline.recipe import Recipe, public_name, render_recipe
from pipeline.records import PreferencePair, StageCount, canonical_json
from pipeline.sections import TasksSection
from pipeline.sources.source import SOURCES, Source
from pipeline.stage import batched

if TYPE_CHECKING:
    import pyarrow
    from datasets import Features

_SPLITS = ("train", "validation")
_SIZES = (1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")
"""The hub's size categories, below each number of rows."""
_TURNS = """
    list:
    - name: role
      dtype: string
    - name: content
      list:
      - name: type
        dtype: string
      - name: text
        dtype: string"""
_FEATURES = f"""
  - name: images
    list: image
  - name: prompt{_TURNS}
  - name: chosen{_TURNS}
  - name: rejected{_TURNS}
  - name: task
    dtype: string
  - name: chosen_score
    dtype: float64
  - name: rejected_score
    dtype: float64
  - name: judge
    dtype: string
  - name: policy
    dtype: string
  - name: chosen_response
    dtype: string
  - name: rejected_response
    dtype: string
  - name: chosen_judgment
    dtype: string
  - name: rejected_judgment
    dtype: string
""".strip("\n")
"""The columns in the card, as datasets 3 to 5 read them."""
_NOT_HASHED: Any = {"image": {"path"}, "chosen_judgment": True, "rejected_judgment": True}
"""Of a row: where an image lies says nothing of the data, and a judgment's key follows from its response and judge."""
_ROW_GROUP = 256


@dataclass(frozen=True)
class SplitSize:
    """Of a split as written."""

    num_examples: int
    num_bytes: int
    """In memory, as Arrow holds it."""
    num_bytes_on_disk: int


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
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    sizes = {
        name: _write_parquet(partial / f"{name}.parquet", pairs, images)
        for name, pairs in zip(_SPLITS, (train, validation), strict=True)
    }
    (partial / "README.md").write_text(card(sizes), "utf-8")
    partial.replace(directory)


def _write_parquet(path: Path, pairs: Iterable[PreferencePair], images: ImageStore) -> SplitSize:
    """In row groups, so that memory holds one group's images only."""
    import pyarrow as pa  # with datasets, a second that `--help` need not pay
    import pyarrow.parquet as pq

    schema, num_examples, num_bytes = _schema(), 0, 0
    with pq.ParquetWriter(path, schema) as writer:
        for chunk in batched(pairs, _ROW_GROUP):
            table = pa.Table.from_pylist(list(_rows(chunk, images)), schema=schema)
            writer.write_table(table)
            num_examples += len(chunk)
            num_bytes += table.nbytes
    return SplitSize(num_examples, num_bytes, path.stat().st_size)


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
        yield {
            "images": [{"bytes": images.read(pair.image), "path": Path(pair.image.path).name}],
            "prompt": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": pair.prompt}]}
            ],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": pair.chosen}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": pair.rejected}]}],
            "task": pair.task,
            "chosen_score": pair.chosen_score,
            "rejected_score": pair.rejected_score,
            "judge": _name_judge(pair.judge),
            "policy": pair.policy,
            "chosen_response": pair.chosen_key,
            "rejected_response": pair.rejected_key,
            "chosen_judgment": pair.chosen_judgment,
            "rejected_judgment": pair.rejected_judgment,
        }


def render_card(
    train: Sequence[Couple],
    validation: Sequence[Couple],
    sizes: Mapping[str, SplitSize],
    *,
    recipe: Recipe,
    model: str,
    judged: StageCount,
    paired: StageCount,
) -> str:
    """The data card: what the rows are, where they come from, what is not among them, and the recipe.

    Left out of the recipe are the settings of the machine that they were made on.
    """
    pairs = [*train, *validation]
    size = next((name for limit, name in _SIZES if len(pairs) < limit), "1M<n<10M")
    source = SOURCES.resolve(recipe.tasks.source)
    gap = sum(pair.chosen_score - pair.rejected_score for pair in pairs) / len(pairs)
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: train.parquet
  - split: validation
    path: validation.parquet
dataset_info:
  features:
{_FEATURES}
{_render_sizes(sizes)}
{source.licence}
language:
- en
size_categories:
- {size}
task_categories:
- visual-question-answering
{_render_origin(source)}tags:
- preference
- dpo
- trl
- vcot
---
# Preference pairs from AI feedback

{len(train)} training and {len(validation)} validation pairs; no image is in both. Each row holds the best and the worst
of several sampled chains of thought on one question; ties are left out.

| | |
|---|---|
| questions | {recipe.tasks.source}{_say_hint(source, recipe.tasks)} |
| sampled from | {plain(public_name(model))} ({pairs[0].policy}) |
| judge | {plain(_name_judge(pairs[0].judge))} |
| responses judged | {judged.ok:,} of {judged.requested:,}{plain(_why(judged))} |
| questions that gave a pair | {paired.ok:,} of {paired.requested:,}{plain(_why(paired))} |
| mean score gap | {gap:.3f} |

Columns: `images, prompt, chosen, rejected` as TRL's vision preference format takes them; `task, chosen_score,
rejected_score, judge, policy` say where a row comes from. The images and questions keep the licence of their source.

## Recipe

```toml
{render_recipe(recipe, public=True).strip()}
```
"""


def _say_hint(source: Source, section: TasksSection) -> str:
    if not source.has_hints:
        return ""
    return ", each after its hint" if section.hint else ", without their hints"


def _why(count: StageCount) -> str:
    return f"; the others: {count.by_reason}" if count.reasons else ""


def _name_judge(judge: str) -> str:
    """A judge as others may know it: one that is a model by the last name of a path."""
    kind, colon, model = judge.partition(":")
    return kind + colon + public_name(model)


def _render_sizes(sizes: Mapping[str, SplitSize]) -> str:
    """The splits as `dataset_info` of the hub's cards has them."""
    lines = ["  splits:"]
    for name, size in sizes.items():
        lines += [f"  - name: {name}", f"    num_bytes: {size.num_bytes}", f"    num_examples: {size.num_examples}"]
    lines.append(f"  download_size: {sum(size.num_bytes_on_disk for size in sizes.values())}")
    lines.append(f"  dataset_size: {sum(size.num_bytes for size in sizes.values())}")
    return "\n".join(lines)


def _render_origin(source: Source) -> str:
    return f"source_datasets:\n- {source.hub_name}\n" if source.hub_name else ""
