"""The drawings of the unusual things: each in its usual state, or in another that contradicts what one would expect.

A drawing is a function of a pen and a state.
"""

from __future__ import annotations

import math

from vcot.pipeline.sources.pen import SIZE, Colour, Pen, Point, around

_INK, _SKY, _LAWN = (40, 40, 46), (196, 224, 244), (120, 176, 92)
_WOOD, _GREY, _WHITE, _LEAF = (134, 88, 52), (150, 152, 158), (252, 252, 252), (58, 140, 62)
_RGB = {
    "red": (206, 32, 38),
    "green": (46, 150, 64),
    "blue": (38, 84, 206),
    "yellow": (246, 206, 40),
    "purple": (130, 52, 164),
    "pink": (240, 130, 178),
    "orange": (240, 132, 28),
    "white": _WHITE,
}
_NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight")


def _outdoors(pen: Pen, horizon: float = 262, lawn: Colour = _LAWN) -> None:
    pen.box(0, 0, SIZE, horizon, _SKY)
    pen.box(0, horizon, SIZE, SIZE, lawn)


def draw_stop_sign(pen: Pen, colour: str) -> None:
    """An octagon with its word, on a pole."""
    _outdoors(pen, 290)
    pen.box(161, 200, 175, 320, _GREY)
    for radius, fill in ((112, _WHITE), (103, _RGB[colour])):
        pen.polygon([around(168, 124, radius, (i + 0.5) / 8) for i in range(8)], fill)
    pen.text(168, 124, "STOP", 58, _WHITE)


def draw_banana(pen: Pen, colour: str) -> None:
    """A crescent with brown tips."""
    steps = [i / 40 for i in range(41)]
    angles = [math.radians(200 - 160 * t) for t in steps]
    widths = [14 + 44 * math.sin(math.pi * t) ** 0.8 for t in steps]
    outer = [(168 + 128 * math.cos(a), 92 + 150 * math.sin(a)) for a in angles]
    inner = [(168 + (128 - w) * math.cos(a), 92 + (150 - w) * math.sin(a)) for a, w in zip(angles, widths, strict=True)]
    dark = _shade(_RGB[colour])
    pen.polygon([*outer, *reversed(inner)], _RGB[colour])
    middle = [((x + u) / 2, (y + v) / 2) for (x, y), (u, v) in zip(outer, inner, strict=True)]
    pen.line(middle[4:-4], dark, 3)
    for first, second in (((outer[0], inner[0])), ((outer[-1], inner[-1]))):
        pen.line([first, second], (92, 62, 34), 13)


def _shade(colour: Colour) -> Colour:
    red, green, blue = (round(0.78 * value) for value in colour)
    return red, green, blue


def draw_traffic_light(pen: Pen, colour: str) -> None:
    """Three lamps in a black case; the top one is lit."""
    _outdoors(pen, 306)
    pen.box(158, 240, 178, 330, _GREY)
    pen.box(112, 14, 224, 252, _INK, 18)
    for y, fill in ((56, _RGB[colour]), (133, (74, 74, 80)), (210, (74, 74, 80))):
        pen.disc(168, y, 32, fill)
    for turn in (0.2, 0.3, 0.7, 0.8):
        pen.line([around(168, 56, 62, turn), around(168, 56, 78, turn)], _RGB[colour], 5)


def draw_tree(pen: Pen, colour: str) -> None:
    """A crown on a trunk."""
    _outdoors(pen)
    pen.polygon([(152, 300), (158, 180), (178, 180), (186, 300)], _WOOD)
    for x, y, radius in ((168, 92, 66), (112, 128, 54), (224, 128, 54), (140, 166, 46), (200, 166, 46)):
        pen.disc(x, y, radius, _RGB[colour])
    for x, y in ((130, 100), (190, 80), (216, 140), (150, 150), (104, 140)):
        pen.disc(x, y, 12, _shade(_RGB[colour]))


