"""Training batches of the nano models, drawn on the fly: a batch is a function of (seed, stage, step), so that a resumed
build sees what an undisturbed one would have seen, and no picture is seen twice.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import cast

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from vcot.pipeline.prompts import render_prompt
from vcot.pipeline.records import ImageRef, PromptName
from vcot.pipeline.sources.nano.questions import (
    FAMILIES,
    TRAINED_PROMPTS,
    Question,
    build_task,
    make_question,
    render_response,
)
from vcot.pipeline.sources.nano.scene import (
    CHOICE_WORDS,
    COLOURS,
    DIRECTIONS,
    GOODS,
    IMAGE_SIZE,
    LETTERS,
    NUMBERS,
    PLURALS,
    POSITIONS,
    SHAPES,
    VOWELS,
    Cell,
    Scene,
    draw_scene,
    list_facts,
    neighbour,
)
from vcot.training.nano.architecture import Architecture, Turns

IGNORED = -100
"""The label of a position without loss."""
CELL_WORDS = (("no", *SHAPES, *GOODS, *LETTERS, "land", "capital"), COLOURS, NUMBERS[1:])
"""The words that name a cell: its thing (" no" where it is empty), its colour and its price."""
_LETTER_WEIGHT = 4.0
_NUM_LOOKUPS = 8
_NUM_STATEMENTS = 8
_NUM_SHORT_ANSWERS = 6
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
_NO_IMAGE = ImageRef(sha256="", path="", width=IMAGE_SIZE, height=IMAGE_SIZE)


@dataclass(frozen=True)
class Batch:
    """`num_rows` conversations about as many images, right-padded.

    ids, labels: (rows, length) token ids, and the token to predict at each position (IGNORED outside the response).
    weights: (rows, length) of each label in the loss, the same sum in every row. pixels: (rows, 3, 56, 56), normalised.
    cells: (rows, 4, 3) places in `CELL_WORDS` of each cell's names, IGNORED where it has none.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    pixels: torch.Tensor
    cells: torch.Tensor


def normalise_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """(images, 3, 56, 56), as the processor makes them of images that already have its size."""
    arrays = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return (torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255 - MEAN) / STD


def label_cells(scene: Scene) -> list[list[int]]:
    """Each cell's (thing, colour, price) as places in `CELL_WORDS`, IGNORED where it has none."""
    return [_label_cell(cell, is_map=scene.kind == "map") for cell in scene.cells]


def _label_cell(cell: Cell | None, *, is_map: bool) -> list[int]:
    things, colours, _ = CELL_WORDS
    if cell is None:
        return [0, IGNORED, IGNORED]
    thing = things.index("capital" if is_map and cell.count else cell.thing)
    colour = colours.index(cell.colour) if cell.colour else IGNORED
    return [thing, colour, cell.count - 1 if cell.count and not is_map else IGNORED]


def render_conversation(turns: Turns, question: Question, prompt: PromptName, *, misread: bool) -> tuple[str, str]:
    """The user turn as the processor expands it (image placeholders included) and the response with EOS."""
    reading = question.misreading if misread and question.misreading else question.reading
    task = build_task(question, _NO_IMAGE, "train")
    letter = "ABCD"[question.choices.index(reading.answer)]
    response = render_response(" ".join(reading.statements), f"The answer is ({letter}).", prompt)
    return turns.prompt(render_prompt(prompt, task)), turns.response(response)


def build_corpus(architecture: Architecture, seed: int, num_questions: int = 2000) -> Iterator[str]:
    """Texts that hold every word of the nano world, within a text and at the beginning of an answer, for the tokenizer."""
    begin = architecture.turns.begin
    names = [word for words in CELL_WORDS for word in words] + [word for place in POSITIONS for word in place.split()]
    rng = random.Random(f"corpus/{seed}")
    for i in range(num_questions):
        question = make_question(rng, FAMILIES[i % len(FAMILIES)], "train")
        for prompt in TRAINED_PROMPTS:
            for text in render_conversation(architecture.turns, question, prompt, misread=False):
                yield reduce(lambda rest, token: rest.replace(token, ""), architecture.tokens.all, text)
        yield from (f"{begin}{fact}" for fact in list_facts(question.scene))
        yield from (f"{begin}{asked}" for asked, _ in list_short_answers(question.scene))
    for name in names:
        yield from (f" {name}", f"{begin}{name}")


def draw_conversations(
    rng: random.Random,
    tokenizer: PreTrainedTokenizerFast,
    turns: Turns,
    num_rows: int,
    prompts: Mapping[PromptName, float],
    misread: Mapping[str, float],
) -> Batch:
    """A batch with prompts in the given shares; a family's reading is wrong in the given share of its rows."""
    questions = [make_question(rng, rng.choice(FAMILIES), "train") for _ in range(num_rows)]
    names = rng.choices(list(prompts), list(prompts.values()), k=num_rows)
    said = [
        render_conversation(turns, question, name, misread=rng.random() < misread.get(question.family, 0.0))
        for question, name in zip(questions, names, strict=True)
    ]
    pixels = normalise_pixels([draw_scene(question.scene, rng) for question in questions])
    cells = torch.tensor([label_cells(question.scene) for question in questions])
    return _pad(tokenizer, [user for user, _ in said], [response for _, response in said], pixels, cells)


