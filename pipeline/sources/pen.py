"""Draws smooth figures: on a canvas of three times the size, averaged down. Nothing in it is random."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIZE = 336
"""Pixels, both sides: what LLaVA-1.5's tower sees."""
PAPER = (246, 244, 238)
_SCALE = 3
Colour = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class Pen:
    """Draws on an image of `SIZE`, in its coordinates: x to the right, y down."""

    draw: ImageDraw.ImageDraw

    def disc(
        self, x: float, y: float, radius: float, fill: Colour, outline: Colour | None = None, width: int = 4
    ) -> None:
        """A filled circle."""
        self.ellipse(x, y, radius, radius, fill, outline, width)

    def ellipse(
        self,
        x: float,
        y: float,
        across: float,
        down: float,
        fill: Colour,
        outline: Colour | None = None,
        width: int = 4,
    ) -> None:
        """A filled ellipse, by its half axes."""
        box = [_SCALE * value for value in (x - across, y - down, x + across, y + down)]
        self.draw.ellipse(box, fill, outline, _SCALE * width)

    def ring(self, x: float, y: float, radius: float, colour: Colour, width: int) -> None:
        """A circle that is not filled."""
        box = [_SCALE * value for value in (x - radius, y - radius, x + radius, y + radius)]
        self.draw.ellipse(box, None, colour, _SCALE * width)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Colour, radius: float = 0) -> None:
        """A filled rectangle, its corners rounded by `radius`."""
        box = [_SCALE * value for value in (left, top, right, bottom)]
        self.draw.rounded_rectangle(box, _SCALE * radius, fill)

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        """A filled polygon."""
        self.draw.polygon([(_SCALE * x, _SCALE * y) for x, y in points], fill)

    def line(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        """A line with round ends and joints."""
        scaled = [(_SCALE * x, _SCALE * y) for x, y in points]
        self.draw.line(scaled, colour, round(_SCALE * width))
        for x, y in points:
            self.disc(x, y, width / 2, colour)

    def text(self, x: float, y: float, words: str, size: float, colour: Colour) -> None:
        """Words around a point."""
        font = ImageFont.load_default(_SCALE * size)
        self.draw.text(
            (_SCALE * x, _SCALE * y), words, colour, font, anchor="mm", stroke_width=_SCALE, stroke_fill=colour
        )


Drawing = Callable[[Pen, str], None]
"""Draws a thing in a state."""


def render(drawing: Drawing, state: str) -> Image.Image:
    """The thing in this state, as an RGB image of `SIZE`."""
    image = Image.new("RGB", (_SCALE * SIZE, _SCALE * SIZE), PAPER)
    drawing(Pen(ImageDraw.Draw(image)), state)
    return image.reduce(_SCALE)


def around(x: float, y: float, radius: float, turn: float) -> Point:
    """The point at `turn` (a share of a full turn, clockwise from the top) of a circle."""
    return x + radius * math.sin(2 * math.pi * turn), y - radius * math.cos(2 * math.pi * turn)