def draw_sun(pen: Pen, colour: str) -> None:
    """A disc with rays in the sky."""
    _outdoors(pen, 276)
    for ray in range(12):
        pen.line([around(168, 134, 82, ray / 12), around(168, 134, 112, ray / 12)], _RGB[colour], 9)
    pen.disc(168, 134, 66, _RGB[colour])


def draw_snowman(pen: Pen, colour: str) -> None:
    """Three balls with a hat, eyes and a carrot for a nose."""
    pen.box(0, 0, SIZE, 270, (126, 168, 206))
    pen.box(0, 270, SIZE, SIZE, (226, 234, 242))
    for x in (108, 228):
        pen.line([(168 + (x - 168) * 0.75, 168), (168 + (x - 168) * 1.75, 126)], _WOOD, 6)
    for y, radius in ((250, 72), (158, 54), (82, 40)):
        pen.disc(168, y, radius, _RGB[colour], _shade(_RGB[colour]), 2)
    pen.box(120, 44, 216, 54, _INK)
    pen.box(138, 4, 198, 48, _INK)
    for x, y in ((154, 74), (182, 74), (168, 142), (168, 166)):
        pen.disc(x, y, 5, _INK)
    pen.polygon([(166, 82), (166, 94), (206, 92)], _RGB["orange"])


def draw_carrot(pen: Pen, colour: str) -> None:
    """A root with leaves."""
    for x in (122, 146, 168, 190, 214):
        pen.line([(168, 104), (x, 22)], _LEAF, 12)
    pen.polygon([(112, 108), (224, 108), (176, 316), (160, 316)], _RGB[colour])
    pen.ellipse(168, 108, 56, 20, _RGB[colour])
    for left, right, y in ((124, 160, 150), (180, 206, 184), (142, 170, 222), (164, 184, 262)):
        pen.line([(left, y), (right, y)], _shade(_RGB[colour]), 4)


def draw_strawberry(pen: Pen, colour: str) -> None:
    """A berry with seeds under its leaves."""
    outline = [(168 + 112 * math.sin(t) ** 3, 176 - 7.6 * _heart(t)) for t in (2 * math.pi * i / 90 for i in range(90))]
    pen.polygon(outline, _RGB[colour])
    for row, (y, count) in enumerate(((128, 4), (164, 5), (200, 4), (236, 3), (268, 2))):
        for i in range(count):
            pen.ellipse(168 + (i - (count - 1) / 2) * (40 - 2 * row), y, 4, 6, (250, 232, 160))
    for turn in (-0.28, -0.15, 0.0, 0.15, 0.28):
        tip = around(168, 84, 62, turn)
        pen.polygon([(148, 92), tip, (188, 92)], _LEAF)
    pen.line([(168, 84), (176, 26)], _LEAF, 9)


def _heart(t: float) -> float:
    """The height of a heart's outline."""
    return 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)


def draw_bus(pen: Pen, colour: str) -> None:
    """A school bus from the side."""
    pen.box(0, 0, SIZE, 240, _SKY)
    pen.box(0, 240, SIZE, SIZE, (108, 108, 114))
    pen.box(20, 92, 276, 244, _RGB[colour], 16)
    pen.box(262, 158, 322, 244, _RGB[colour], 12)
    for left in (36, 84, 132, 180):
        pen.box(left, 110, left + 38, 154, (218, 234, 244), 5)
    pen.box(228, 110, 264, 228, (218, 234, 244), 5)
    pen.line([(24, 176), (218, 176)], _INK, 4)
    pen.text(122, 204, "SCHOOL BUS", 26, _INK)
    for x in (78, 272):
        pen.disc(x, 246, 30, _INK)
        pen.disc(x, 246, 13, _GREY)


