"""Preference pairs as TRL's vision rows, with a preflight that looks at each one before any training time is spent.

The Parquet files hold `images` (encoded), `prompt`, `chosen` and `rejected` (message lists) and provenance; `datasets`
decodes the images. Prompt and completion are tokenized **together** and then split: TRL's own collator tokenizes them
apart, and a tokenizer that puts a space marker before a text then sees another first token than generation produces.
A row is never cut: one that cannot be trained whole is refused, with its task and the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, Image, List
from datasets.table import InMemoryTable
from PIL import Image as Pillow

from vcot.pipeline.errors import DataError
from vcot.training.dpo.corruption import OTHER_IMAGES, corrupt
from vcot.training.model.loading import Batch
from vcot.training.model.template import Messages, Processor, render
from vcot.training.protocol.job import PairSummary
from vcot.training.protocol.train_sections import Corruption

COLUMNS = ("images", "prompt", "chosen", "rejected")
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps", "ref_conditional_logps")
"""TRL's names of the reference's log-probs, and ours of the third; each one number a row, summed over the response."""
Row = Mapping[str, Any]
OnRow = Callable[[], None]


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
        lengths = self._completion_lengths([pair.prompt for pair in pairs], texts)
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

    def _completion_lengths(self, prompts: list[str], texts: list[str]) -> list[int]:
        """In tokens, of each of `texts`, which begin with `prompts`, over and over."""
        ids = self.processor.tokenizer([*prompts, *texts], add_special_tokens=False)["input_ids"]
        return [_completion_length(ids[i % len(prompts)], whole) for i, whole in enumerate(ids[len(prompts) :])]

    def _corrupt(self, row: Row, images: list[Pillow.Image], kind: Corruption) -> list[Pillow.Image]:
        return corrupt(images, kind, row.get(OTHER_IMAGES) or ())


def check_pairs(
    rows: Dataset,
    processor: Processor,
    on_row: OnRow = lambda: None,
    /,
    *,
    max_length: int,
    max_image_side: int,
    needs_image: bool = False,
) -> tuple[Dataset, PairSummary]:
    """The rows that can be trained whole, with only TRL's columns, and what was found. Nothing is cut.

    `needs_image` refuses rows without one, which mDPO could not corrupt; `on_row` is called after each row.
    """
    inspector = _Inspector(processor, max_length, max_image_side, needs_image=needs_image)
    lengths: dict[int, int] = {}
    refused: dict[int, tuple[str, str]] = {}
    for index in range(len(rows)):
        task, length, fault = inspector.look_at(rows, index)
        if fault is None:
            lengths[index] = length
        else:
            refused[index] = (task, fault)
        on_row()
    summary = PairSummary(
        num_rows=len(rows),
        num_kept=len(lengths),
        refused=tuple(refused.values()),
        refused_rows=tuple(refused),
        max_length=max(lengths.values(), default=0),
        example=render_pair(rows[next(iter(lengths))], processor).chosen if lengths else "",
    )
    return keep_rows(rows, summary), summary


def keep_rows(rows: Dataset, found: PairSummary) -> Dataset:
    """The rows that `found` does not refuse, with only TRL's columns."""
    refused = set(found.refused_rows)
    return rows.select([index for index in range(len(rows)) if index not in refused]).select_columns(list(COLUMNS))


