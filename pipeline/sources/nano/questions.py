"""The nano world: multiple-choice questions about small drawn scenes, in the record shapes of A-OKVQA and ScienceQA.

Nine question families, three to each of ScienceQA's subjects. Each needs the image: the gold letter is uniform, and
given only the question and its options every option is equally likely (options come in confusable pairs, or all stand
in the scene, or are balanced by rank), so that a guess from the text is at chance. Everything is drawn from a seed, and
a scene's form decides its split, so the splits share no image.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from vcot.pipeline.errors import DataError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.records import ImageRef, PromptName, Split, Task, content_key
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources.nano.scene import (
    COLOUR_PAIRS,
    COLOURS,
    DIRECTIONS,
    GOODS,
    LETTER_PAIRS,
    LETTERS,
    NUMBERS,
    PLURALS,
    POSITIONS,
    SHAPES,
    VOWELS,
    Cell,
    Scene,
    assign_split,
    draw_scene,
    list_facts,
    name_count,
    name_price,
    neighbour,
)
from vcot.pipeline.sources.source import Source


class PngStore(Protocol):
    """Where the drawings go; `vcot.pipeline.images.ImageStore` is one."""

    def put_png(self, image: Image.Image) -> ImageRef:
        """Store a decoded RGB image losslessly."""


@dataclass(frozen=True)
class Reading:
    """A way to read a scene: the statements made about it, and the choice that they lead to."""

    statements: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Question:
    """A question about a scene. `choices` are in the order in which they are asked."""

    family: str
    scene: Scene
    question: str
    choices: tuple[str, ...]
    reading: Reading
    """The right one."""
    misreading: Reading | None = None
    """The likely wrong one (a colour taken for its neighbour, one coin too many), where the family has one."""

    @property
    def answer(self) -> int:
        """Index of the right choice."""
        return self.choices.index(self.reading.answer)


def _draw_pairs(rng: random.Random, pairs: tuple[tuple[str, str], ...]) -> list[str]:
    return [member for pair in rng.sample(pairs, 2) for member in pair]


def _partner(member: str, pairs: tuple[tuple[str, str], ...]) -> str:
    return next(b if member == a else a for a, b in pairs if member in (a, b))


def _ask(
    rng: random.Random, family: str, scene: Scene, question: str, choices: list[str], *readings: Reading
) -> Question:
    return Question(family, scene, question, tuple(rng.sample(choices, len(choices))), *readings)


def _ask_colour(rng: random.Random) -> Question:
    """The colour of one of three or four different shapes; misread as the other colour of its pair."""
    choices = _draw_pairs(rng, COLOUR_PAIRS)
    shapes = rng.sample(SHAPES, 4)
    cells: list[Cell | None] = [Cell(shape, rng.choice(COLOURS)) for shape in shapes]
    position, answer = rng.randrange(4), rng.choice(choices)
    cells[position] = Cell(shapes[position], answer)
    if rng.random() < 0.5:
        cells[(position + rng.randrange(1, 4)) % 4] = None
    shape = shapes[position]

    def read(colour: str) -> Reading:
        return Reading((f"The {shape} is at the {POSITIONS[position]}.", f"The {shape} is {colour}."), colour)

    wrong = _partner(answer, COLOUR_PAIRS)
    scene = Scene("shapes", tuple(cells))
    return _ask(rng, "colour", scene, f"What colour is the {shape}?", choices, read(answer), read(wrong))


def _ask_count(rng: random.Random) -> Question:
    """How many of a shape there are, one to four; misread by one too few or too many."""
    shape, count = rng.choice(SHAPES), rng.randint(1, 4)
    others = [other for other in SHAPES if other != shape]
    cells = [Cell(shape, rng.choice(COLOURS)) for _ in range(count)]
    cells += [Cell(rng.choice(others), rng.choice(COLOURS)) for _ in range(4 - count)]
    placed: list[Cell | None] = list(rng.sample(cells, 4))
    scene = Scene("shapes", tuple(None if c and c.thing != shape and rng.random() < 0.3 else c for c in placed))
    rows = [scene.row_count(shape, row) for row in (0, 1)]

    def read(top: int, bottom: int) -> Reading:
        total = top + bottom
        statements = (
            f"The top row has {name_count(top, shape)}.",
            f"The bottom row has {name_count(bottom, shape)}.",
            f"There {'is' if total == 1 else 'are'} {name_count(total, shape)}.",
        )
        return Reading(statements, NUMBERS[total])

    step = 1 if count % 2 else -1
    row = next(row for row in rng.sample((0, 1), 2) if 0 <= rows[row] + step <= 2)
    misread = [value + step * (i == row) for i, value in enumerate(rows)]
    question = f"How many {PLURALS[shape]} are there?"
    return _ask(rng, "count", scene, question, list(NUMBERS[1:]), read(*rows), read(*misread))


def _ask_neighbour(rng: random.Random) -> Question:
    """Which shape is next to another; misread as the one at the opposite corner of the asked shape."""
    shapes = rng.sample(SHAPES, 5)
    scene = Scene("shapes", tuple(Cell(shape, rng.choice(COLOURS)) for shape in shapes[:4]))
    sides = [(d, p, q) for d in DIRECTIONS for p in range(4) if (q := neighbour(p, d)) is not None]
    direction, position, other = rng.choice(sides)
    asked = shapes[position]

    def read(shape: str) -> Reading:
        statements = (
            f"The {asked} is at the {POSITIONS[position]}.",
            f"The {shape} is at the {POSITIONS[other]}.",
            f"The {shape} is {direction} the {asked}.",
        )
        return Reading(statements, shape)

    choices = [shape for shape in shapes if shape != asked]
    question = f"What is {direction} the {asked}?"
    return _ask(rng, "neighbour", scene, question, choices, read(shapes[other]), read(shapes[3 - position]))


def _draw_market(rng: random.Random) -> Scene:
    prices = rng.sample(range(1, 5), 4)
    return Scene("market", tuple(Cell(g, count=p) for g, p in zip(rng.sample(GOODS, 4), prices, strict=True)))


def _ask_price(rng: random.Random) -> Question:
    """What a good costs, one to four coins; misread by one coin."""
    scene = _draw_market(rng)
    position, cell = rng.choice(list(scene.things()))

    def read(count: int) -> Reading:
        place = f"The {cell.thing} is at the {POSITIONS[position]}."
        return Reading((place, f"The {cell.thing} costs {name_price(count)}."), NUMBERS[count])

    wrong = cell.count + (1 if cell.count % 2 else -1)
    question = f"How many coins does the {cell.thing} cost?"
    return _ask(rng, "price", scene, question, list(NUMBERS[1:]), read(cell.count), read(wrong))


def _ask_extreme(rng: random.Random) -> Question:
    """Which good is the cheapest or the dearest; misread as the second cheapest or dearest."""
    scene = _draw_market(rng)
    extreme, price, second = rng.choice((("cheapest", 1, 2), ("dearest", 4, 3)))
    goods = {cell.count: cell.thing for _, cell in scene.things()}

    def read(good: str) -> Reading:
        return Reading((f"The {good} costs {name_price(price)}.", f"The {good} is the {extreme}."), good)

    question = f"Which good is the {extreme}?"
    return _ask(rng, "extreme", scene, question, list(goods.values()), read(goods[price]), read(goods[second]))


def _ask_capital(rng: random.Random) -> Question:
    """The colour of the land with the capital; misread as the land beside it."""
    colours = rng.sample(_draw_pairs(rng, COLOUR_PAIRS), 4)
    capital = rng.randrange(4)
    scene = Scene("map", tuple(Cell("land", colour, int(i == capital)) for i, colour in enumerate(colours)))

    def read(position: int) -> Reading:
        place = POSITIONS[position]
        colour = colours[position]
        return Reading((f"The capital is at the {place}.", f"The {place} land is {colour}."), colour)

    question = "What colour is the land with the capital?"
    return _ask(rng, "capital", scene, question, colours, read(capital), read(capital ^ 1))


def _draw_letters(rng: random.Random, letters: list[str]) -> Scene:
    inks = rng.sample(COLOURS, 4)
    return Scene("letters", tuple(Cell(t, ink) for t, ink in zip(rng.sample(letters, 4), inks, strict=True)))


def _ask_letter(rng: random.Random) -> Question:
    """Which letter has a colour; misread as the letter that looks like it."""
    choices = _draw_pairs(rng, LETTER_PAIRS)
    answer = rng.choice(choices)
    scene = _draw_letters(rng, [answer, *rng.sample([letter for letter in LETTERS if letter != answer], 3)])
    position = scene.find(answer)
    cell = scene.cells[position]
    ink = cell.colour if cell else ""

    def read(letter: str) -> Reading:
        return Reading((f"The {ink} letter is at the {POSITIONS[position]}.", f"The {ink} letter is {letter}."), letter)

    wrong = _partner(answer, LETTER_PAIRS)
    return _ask(rng, "letter", scene, f"Which letter is {ink}?", choices, read(answer), read(wrong))


def _ask_vowel(rng: random.Random) -> Question:
    """Which vowel stands among three consonants."""
    choices = rng.sample(VOWELS, 4)
    answer = rng.choice(choices)
    scene = _draw_letters(rng, [answer, *rng.sample([letter for letter in LETTERS if letter not in VOWELS], 3)])
    place = POSITIONS[scene.find(answer)]
    reading = Reading((f"The vowel is at the {place}.", f"The vowel is {answer}."), answer)
    return _ask(rng, "vowel", scene, "Which vowel is drawn?", choices, reading)


def _ask_alphabet(rng: random.Random) -> Question:
    """Which drawn letter comes first in the alphabet. Its rank among the options is uniform: the text gives no hint."""
    choices = sorted(rng.sample(LETTERS[:-3], 4))
    answer = rng.choice(choices)
    later = [letter for letter in LETTERS if letter > answer]
    scene = _draw_letters(rng, [answer, *rng.sample(later, 3)])
    letters = [cell.thing for _, cell in scene.things()]
    statements = (
        f"The top letters are {letters[0]} and {letters[1]}.",
        f"The bottom letters are {letters[2]} and {letters[3]}.",
        f"{answer} comes first.",
    )
    question = "Which drawn letter comes first in the alphabet?"
    return _ask(rng, "alphabet", scene, question, choices, Reading(statements, answer))


_ASK: dict[str, tuple[str, Callable[[random.Random], Question]]] = {
    "colour": ("NAT", _ask_colour),
    "price": ("SOC", _ask_price),
    "letter": ("LAN", _ask_letter),
    "count": ("NAT", _ask_count),
    "extreme": ("SOC", _ask_extreme),
    "vowel": ("LAN", _ask_vowel),
    "neighbour": ("NAT", _ask_neighbour),
    "capital": ("SOC", _ask_capital),
    "alphabet": ("LAN", _ask_alphabet),
}
FAMILIES = tuple(_ASK)
SUBJECTS: dict[str, str] = {family: subject for family, (subject, _) in _ASK.items()}


def make_question(rng: random.Random, family: str, split: Split) -> Question:
    """A question of `family` whose scene belongs to `split`; about 1 / 0.15 tries for the smaller splits."""
    while True:
        question = _ASK[family][1](rng)
        if assign_split(question.scene) == split:
            return question


def generate_nano(split: Split, num_tasks: int, seed: int, image_store: PngStore) -> Iterator[Task]:
    """`num_tasks` different tasks, families in turn. A longer run with the same seed begins with the shorter one's."""
    rng = random.Random(f"nano/1/{split}/{seed}")
    seen: set[str] = set()
    while len(seen) < num_tasks:
        question = make_question(rng, FAMILIES[len(seen) % len(FAMILIES)], split)
        image = image_store.put_png(draw_scene(question.scene, rng))
        task = build_task(question, image, split)
        if task.id not in seen:
            seen.add(task.id)
            yield task


