"""Preference pairs as TRL's vision rows, with a preflight that looks at each one before any training time is spent.

The Parquet files hold `images` (encoded), `prompt`, `chosen` and `rejected` (message lists) and provenance; `datasets`
decodes the images. Prompt and completion are tokenized **together** and then split: TRL's own collator tokenizes them
apart, and a tokenizer that puts a space marker before a text then sees another first token than generation produces.
A row is never cut: one that cannot be trained whole is refused, with its task and the reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, Image, List
from datasets.table import InMemoryTable
from PIL import Image as Pillow

from pipeline.errors import DataError
from pipeline.recipe import Corruption
from training.corruption import OTHER_IMAGES, corrupt
from training.job import PairSummary
from training.models import Batch
from training.template import Messages, Processor, render

COLUMNS = ("images", "prompt", "chosen", "rejected")
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps", "ref_conditional_logps")
"""TRL's names of the reference's log-probs, and ours of the third; each one number a row, summed over the response."""
Row = Mapping[str, Any]


def load_pairs(path: Path) -> Dataset:
    """The rows of one Parquet file with their images decoded on access. Raises DataError naming the file."""
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:
        raise DataError(f"pairs {path} cannot be read ({error}); run `vcot pair` again") from None
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise DataError(f"pairs {path} have no column {missing[0]!r}; they need {', '.join(COLUMNS)}")
    features = Features({**Features.from_arrow_schema(table.schema), "images": List(Image())})
    try:
        return Dataset(InMemoryTable(table.cast(features.arrow_schema)))
    except (ValueError, NotImplementedError) as error:
        raise DataError(
            f"pairs {path}: images are no list of encoded images ({error}); run `vcot pair` again"
        ) from None


@dataclass(frozen=True)
class RenderedPair:
    """One pair as text: the prompt, and the whole row (prompt and completion) for each response."""

    prompt: str
    chosen: str
    rejected: str

    @property
    def rows(self) -> tuple[str, str]:
        """Chosen and rejected."""
        return self.chosen, self.rejected


def render_pair(row: Row, processor: Processor) -> RenderedPair:
    """The pair's text under the processor's chat template, without the white space that some templates write after EOS."""
    prompt, chosen, rejected = (read_messages(row[name]) for name in ("prompt", "chosen", "rejected"))
    return RenderedPair(
        prompt=render(processor, prompt, prompt=True),
        chosen=render(processor, (*prompt, *chosen)).rstrip(),
        rejected=render(processor, (*prompt, *rejected)).rstrip(),
    )


def scale_images(row: Row, max_side: int) -> list[Pillow.Image]:
    """The row's images, longer ones scaled down to `max_side` pixels with their shape kept."""
    images = []
    for image in row["images"] or ():
        if max(image.size) > max_side:
            image = image.copy()
            image.thumbnail((max_side, max_side), Pillow.Resampling.BICUBIC)
        images.append(image.convert("RGB"))
    return images


@dataclass(frozen=True)
class PairCollator:
    """Rows to a batch as TRL's DPOTrainer reads it: `input_ids`, `attention_mask` and `completion_mask` of shape
    (2 x rows, length), padded on the right, chosen rows first, and the processor's image tensors in the same order.

    With a corruption, the chosen rows come a third time, with corrupted images: (3 x rows, length). Reference log-probs
    that rows carry, one number each, go along.
    """

    processor: Processor
    max_image_side: int
    corruption: Corruption | None = None

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """The batch. Raises ValueError for a row that the preflight would refuse."""
        pairs = [render_pair(row, self.processor) for row in rows]
        images = [scale_images(row, self.max_image_side) for row in rows]
        texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        lengths = [
            _completion_length(pair.prompt, text, self.processor) for pair, text in zip(pairs * 2, texts, strict=True)
        ]
        images, shown = images * 2, images
        if self.corruption is not None:
            images += [self._corrupt(row, shown, self.corruption) for row, shown in zip(rows, shown, strict=True)]
            texts, lengths = texts + texts[: len(rows)], lengths + lengths[: len(rows)]
        batch = _process(self.processor, images, texts)
        position = batch["attention_mask"].cumsum(dim=1)
        begin = position[:, -1:] - torch.tensor(lengths).unsqueeze(1)
        batch["completion_mask"] = ((position > begin) & (batch["attention_mask"] == 1)).long()
        for name in REFERENCE_COLUMNS:
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch

    def _corrupt(self, row: Row, images: list[Pillow.Image], kind: Corruption) -> list[Pillow.Image]:
        return corrupt(images, kind, row.get(OTHER_IMAGES) or ())


