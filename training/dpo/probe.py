"""The probe: fixed validation pairs, and how likely a Hugging Face model finds each token of their responses."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image as Pillow

from vcot.pipeline.errors import DataError
from vcot.training.dpo.rows import PairCollator, Row, check_pairs, load_pairs, read_messages, scale_images
from vcot.training.model.loading import Batch, Model, completion_logprobs
from vcot.training.model.template import Processor
from vcot.training.protocol.agreement import Answers, ProbePair, ProbeRow
from vcot.training.protocol.train_sections import TrainSection

NUM_PAIRS = 16
_BATCH_PAIRS, _BATCH_BYTES = 4, 2 * 2**30
"""At once, and fewer where the rows' float32 logits could take more than that; but one at least."""


@dataclass(frozen=True)
class ProbeQuestions:
    """The probe's pairs as a model is asked them, and as they are written down."""

    batches: tuple[Batch, ...]
    pairs: tuple[ProbePair, ...]


def load_questions(pairs: Path, processor: Processor, recipe: TrainSection) -> ProbeQuestions:
    """The first validation pairs, or training pairs where there are none. Raises DataError where no pair can be used."""
    for split in ("validation", "train"):
        rows = load_pairs(pairs / f"{split}.parquet")
        first = rows.select(range(min(len(rows), 2 * NUM_PAIRS)))
        kept, _ = check_pairs(first, processor, max_length=recipe.max_length, max_image_side=recipe.max_image_side)
        if len(kept):
            return _build(kept.select(range(min(len(kept), NUM_PAIRS))), processor, recipe)
    raise DataError(f"none of the first pairs in {pairs} can be used to compare; run `vcot pair` again")


def ask(model: Model, questions: ProbeQuestions) -> Answers:
    """How likely `model` finds the responses."""
    return Answers(
        tuple(
            logprobs[mask.bool()].double().numpy()
            for batch in questions.batches
            for logprobs, mask in _interleave(completion_logprobs(model, batch), batch["completion_mask"][:, 1:])
        )
    )


def _build(rows: Dataset, processor: Processor, recipe: TrainSection) -> ProbeQuestions:
    collate = PairCollator(processor, recipe.max_image_side)
    pair_bytes = 2 * recipe.max_length * len(processor.tokenizer) * 4
    size = max(1, min(_BATCH_PAIRS, _BATCH_BYTES // pair_bytes))
    batches, pairs = [], []
    for start in range(0, len(rows), size):
        chunk = [rows[index] for index in range(start, min(start + size, len(rows)))]
        batch = collate(chunk)
        batches.append(batch)
        tokens = [ids[mask.bool()].tolist() for ids, mask in _interleave(batch["input_ids"], batch["attention_mask"])]
        for row, chosen, rejected in zip(chunk, tokens[0::2], tokens[1::2], strict=True):
            pairs.append(_pair(row, recipe.max_image_side, chosen, rejected))
    return ProbeQuestions(tuple(batches), tuple(pairs))


def _interleave(*tensors: Any) -> Iterator[tuple[Any, ...]]:
    """Rows of a collated batch, whose chosen stand before all rejected, pair by pair."""
    num_pairs = len(tensors[0]) // 2
    for index in range(num_pairs):
        yield tuple(tensor[index] for tensor in tensors)
        yield tuple(tensor[num_pairs + index] for tensor in tensors)


def _pair(row: Row, max_image_side: int, chosen: Sequence[int], rejected: Sequence[int]) -> ProbePair:
    images = iter(scale_images(row, max_image_side))
    prompt = [
        {
            "role": message["role"],
            "content": [_image_part(next(images)) if part["type"] == "image" else part for part in message["content"]],
        }
        for message in read_messages(row["prompt"])
    ]
    texts = [
        "".join(part["text"] for part in read_messages(row[name])[-1]["content"]) for name in ("chosen", "rejected")
    ]
    return ProbePair(
        prompt=tuple(prompt),
        chosen=ProbeRow(text=texts[0], tokens=tuple(chosen)),
        rejected=ProbeRow(text=texts[1], tokens=tuple(rejected)),
    )


def _image_part(image: Pillow.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