def build_task(question: Question, image: ImageRef, split: Split) -> Task:
    """The record of a question about a stored drawing."""
    key = content_key(image=image.sha256, question=question.question, choices=question.choices)
    return Task(
        id=f"nano-{key[:16]}",
        question=question.question,
        choices=question.choices,
        answer=question.answer,
        rationale=" ".join(question.reading.statements),
        facts=list_facts(question.scene),
        images=(image,),
        subject=SUBJECTS[question.family],
        family=question.family,
        source="nano",
        split=split,
    )


TRAINED_PROMPTS: tuple[PromptName, ...] = ("thought_specific", "thought_generic", "zero_shot", "cot")
"""Those that the nano models are built with: another list is another tokenizer."""


def render_target(task: Task, prompt: PromptName) -> str:
    """The response that the nano model is trained to give to `task` (with gold answer and rationale) under `prompt`."""
    return render_response(task.rationale, f"The answer is ({task.answer_letter}).", prompt)


def render_response(thought: str, answer: str, prompt: PromptName) -> str:
    """A thought and an answer in the format that a built-in prompt asks for."""
    match prompt:
        case "thought_specific":
            return f"{thought} <R> {answer}"
        case "thought_generic":
            return f"Here is my thought process: {thought} Here is my response: {answer}"
        case "cot":
            return f"{thought} {answer}"
        case "zero_shot":
            return answer
        case _:
            raise ValueError(f"a nano model was not trained on the prompt {prompt}")


def _load(section: TasksSection, store: ImageStore) -> Iterator[Task]:
    if section.num_tasks is None or section.path is not None:
        raise DataError("nano tasks are drawn, not read: set num_tasks, and no path")
    return generate_nano(section.split, section.num_tasks, section.seed, store)


NANO = Source(load=_load, digest=lambda _: "nano", is_drawn=True, licence="license: apache-2.0")