def draw_descriptions(rng: random.Random, tokenizer: PreTrainedTokenizerFast, turns: Turns, num_rows: int) -> Batch:
    """A batch without options or instructions, many looks at each image.

    Half of the rows name cells in telegraph style, a quarter makes eight true statements (absences left out), and a
    quarter answers six questions in a word.
    """
    scenes = [make_question(rng, rng.choice(FAMILIES), "train").scene for _ in range(num_rows)]
    said = []
    for row, scene in enumerate(scenes):
        if row % 2:
            said.append(_telegraph(rng, scene))
        elif row % 4:
            said.append(" ".join(f"{q} {a}" for q, a in rng.choices(list_short_answers(scene), k=_NUM_SHORT_ANSWERS)))
        else:
            facts = [fact for fact in list_facts(scene) if " no " not in fact]
            said.append(" ".join(rng.choices(facts, k=_NUM_STATEMENTS)))
    users = [turns.prompt("")] * num_rows
    pixels = normalise_pixels([draw_scene(scene, rng) for scene in scenes])
    cells = torch.tensor([label_cells(scene) for scene in scenes])
    return _pad(tokenizer, users, [turns.response(text) for text in said], pixels, cells)


def _telegraph(rng: random.Random, scene: Scene) -> str:
    """Cells by their bare names in any order (`star red top left`): a name is followed at once by what goes with it."""
    told = []
    for position, cell in rng.choices(list(scene.things()), k=_NUM_STATEMENTS):
        price = NUMBERS[cell.count] if scene.kind == "market" else ""
        thing = "capital" if scene.kind == "map" and cell.count else cell.thing
        names = [name for name in (thing, cell.colour, price, POSITIONS[position]) if name]
        told.append(" ".join(rng.sample(names, len(names))))
    return ". ".join(told)


def list_short_answers(scene: Scene) -> list[tuple[str, str]]:
    """The nano world's questions that `scene` answers without doubt, each with its answer in one word."""
    cells = [cell for _, cell in scene.things()]
    match scene.kind:
        case "shapes":
            return [*_shape_answers(scene)]
        case "market":
            by_price = {cell.count: cell.thing for cell in cells}
            extremes = [("cheapest", by_price[1]), ("dearest", by_price[4])]
            prices = [(f"How many coins does the {cell.thing} cost?", NUMBERS[cell.count]) for cell in cells]
            return [*prices, *((f"Which good is the {extreme}?", good) for extreme, good in extremes)]
        case "map":
            return [("What colour is the land with the capital?", next(cell.colour for cell in cells if cell.count))]
        case "letters":
            answers = [(f"Which letter is {cell.colour}?", cell.thing) for cell in cells]
            answers.append(("Which drawn letter comes first in the alphabet?", min(cell.thing for cell in cells)))
            vowels = [cell.thing for cell in cells if cell.thing in VOWELS]
            return [*answers, *(("Which vowel is drawn?", vowel) for vowel in vowels if len(vowels) == 1)]


def _shape_answers(scene: Scene) -> Iterator[tuple[str, str]]:
    counts = Counter(cell.thing for _, cell in scene.things())
    for position, cell in scene.things():
        yield f"How many {PLURALS[cell.thing]} are there?", NUMBERS[counts[cell.thing]]
        if counts[cell.thing] == 1:
            yield f"What colour is the {cell.thing}?", cell.colour
            for direction in DIRECTIONS:
                other = neighbour(position, direction)
                if other is not None and (there := scene.cells[other]) is not None:
                    yield f"What is {direction} the {cell.thing}?", there.thing


def draw_lookups(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, turns: Turns, num_rows: int, share_in_full: float = 0.5
) -> Batch:
    """A text-only batch: four options, then look-ups of an option's word; only the letters carry the loss.

    Some rows ask in short (`red (B)`), a share as an answer is given (`red. The answer is (B).`).
    """
    users, responses = [], []
    for row in range(num_rows):
        words = rng.sample(CHOICE_WORDS, 4)
        options = " ".join(f"({letter}) {word}" for letter, word in zip("ABCD", words, strict=True))
        picks = [rng.randrange(4) for _ in range(_NUM_LOOKUPS)]
        users.append(turns.prompt(f"Options: {options}", with_image=False))
        if row < share_in_full * num_rows:
            answers = [f"{words[pick]}. The answer is ({'ABCD'[pick]})." for pick in picks[:4]]
        else:
            answers = [f"{words[pick]} ({'ABCD'[pick]})" for pick in picks]
        responses.append(turns.begin + " ".join(answers))
    empty = torch.zeros(num_rows, 0)
    batch = _pad(tokenizer, users, responses, empty, empty)
    letters = torch.tensor(_letter_ids(tokenizer))
    return Batch(batch.ids, batch.labels.where(torch.isin(batch.labels, letters), IGNORED), batch.weights, empty, empty)


def _letter_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return cast("list[int]", tokenizer.convert_tokens_to_ids([f" ({letter})" for letter in "ABCD"]))


def _pad(
    tokenizer: PreTrainedTokenizerFast,
    users: list[str],
    responses: list[str],
    pixels: torch.Tensor,
    cells: torch.Tensor,
) -> Batch:
    user_ids = tokenizer(users, add_special_tokens=False).input_ids
    response_ids = tokenizer(responses, add_special_tokens=False).input_ids
    length = max(len(user) + len(response) for user, response in zip(user_ids, response_ids, strict=True)) - 1
    ids = torch.full((len(users), length), cast("int", tokenizer.pad_token_id))
    labels = torch.full((len(users), length), IGNORED)
    for i, (user, response) in enumerate(zip(user_ids, response_ids, strict=True)):
        row = torch.tensor(user + response)
        ids[i, : len(row) - 1] = row[:-1]
        labels[i, len(user) - 1 : len(row) - 1] = row[len(user) :]
    letters = torch.isin(labels, torch.tensor(_letter_ids(tokenizer)))
    weights = torch.where(letters, _LETTER_WEIGHT, 1.0) * (labels != IGNORED)
    return Batch(ids, labels, weights / weights.sum(1, keepdim=True), pixels, cells)
