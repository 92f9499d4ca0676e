"""Corrupted images keep their size, say less, and are the same whenever they are drawn."""

from __future__ import annotations

import random
from typing import get_args

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List
from PIL import Image as Pillow

from vcot.pipeline.errors import DataError
from vcot.training.dpo.corruption import OTHER_IMAGES, add_other_images, corrupt, draw_crop
from vcot.training.protocol.train_sections import Corruption


def picture(seed, size=(60, 40)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Pillow.fromarray(pixels)


@pytest.mark.parametrize("kind", get_args(Corruption))
def test_same_size_other_pixels_no_new_draw(kind):
    image, other = picture(0), picture(1, (20, 20))
    (first,), (again,) = (corrupt([image], kind, [other]) for _ in range(2))
    assert (first.size, first.mode) == (image.size, "RGB")
    assert first.tobytes() == again.tobytes() != image.tobytes()
    if kind in ("crop", "noise"):
        assert corrupt([picture(2)], kind)[0].tobytes() != first.tobytes()


def test_crop_keeps_one_to_twenty_percent():
    generator = random.Random(0)
    crops = [draw_crop(336, 336, generator) for _ in range(500)]
    shares = [(right - left) * (lower - upper) / 336**2 for left, upper, right, lower in crops]
    assert 0.009 < min(shares) < 0.02 < 0.19 < max(shares) < 0.205
    ratios = [(right - left) / (lower - upper) for left, upper, right, lower in crops]
    assert 0.7 < min(ratios) < 1 < max(ratios) < 1.4
    assert all(0 <= left < right <= 336 and 0 <= upper < lower <= 336 for left, upper, right, lower in crops)
    assert len({(left, upper) for left, upper, *_ in crops}) > 400


def test_crop_of_a_tiny_image():
    left, upper, right, lower = draw_crop(2, 2, random.Random(0))
    assert (right - left, lower - upper) == (1, 1)


def rows_of(*images):
    rows = {"images": [[image] for image in images], "prompt": [str(i) for i in range(len(images))]}
    return Dataset.from_dict(
        rows, features=Features({**Dataset.from_dict({"prompt": ["x"]}).features, "images": List(Image())})
    )


def test_other_images_are_never_the_rows_own():
    a, b = picture(0), picture(1)
    rows = add_other_images(rows_of(a, a, b))
    shown = [row[OTHER_IMAGES][0].tobytes() for row in rows]
    assert shown == [b.tobytes(), b.tobytes(), a.tobytes()]
    assert [row["prompt"] for row in rows] == ["0", "1", "2"]


def test_one_image_has_no_other():
    with pytest.raises(DataError, match="all have the same"):
        add_other_images(rows_of(picture(0), picture(0)))
