"""Images and scores for lmms-eval's task of the questions; run by its own Python, not by ours."""

import re

from PIL import Image


def read_image(row: dict[str, str]) -> list[Image.Image]:
    """Of a file's name."""
    return [Image.open(row["image"]).convert("RGB")]


def score(row: dict[str, str], results: list[str]) -> dict[str, float]:
    """1 for the right letter."""
    found = re.search(r"The answer is \(?([A-Z])", results[0])
    return {"accuracy": float(found is not None and found[1] == row["target"])}
