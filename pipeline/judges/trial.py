"""What a judge that is a model is tried on, before it is paid for more: a red disc, a question, and a response to it."""

from __future__ import annotations

import io

from vcot.pipeline.records import ImageRef, Task

_TEST_SIZE = (640, 480)
TEST_TASK = Task(
    id="test",
    question="What colour is the disc in the middle of the image?",
    choices=("red", "blue", "green", "yellow"),
    answer=0,
    source="test",
    split="train",
)
TEST_RESPONSE = (
    "The image shows a single disc on a plain white background. The disc is in the middle, and nothing else is there to "
    "compare it with. Its colour is even, without a pattern or a shadow. Draft: the disc is red, so the option that says "
    "red is right. Evaluation: blue, green and yellow do not fit what the image shows, and the draft answers what was "
    "asked, so it stands.\n<R> The disc is red. The answer is (A) red."
)
TEST_IMAGE = ImageRef(sha256="", path="test.png", width=_TEST_SIZE[0], height=_TEST_SIZE[1])


def draw_test_image() -> bytes:
    """A red disc, as PNG: as many pixels as a photo has, in few bytes."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", _TEST_SIZE, "white")
    ImageDraw.Draw(image).ellipse((220, 140, 420, 340), fill="red")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