def draw_meadow(pen: Pen, colour: str) -> None:
    """Blades of grass under the sky, with two flowers."""
    _outdoors(pen, 168, _RGB[colour])
    pen.disc(284, 50, 26, _RGB["yellow"])
    for row, y in enumerate((176, 214, 256, 302)):
        for i in range(-1, 14):
            x = 26 * i + 13 * (row % 2)
            for lean in (-8, 0, 8):
                pen.line([(x, y + 16), (x + lean, y - 14)], _shade(_RGB[colour]), 4)
    for x, y in ((92, 214), (232, 250)):
        pen.line([(x, y + 50), (x, y)], _shade(_shade(_RGB[colour])), 5)
        for petal in range(6):
            pen.disc(*around(x, y, 15, petal / 6), 9, _WHITE)
        pen.disc(x, y, 9, _RGB["yellow"])


def _draw_dial(pen: Pen, top: int) -> None:
    pen.disc(168, 168, 146, _WHITE, _INK, 10)
    for hour in range(12):
        pen.text(*around(168, 168, 116, hour / 12), str((top + hour - 1) % 12 + 1), 30, _INK)


def draw_clock(pen: Pen, hands: str) -> None:
    """A dial with `two` hands, or with `none`."""
    _draw_dial(pen, 12)
    if hands == "two":
        pen.line([(168, 168), around(168, 168, 58, 0.84)], _INK, 11)
        pen.line([(168, 168), around(168, 168, 88, 0.17)], _INK, 7)
    pen.disc(168, 168, 9, _INK)


def draw_clock_numbers(pen: Pen, top: str) -> None:
    """A dial with this number at its top, and two hands."""
    _draw_dial(pen, int(top))
    pen.line([(168, 168), around(168, 168, 58, 0.3)], _INK, 11)
    pen.line([(168, 168), around(168, 168, 84, 0.62)], _INK, 7)
    pen.disc(168, 168, 9, _INK)


def draw_chair(pen: Pen, legs: str) -> None:
    """A wooden chair from the front and a little from above; of `three` legs, one at the front is missing."""
    feet = [((112, 196), (104, 318)), ((224, 196), (232, 318)), ((128, 170), (124, 286)), ((208, 170), (212, 286))]
    dark, light = (104, 66, 36), (176, 122, 74)
    for number, (top, foot) in reversed(list(enumerate(feet))):
        if legs == "four" or number != 1:
            pen.line([top, foot], _WOOD if number < 2 else dark, 13)
    pen.box(118, 24, 132, 176, _WOOD)
    pen.box(204, 24, 218, 176, _WOOD)
    for y in (36, 78, 120):
        pen.box(118, y, 218, y + 20, light)
    pen.polygon([(122, 168), (214, 168), (236, 208), (100, 208)], light)
    pen.polygon([(100, 208), (236, 208), (236, 220), (100, 220)], _WOOD)


def draw_hand(pen: Pen, fingers: str) -> None:
    """A palm with its thumb on the left, and `fingers` in all."""
    skin, line = (236, 188, 150), (176, 122, 88)
    count = _NUMBERS.index(fingers) - 1
    heights = [*(46, 24, 20, 32, 52)[: count - 1], 66]
    gap = 128 / count
    for width, colour in ((6, line), (0, skin)):
        for i, height in enumerate(heights):
            pen.line(
                [(118 + gap * (i + 0.5), 210), (108 + gap * 1.12 * (i + 0.5), height + 14)], colour, gap * 0.76 + width
            )
        pen.line([(136, 250), (60, 176)], colour, 30 + width)
        pen.box(112 - width / 2, 176 - width / 2, 252 + width / 2, 306 + width / 2, colour, 36)
    pen.box(140, 290, 226, SIZE, skin)


def draw_bicycle(pen: Pen, wheels: str) -> None:
    """A bicycle from the side; a third wheel stands behind the second."""
    _outdoors(pen, 282)
    places = [64.0, 168.0, 272.0] if wheels == "three" else [84.0, 252.0]
    radius = 46 if wheels == "three" else 62
    y = 284 - radius
    for x in places:
        pen.ring(x, y, radius, _INK, 7)
        for spoke in range(8):
            pen.line([(x, y), around(x, y, radius - 4, spoke / 8)], _GREY, 1.5)
    rear, front = places[0], places[-1]
    pedal, seat, bar = (156.0, y), (128.0, 142.0), (236.0, 136.0)
    for points in ([(rear, y), pedal, bar], [(rear, y), seat, pedal], [seat, bar], [(front, y), bar]):
        pen.line(points, _RGB["red"], 7)
    pen.line([bar, (228, 108), (204, 104)], _INK, 7)
    pen.line([seat, (122, 122)], _RGB["red"], 6)
    pen.line([(104, 120), (142, 120)], _INK, 11)
    pen.disc(*pedal, 12, _INK)


