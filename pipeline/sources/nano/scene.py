"""Scenes of the nano world: what can be in one, how it is drawn, and everything that is true of it.

A scene has four cells (a 2 x 2 grid) and is drawn on 56 x 56 pixels, so that a vision tower with patches of 28 sees
each cell as one patch. There are four kinds: coloured shapes, a market (goods with their price in coins), a map
(coloured lands, one with the capital) and coloured letters. Statements about a scene have a closed grammar, so that a
program can list every true one. "Left of", "above" and so on mean the direct neighbour.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

from vcot.pipeline.records import Split

IMAGE_SIZE = 56
"""Pixels, both sides."""
CELL = IMAGE_SIZE // 2

SceneKind = Literal["shapes", "market", "map", "letters"]
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("no", "one", "two", "three", "four")
COLOUR_PAIRS = (("red", "orange"), ("blue", "purple"), ("green", "yellow"))
SHAPE_PAIRS = (("circle", "ring"), ("square", "diamond"), ("star", "cross"))
LETTER_PAIRS = (("C", "G"), ("E", "F"), ("O", "Q"), ("M", "N"), ("U", "V"), ("A", "R"), ("I", "T"))
GOODS = ("fish", "bread", "apple", "lamp", "key", "hat")
VOWELS = ("A", "E", "I", "O", "U")
COLOURS = tuple(colour for pair in COLOUR_PAIRS for colour in pair)
SHAPES = tuple(shape for pair in SHAPE_PAIRS for shape in pair)
LETTERS = tuple(sorted(letter for pair in LETTER_PAIRS for letter in pair))
CHOICE_WORDS = (*COLOURS, *SHAPES, *GOODS, *LETTERS, *NUMBERS[1:])
"""Every word that can be an option of a question."""
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}

_RGB = {
    "red": (205, 30, 40),
    "orange": (240, 135, 20),
    "blue": (35, 80, 205),
    "purple": (135, 45, 165),
    "green": (30, 145, 60),
    "yellow": (235, 205, 40),
}
_GLYPHS = {
    "A": ".###. #...# #...# ##### #...# #...# #...#",
    "C": ".#### #.... #.... #.... #.... #.... .####",
    "E": "##### #.... #.... ####. #.... #.... #####",
    "F": "##### #.... #.... ####. #.... #.... #....",
    "G": ".#### #.... #.... #..## #...# #...# .####",
    "I": "##### ..#.. ..#.. ..#.. ..#.. ..#.. #####",
    "M": "#...# ##.## #.#.# #...# #...# #...# #...#",
    "N": "#...# ##..# #.#.# #.#.# #..## #...# #...#",
    "O": ".###. #...# #...# #...# #...# #...# .###.",
    "Q": ".###. #...# #...# #...# #.#.# #..#. .##.#",
    "R": "####. #...# #...# ####. #.#.. #..#. #...#",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "U": "#...# #...# #...# #...# #...# #...# .###.",
    "V": "#...# #...# #...# #...# #...# .#.#. ..#..",
    "fish": "........ ..###..# .#####.# #.###### ######## .#####.# ..###..# ........",
    "bread": "........ .######. ######## #.##.##. #.##.##. ######## ######## ........",
    "apple": "....#... ...#.... .##.###. ######## ######## ######## .######. ..####..",
    "lamp": "..####.. ..#..#.. .#....#. .######. ...##... ...##... ...##... .######.",
    "key": ".###.... #...#... #...#### #...#### .###..## .......# ........ ........",
    "hat": "........ ..####.. ..####.. ..####.. ..####.. ######## ........ ........",
}


@dataclass(frozen=True)
class Cell:
    """What stands in one cell. `thing` is a shape, good, letter or "land"; `count` is a price, or 1 for the capital."""

    thing: str
    colour: str = ""
    count: int = 0


@dataclass(frozen=True)
class Scene:
    """Four cells in reading order; None is an empty one."""

    kind: SceneKind
    cells: tuple[Cell | None, ...]

    def things(self) -> Iterator[tuple[int, Cell]]:
        """The cells that are not empty, with their positions."""
        return ((i, cell) for i, cell in enumerate(self.cells) if cell is not None)

    def find(self, thing: str) -> int:
        """Position of the first `thing`; raises StopIteration where there is none."""
        return next(i for i, cell in self.things() if cell.thing == thing)

    def row_count(self, thing: str, row: int) -> int:
        """How many of `thing` stand in row 0 (top) or 1 (bottom)."""
        return sum(cell is not None and cell.thing == thing for cell in self.cells[2 * row : 2 * row + 2])


def assign_split(scene: Scene) -> Split:
    """The one split that may show `scene`: 70 % train, 15 % validation, 15 % test.

    Decided by what stands where and not by colours (a map's lands have nothing else), so images of two splits always
    differ by more than jitter or a colour.
    """
    is_map = scene.kind == "map"
    form = [(cell.thing, cell.count, cell.colour if is_map else "") if cell else None for cell in scene.cells]
    bucket = int.from_bytes(hashlib.sha256(repr((scene.kind, form)).encode()).digest()[:4]) % 100
    if bucket < 70:
        return "train"
    return "validation" if bucket < 85 else "test"


def list_facts(scene: Scene) -> tuple[str, ...]:
    """Every true statement of the grammar, each a sentence with its full stop, without repeats."""
    match scene.kind:
        case "shapes":
            facts = [*_place_facts(scene), *_colour_facts(scene), *_count_facts(scene), *_neighbour_facts(scene)]
        case "market":
            facts = [*_place_facts(scene), *_price_facts(scene)]
        case "map":
            facts = list(_map_facts(scene))
        case "letters":
            facts = list(_letter_facts(scene))
    return tuple(dict.fromkeys(facts))


def _place_facts(scene: Scene) -> Iterator[str]:
    return (f"The {cell.thing} is at the {POSITIONS[i]}." for i, cell in scene.things())


def _colour_facts(scene: Scene) -> Iterator[str]:
    return (f"The {cell.thing} is {cell.colour}." for _, cell in scene.things())


def _count_facts(scene: Scene) -> Iterator[str]:
    for shape in SHAPES:
        counts = [scene.row_count(shape, row) for row in (0, 1)]
        for row, count in zip(("top", "bottom"), counts, strict=True):
            yield f"The {row} row has {name_count(count, shape)}."
        yield f"There {'is' if sum(counts) == 1 else 'are'} {name_count(sum(counts), shape)}."


def name_count(count: int, shape: str) -> str:
    """`no stars`, `one star`, `two stars`."""
    return f"{NUMBERS[count]} {shape if count == 1 else PLURALS[shape]}"


def neighbour(position: int, direction: str) -> int | None:
    """The position that lies `direction` ("left of", "right of", "above", "below") of `position`; None off the grid."""
    row, column = divmod(position, 2)
    match direction:
        case "left of" | "right of":
            return position ^ 1 if column == (direction == "left of") else None
        case _:
            return position ^ 2 if row == (direction == "above") else None


DIRECTIONS = ("left of", "right of", "above", "below")


def _neighbour_facts(scene: Scene) -> Iterator[str]:
    for position, cell in scene.things():
        for direction in DIRECTIONS:
            other = neighbour(position, direction)
            if other is not None and (there := scene.cells[other]) is not None:
                yield f"The {there.thing} is {direction} the {cell.thing}."


def name_price(count: int) -> str:
    """`one coin`, `two coins`."""
    return f"{NUMBERS[count]} {'coin' if count == 1 else 'coins'}"


def _price_facts(scene: Scene) -> Iterator[str]:
    prices = [cell.count for _, cell in scene.things()]
    for _, cell in scene.things():
        yield f"The {cell.thing} costs {name_price(cell.count)}."
        if cell.count == min(prices):
            yield f"The {cell.thing} is the cheapest."
        if cell.count == max(prices):
            yield f"The {cell.thing} is the dearest."


def _map_facts(scene: Scene) -> Iterator[str]:
    for position, cell in scene.things():
        yield f"The {POSITIONS[position]} land is {cell.colour}."
        if cell.count:
            yield f"The capital is at the {POSITIONS[position]}."


def _letter_facts(scene: Scene) -> Iterator[str]:
    for position, cell in scene.things():
        yield f"The {cell.colour} letter is at the {POSITIONS[position]}."
        yield f"The {cell.colour} letter is {cell.thing}."
        if cell.thing in VOWELS:
            yield f"The vowel is at the {POSITIONS[position]}."
            yield f"The vowel is {cell.thing}."
    letters = [cell.thing for _, cell in scene.things()]
    for row, (left, right) in zip(("top", "bottom"), (letters[:2], letters[2:]), strict=True):
        yield f"The {row} letters are {left} and {right}."
        yield f"The {row} letters are {right} and {left}."
    yield f"{min(letters)} comes first."


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """A 56 x 56 RGB drawing; `rng` moves each thing by up to 2 pixels, and varies its size and the tints a little."""
    tint = tuple(rng.randint(236, 255) for _ in range(3))
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), tint)
    draw = ImageDraw.Draw(image)
    for position, cell in scene.things():
        row, column = divmod(position, 2)
        x, y = column * CELL + rng.randint(-2, 2), row * CELL + rng.randint(-2, 2)
        match scene.kind:
            case "shapes":
                fill = _jitter(cell.colour, rng)
                _draw_shape(draw, cell.thing, fill, x + CELL / 2, y + CELL / 2, rng.uniform(7.5, 10.5))
            case "letters":
                _draw_glyph(draw, cell.thing, _jitter(cell.colour, rng), x + 6, y + 4, scale=3)
            case "market":
                _draw_glyph(draw, cell.thing, (70, 50, 40), x + 6, max(y, 0) + 2, scale=2)
                for coin in range(cell.count):
                    left, top = column * CELL + 2 + 6 * coin, row * CELL + 21
                    draw.ellipse((left, top, left + 4, top + 4), fill=(215, 165, 30), outline=(120, 90, 10))
            case "map":
                left, top = column * CELL, row * CELL
                fill = _jitter(cell.colour, rng)
                draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill, "white")
                if cell.count:
                    _draw_shape(draw, "star", (15, 15, 15), x + CELL / 2, y + CELL / 2, 7.0)
    return image


def _jitter(colour: str, rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + rng.randint(-14, 14))) for value in _RGB[colour])
    return red, green, blue


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, fill: tuple[int, int, int], x: float, y: float, radius: float
) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    match shape:
        case "circle":
            draw.ellipse(box, fill)
        case "ring":
            draw.ellipse(box, None, fill, width=3)
        case "square":
            side = radius * 0.85
            draw.rectangle((x - side, y - side, x + side, y + side), fill)
        case "diamond":
            draw.polygon([(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)], fill)
        case "cross":
            arm = radius * 0.35
            draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill)
            draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill)
        case _:
            turns = [(radius if i % 2 == 0 else radius * 0.42, math.pi * i / 5) for i in range(10)]
            draw.polygon([(x + r * math.sin(angle), y - r * math.cos(angle)) for r, angle in turns], fill)


def _draw_glyph(draw: ImageDraw.ImageDraw, name: str, fill: tuple[int, int, int], x: int, y: int, scale: int) -> None:
    for row, pixels in enumerate(_GLYPHS[name].split()):
        for column, pixel in enumerate(pixels):
            if pixel == "#":
                left, top = x + column * scale, y + row * scale
                draw.rectangle((left, top, left + scale - 1, top + scale - 1), fill)