@dataclass
class _Inspector:
    """Looks at rows one by one. How many tokens images add depends on their sizes only: the first row of each size goes
    through the real processor, and the others are counted by it. Mutated by `look_at`, which remembers sizes.
    """

    processor: Processor
    max_length: int
    max_image_side: int
    needs_image: bool
    _added: dict[tuple[tuple[int, int], ...], int] = field(default_factory=dict)

    def look_at(self, rows: Sequence[Row], index: int) -> tuple[str, int, str | None]:
        """The row's task, the longer of its two lengths in tokens (image tokens included), and why to refuse it, if so."""
        try:
            row = rows[index]
        except OSError as error:
            return f"row {index}", 0, f"an image cannot be read ({error})"
        task = str(row.get("task", f"row {index}"))
        try:
            length = self._measure(row)
        except ValueError as fault:
            return task, 0, str(fault)
        if length > self.max_length:
            return task, length, f"{length} tokens are more than train.max_length = {self.max_length}"
        return task, length, None

    def _measure(self, row: Row) -> int:
        """The length. Raises ValueError with the fault of a row that cannot be trained."""
        _check_content(row, self.processor)
        if self.needs_image and not row["images"]:
            raise ValueError("no image, and train.method = mdpo trains on pairs with one; leave it out, or take dpo")
        pair, images = render_pair(row, self.processor), scale_images(row, self.max_image_side)
        expected, sampled = (_count_image_tokens(shown, self.processor) for shown in (images, row["images"] or ()))
        if expected != sampled:
            raise ValueError(f"{expected} image tokens, but {sampled} when it was sampled; raise train.max_image_side")
        prompt = _tokenize(pair.prompt, self.processor)
        texts = [_tokenize(text, self.processor) for text in pair.rows]
        for text in texts:
            _check_tokens(prompt, text, len(images), self.processor)
        if texts[0] == texts[1]:
            raise ValueError("chosen and rejected are the same tokens")
        sizes = tuple(image.size for image in images)
        if sizes not in self._added:
            self._added[sizes] = _count_added(pair.chosen, texts[0], images, self.processor)
        return max(map(len, texts)) + self._added[sizes]


def _count_added(text: str, ids: list[int], images: Sequence[Pillow.Image], processor: Processor) -> int:
    """How many tokens the processor makes of `text` with `images` beyond those in `ids`. Raises ValueError where it
    makes another number of image tokens than it announces.
    """
    whole: list[int] = _process(processor, [images], [text])["input_ids"][0].tolist()
    announced = _count_image_tokens(images, processor)
    if (count := sum(i in processor.image_token_ids for i in whole)) != announced:
        raise ValueError(f"{count} image tokens, but the processor announces {announced}")
    return len(whole) - len(ids)


def _count_image_tokens(images: Sequence[Pillow.Image], processor: Processor) -> int:
    """What the processor announces: more for a larger image, where it does not scale all to one size."""
    if not images:
        return 0
    announced = processor._get_num_multimodal_tokens(image_sizes=[image.size[::-1] for image in images])
    return sum(announced["num_image_tokens"])


def _check_content(row: Row, processor: Processor) -> None:
    """Raise ValueError where the row's columns do not make a pair."""
    images = row["images"] or ()
    messages = {name: read_messages(row[name]) for name in COLUMNS[1:]}
    if messages["chosen"] == messages["rejected"]:
        raise ValueError("chosen and rejected are the same")
    placeholders = [part for message in messages["prompt"] for part in message["content"] if part["type"] == "image"]
    if len(placeholders) != len(images):
        raise ValueError(f"{len(images)} image(s), but {len(placeholders)} image part(s) in the prompt")
    texts = [part.get("text", "") for turns in messages.values() for turn in turns for part in turn["content"]]
    markers = [marker for marker in processor.tokenizer.all_special_tokens if any(marker in text for text in texts)]
    if markers:
        raise ValueError(f"the special token {markers[0]} stands in the text")


def _check_tokens(prompt: list[int], text: list[int], num_images: int, processor: Processor) -> None:
    """Raise ValueError where one whole row's tokens, its images still one placeholder each, cannot be trained."""
    tokenizer = processor.tokenizer
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if (count := text.count(processor.image_token_id)) != num_images:
        raise ValueError(f"the template writes {count} image placeholder(s) for {num_images} image(s)")
    if bos is not None and bos != eos and text.count(bos) != 1:
        raise ValueError(f"{tokenizer.bos_token} occurs {text.count(bos)} times")
    if (ends := text[-_completion_length(prompt, text) :].count(eos)) != 1:
        raise ValueError(f"the response holds {tokenizer.eos_token} {ends} times, where one must end it")


def _tokenize(text: str, processor: Processor) -> list[int]:
    """Token ids; the template has written the special tokens already, and each image is one placeholder."""
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _completion_length(prompt: list[int], whole: list[int]) -> int:
    """Number of tokens of `whole` after `prompt`; image tokens, all in the prompt, cancel out.

    Raises ValueError where the tokens of the whole do not begin with the prompt's, as generation would have them.
    """
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise ValueError("prompt and response merge into other tokens than generation sees")
    return len(whole) - len(prompt)


def _process(processor: Processor, images: Sequence[Sequence[Pillow.Image]], texts: list[str]) -> Batch:
    """The processor's tensors; the template has written the special tokens already."""
    batch: Batch = processor(
        images=[list(group) for group in images] if any(images) else None,
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