def draw_star(pen: Pen, points: str) -> None:
    """A yellow star with so many points."""
    pen.box(0, 0, SIZE, SIZE, (34, 44, 84))
    count = _NUMBERS.index(points)
    inner = 56 if count == 5 else 70
    pen.polygon(
        [around(168, 172, 140 if i % 2 == 0 else inner, i / (2 * count)) for i in range(2 * count)], _RGB["yellow"]
    )


def draw_spider(pen: Pen, legs: str) -> None:
    """A spider from above with so many legs, half on each side."""
    per_side = _NUMBERS.index(legs) // 2
    for side in (-1, 1):
        for i in range(per_side):
            lift = i / (per_side - 1) - 0.5
            knee = (168 + side * 84, 150 + 90 * lift - 24)
            foot = (168 + side * (136 - 36 * abs(lift)), 168 + 250 * lift)
            pen.line([(168 + side * 20, 148 + 40 * lift), knee, foot], _INK, 8)
    pen.ellipse(168, 204, 48, 60, _INK)
    pen.disc(168, 138, 32, _INK)
    for x in (158, 178):
        pen.disc(x, 124, 5, _WHITE)


def draw_face(pen: Pen, eyes: str) -> None:
    """A smiling face with so many eyes in a row."""
    pen.disc(168, 172, 138, (244, 204, 164), (184, 132, 96), 3)
    pen.polygon([around(168, 172, 140, turn / 100) for turn in range(-22, 23)], (92, 58, 34))
    count = _NUMBERS.index(eyes)
    for i in range(count):
        x = 168 + (i - (count - 1) / 2) * (104 if count == 2 else 74)
        pen.ellipse(x, 152, 26, 19, _WHITE, _INK, 2)
        pen.disc(x, 153, 11, (70, 100, 150))
        pen.disc(x, 153, 5, _INK)
    pen.line([(168, 176), (158, 206), (174, 208)], (184, 132, 96), 5)
    pen.line([(120, 240), (144, 258), (168, 263), (192, 258), (216, 240)], _RGB["red"], 8)


def draw_dog(pen: Pen, legs: str) -> None:
    """A dog from the side with so many legs."""
    _outdoors(pen, 286)
    fur, dark = (178, 126, 78), (112, 74, 44)
    count = _NUMBERS.index(legs)
    for i in range(count):
        x = 78 + i * 128 / (count - 1)
        pen.line([(x, 210), (x, 294)], fur if i % 2 == 0 else dark, 20)
    pen.line([(68, 172), (34, 124)], fur, 14)
    pen.ellipse(142, 184, 92, 46, fur)
    pen.line([(214, 170), (250, 124)], fur, 44)
    pen.disc(254, 112, 42, fur)
    pen.ellipse(296, 124, 28, 20, fur)
    pen.disc(318, 118, 9, _INK)
    pen.ellipse(228, 108, 15, 36, dark)
    pen.disc(266, 100, 6, _INK)


def draw_door(pen: Pen, state: str) -> None:
    """A door in a wall: its leaf in the frame, or swung outwards from a dark opening."""
    pen.box(0, 0, SIZE, 300, (222, 206, 178))
    pen.box(0, 300, SIZE, SIZE, (150, 140, 128))
    pen.box(94, 30, 232, 304, _WHITE)
    pen.box(104, 40, 222, 304, (26, 26, 32))
    if state == "closed":
        pen.box(104, 40, 222, 304, (60, 108, 148))
        for top, bottom in ((58, 150), (178, 284)):
            pen.box(122, top, 204, bottom, (44, 86, 122))
        pen.disc(208, 176, 8, _RGB["yellow"])
        return
    pen.polygon([(104, 40), (104, 304), (24, 330), (24, 14)], (60, 108, 148))
    pen.polygon([(92, 62), (92, 152), (38, 152), (38, 46)], (44, 86, 122))
    pen.polygon([(92, 180), (92, 286), (38, 298), (38, 180)], (44, 86, 122))
    pen.disc(32, 178, 8, _RGB["yellow"])