def check_pairs(
    rows: Dataset, processor: Processor, *, max_length: int, max_image_side: int
) -> tuple[Dataset, PairSummary]:
    """The rows that can be trained whole, with only TRL's columns, and what was found. Nothing is cut."""
    kept: list[int] = []
    lengths: list[int] = []
    refused: list[tuple[str, str]] = []
    for index, row in enumerate(rows):
        length, fault = _inspect(row, processor, max_length, max_image_side)
        if fault is None:
            kept.append(index)
            lengths.append(length)
        else:
            refused.append((str(row.get("task", f"row {index}")), fault))
    summary = PairSummary(
        num_rows=len(rows),
        num_kept=len(kept),
        refused=tuple(refused),
        min_length=min(lengths, default=0),
        median_length=round(statistics.median(lengths)) if lengths else 0,
        max_length=max(lengths, default=0),
        example=render_pair(rows[kept[0]], processor).chosen if kept else "",
    )
    return rows.select(kept).select_columns(list(COLUMNS)), summary


def _inspect(row: Row, processor: Processor, max_length: int, max_image_side: int) -> tuple[int, str | None]:
    """The longer of the row's two lengths in tokens, image tokens included; and the reason to refuse it, if any."""
    fault = _content_fault(row, processor)
    if fault is not None:
        return 0, fault
    pair, images = render_pair(row, processor), scale_images(row, max_image_side)
    expected, sampled = _count_image_tokens(images, processor), _count_image_tokens(row["images"], processor)
    if expected != sampled:
        return 0, f"{expected} image tokens, but {sampled} when it was sampled; raise train.max_image_side"
    batch = _process(processor, [images, images], list(pair.rows))
    length = int(batch["attention_mask"].sum(dim=1).max())
    for text, ids, mask in zip(pair.rows, batch["input_ids"], batch["attention_mask"], strict=True):
        fault = _token_fault(pair.prompt, text, ids[mask == 1].tolist(), expected, processor)
        if fault is not None:
            return length, fault
    if length > max_length:
        return length, f"{length} tokens are more than train.max_length = {max_length}"
    return length, None


def _count_image_tokens(images: Sequence[Pillow.Image], processor: Processor) -> int:
    """What the processor announces: more for a larger image, where it does not scale all to one size."""
    announced = processor._get_num_multimodal_tokens(image_sizes=[image.size[::-1] for image in images])
    return sum(announced["num_image_tokens"])


def _content_fault(row: Row, processor: Processor) -> str | None:
    if not row["images"]:
        return "no image"
    messages = {name: read_messages(row[name]) for name in COLUMNS[1:]}
    if messages["chosen"] == messages["rejected"]:
        return "chosen and rejected are the same"
    placeholders = [part for message in messages["prompt"] for part in message["content"] if part["type"] == "image"]
    if len(placeholders) != len(row["images"]):
        return f"{len(row['images'])} image(s), but {len(placeholders)} image part(s) in the prompt"
    texts = [part.get("text", "") for turns in messages.values() for turn in turns for part in turn["content"]]
    markers = [marker for marker in processor.tokenizer.all_special_tokens if any(marker in text for text in texts)]
    return f"the special token {markers[0]} stands in the text" if markers else None


def _token_fault(prompt: str, text: str, ids: list[int], num_image_tokens: int, processor: Processor) -> str | None:
    """What is wrong with one whole row of token ids."""
    tokenizer = processor.tokenizer
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if (count := sum(i in processor.image_token_ids for i in ids)) != num_image_tokens:
        return f"{count} image tokens, but the processor announces {num_image_tokens}"
    if bos is not None and bos != eos and ids.count(bos) != 1:
        return f"{tokenizer.bos_token} occurs {ids.count(bos)} times"
    try:
        completion = ids[-_completion_length(prompt, text, processor) :]
    except ValueError as error:
        return str(error)
    if completion.count(eos) != 1:
        return f"the response holds {tokenizer.eos_token} {completion.count(eos)} times, where one must end it"
    return None


def _completion_length(prompt: str, text: str, processor: Processor) -> int:
    """Number of tokens of `text` after `prompt`; image tokens, all in the prompt, cancel out.

    Raises ValueError where the tokens of the whole do not begin with the prompt's, as generation would have them.
    """
    tokenizer = processor.tokenizer
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    if whole[: len(head)] != head or len(whole) == len(head):
        raise ValueError("prompt and response merge into other tokens than generation sees")
    return len(whole) - len(head)


def _process(processor: Processor, images: Sequence[Sequence[Pillow.Image]], texts: list[str]) -> Batch:
    """The processor's tensors; the template has written the special tokens already."""
    batch: Batch = processor(
        images=[list(group) for group in images],
        text=texts,
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_tensors="pt",
    )
    return dict(batch)


def read_messages(turns: Sequence[Mapping[str, Any]]) -> Messages:
    """Messages as written: Arrow gives every part every field, None where it has none, and templates see those."""
    return [
        {
            "role": turn["role"],
            "content": [{"type": "text", "text": turn["content"]}]
            if isinstance(turn["content"], str)
            else [{key: value for key, value in part.items() if value is not None} for part in turn["content"]],
        }
        for turn in turns
    ]
