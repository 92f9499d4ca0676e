"""Corrupted images for mDPO's conditional preference (Wang et al. 2024, section 3.2): the response that the true image
explains must be preferred to the same response to an image that says less.

    crop         a random part of the image, 1 to 20 % of its area with sides in a ratio of 3:4 to 4:3, scaled back to its
                 size: torchvision's RandomResizedCrop(scale=(0.01, 0.2)), as the authors' code (luka-group/mDPO) has it
    blank        one grey
    noise        each value of each pixel drawn evenly
    other_image  the image of another row, scaled to this one's size

The size is kept, so that prompts keep their number of image tokens. The authors' code draws a new crop in each forward
(of the policy and of the reference, apart), after preprocessing; here it is drawn **once for each row**, from its images
alone, before preprocessing: the reference's log-prob of it can then be cached, and policy and reference see the same.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence

import numpy as np
from datasets import Dataset, concatenate_datasets
from PIL import Image as Pillow

from vcot.pipeline.errors import DataError
from vcot.training.protocol.train_sections import Corruption

OTHER_IMAGES = "other_images"
"""The column of `add_other_images`."""
_AREA = (0.01, 0.2)
_RATIO = (3 / 4, 4 / 3)
_GREY = (127, 127, 127)


def corrupt(
    images: Sequence[Pillow.Image], kind: Corruption, others: Sequence[Pillow.Image] = ()
) -> list[Pillow.Image]:
    """The RGB `images`, corrupted, each in its own size; `others` are another row's, for `other_image`."""
    if kind == "other_image":
        return [others[i % len(others)].convert("RGB").resize(image.size) for i, image in enumerate(images)]
    return [_corrupt_alone(image, kind) for image in images]


def _corrupt_alone(image: Pillow.Image, kind: Corruption) -> Pillow.Image:
    if kind == "blank":
        return Pillow.new("RGB", image.size, _GREY)
    seed = int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], "big")
    if kind == "crop":
        return image.resize(image.size, Pillow.Resampling.BILINEAR, box=draw_crop(*image.size, random.Random(seed)))
    noise = np.random.default_rng(seed).integers(0, 256, (image.height, image.width, 3), dtype=np.uint8)
    return Pillow.fromarray(noise)


def draw_crop(width: int, height: int, generator: random.Random) -> tuple[int, int, int, int]:
    """Left, upper, right and lower edge of a random part, at least one pixel wide and high."""
    area = width * height * generator.uniform(*_AREA)
    ratio = math.exp(generator.uniform(*map(math.log, _RATIO)))
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    left, upper = generator.randint(0, width - w), generator.randint(0, height - h)
    return left, upper, left + w, upper + h


def add_other_images(rows: Dataset) -> Dataset:
    """`rows` with the images of the next row, in their order, that has others. Raises DataError where none has."""
    digests = [str(images) for images in digest_images(rows)]
    others = []
    for i, own in enumerate(digests):
        other = next((j % len(rows) for j in range(i + 1, i + len(rows)) if digests[j % len(rows)] != own), None)
        if other is None:
            raise DataError("train.corruption = other_image needs pairs with different images; all have the same")
        others.append(other)
    column = rows.select(others).select_columns(["images"]).rename_column("images", OTHER_IMAGES)
    return concatenate_datasets([rows, column], axis=1)


def digest_images(rows: Dataset, column: str = "images") -> list[list[str]]:
    """SHA-256 of each row's images as they are stored; nothing is decoded."""
    stored = rows.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    return [[_digest(image) for image in images] for images in stored]


def _digest(image: dict[str, bytes | str | None]) -> str:
    content = image["bytes"]
    if not isinstance(content, bytes):
        with open(str(image["path"]), "rb") as file:  # noqa: PTH123
            content = file.read()
    return hashlib.sha256(content).hexdigest()