def draw_cake(pen: Pen, burning: str) -> None:
    """A cake with one candle."""
    pen.box(0, 300, SIZE, SIZE, (206, 190, 170))
    pen.ellipse(168, 300, 130, 16, _WHITE, _GREY, 2)
    pen.box(62, 190, 274, 300, (236, 190, 130), 12)
    pen.box(62, 182, 274, 222, (250, 226, 234), 12)
    for x in range(80, 270, 34):
        pen.disc(x, 222, 14, (250, 226, 234))
    pen.box(156, 92, 180, 186, (90, 150, 214), 3)
    pen.line([(168, 92), (168, 78)], _INK, 4)
    if burning == "yes":
        pen.polygon([(150, 60), (168, 10), (186, 60)], _RGB["orange"])
        pen.disc(168, 60, 18.5, _RGB["orange"])
        pen.disc(168, 62, 10, (254, 232, 120))


def draw_cup(pen: Pen, place: str) -> None:
    """A table, with a cup on it or under it."""
    pen.box(0, 290, SIZE, SIZE, (196, 178, 152))
    for left in (48, 268):
        pen.box(left, 164, left + 20, 308, _WOOD)
    pen.box(28, 146, 308, 168, (158, 106, 62), 4)
    base = 146 if place == "on the table" else 306
    pen.ring(208, base - 44, 24, _RGB["blue"], 8)
    pen.polygon([(126, base - 84), (210, base - 84), (198, base), (138, base)], _RGB["blue"])
    pen.ellipse(168, base - 84, 42, 10, _WHITE, _RGB["blue"], 5)


def draw_fish(pen: Pen, place: str) -> None:
    """The sea under the sky, with a fish in one of them."""
    pen.box(0, 0, SIZE, 168, _SKY)
    pen.box(0, 168, SIZE, SIZE, (54, 120, 178))
    for i in range(-1, 9):
        pen.disc(21 + 42 * i, 170, 20, (54, 120, 178))
    pen.disc(52, 52, 24, _WHITE)
    pen.disc(84, 46, 30, _WHITE)
    pen.disc(114, 54, 22, _WHITE)
    y = 252 if place == "in the water" else 88
    pen.polygon([(228, y), (286, y - 40), (286, y + 40)], _RGB["orange"])
    pen.polygon([(150, y - 34), (206, y - 66), (204, y - 28)], _shade(_RGB["orange"]))
    pen.ellipse(168, y, 82, 44, _RGB["orange"])
    pen.disc(120, y - 10, 10, _WHITE)
    pen.disc(118, y - 10, 5, _INK)
    pen.line([(88, y + 10), (106, y + 14)], _INK, 4)


def draw_house(pen: Pen, way: str) -> None:
    """A house on its lawn; upside down it stands on its roof's tip."""
    _outdoors(pen, 276)

    def at(x: float, y: float) -> Point:
        return (x, y) if way == "upright" else (x, 324 - y)

    def fill(left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        pen.polygon([at(left, top), at(right, top), at(right, bottom), at(left, bottom)], colour)

    fill(222, 60, 248, 120, (150, 74, 60))
    fill(84, 138, 252, 284, (240, 220, 176))
    pen.polygon([at(60, 140), at(168, 40), at(276, 140)], (172, 54, 46))
    fill(148, 204, 188, 284, _WOOD)
    for left in (102, 202):
        fill(left, 168, left + 34, 206, (170, 210, 236))
        fill(left + 15, 168, left + 19, 206, _WHITE)
    pen.disc(*at(180, 246), 4, _RGB["yellow"])
