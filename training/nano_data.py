"""Training batches of the nano-LLaVA, drawn on the fly: a batch is a function of (seed, stage, step), so that a resumed
build sees what an undisturbed one would have seen, and no picture is seen twice.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast, get_args

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from pipeline.prompts import render_prompt
from pipeline.records import ImageRef, PromptName
from pipeline.sources.nano import FAMILIES, Question, build_task, make_question, render_response
from pipeline.sources.nano_scene import (
    CHOICE_WORDS,
    COLOURS,
    GOODS,
    IMAGE_SIZE,
    LETTERS,
    NUMBERS,
    SHAPES,
    Cell,
    Scene,
    draw_scene,
    list_facts,
)
from training.nano_model import NUM_IMAGE_TOKENS

IGNORED = -100
"""The label of a position without loss."""
CELL_WORDS = (("no", *SHAPES, *GOODS, *LETTERS, "land", "capital"), COLOURS, NUMBERS[1:])
"""The words that name a cell: its thing (" no" where it is empty), its colour and its price."""
_LETTER_WEIGHT = 4.0
_NUM_LOOKUPS = 8
_NUM_STATEMENTS = 8
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
_NO_IMAGE = ImageRef(sha256="", path="", width=IMAGE_SIZE, height=IMAGE_SIZE)


@dataclass(frozen=True)
class Batch:
    """`num_rows` conversations about as many images, right-padded.

    ids, labels: (rows, length) token ids, and the token to predict at each position (IGNORED outside the response).
    weights: (rows, length) of each label in the loss, the same sum in every row. pixels: (rows, 3, 56, 56), normalised. cells: (rows, 4, 3) places
    in `CELL_WORDS` of each cell's names, IGNORED where it has none.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    pixels: torch.Tensor
    cells: torch.Tensor


def normalise_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """(images, 3, 56, 56), as the processor makes them of images that already have its size."""
    arrays = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return (torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255 - _MEAN) / _STD


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


def render_conversation(question: Question, prompt: PromptName, *, misread: bool) -> tuple[str, str]:
    """The user turn as the chat template renders it (image placeholder included) and the response with EOS."""
    reading = question.misreading if misread and question.misreading else question.reading
    task = build_task(question, _NO_IMAGE, "train")
    letter = "ABCD"[question.choices.index(reading.answer)]
    response = render_response(" ".join(reading.statements), f"The answer is ({letter}).", prompt)
    return f"<s>USER: <image>\n{render_prompt(prompt, task)} ASSISTANT:", f" {response}</s>"


def build_corpus(seed: int, num_questions: int = 2000) -> Iterator[str]:
    """Texts that hold every word of the nano world, for the tokenizer."""
    rng = random.Random(f"corpus/{seed}")
    for i in range(num_questions):
        question = make_question(rng, FAMILIES[i % len(FAMILIES)], "train")
        for prompt in cast("tuple[PromptName, ...]", get_args(PromptName)):
            for text in render_conversation(question, prompt, misread=False):
                yield text.replace("<s>", "").replace("</s>", "").replace("<image>", "")
        yield from (f" {fact}" for fact in list_facts(question.scene))


def draw_conversations(
    rng: random.Random,
    tokenizer: PreTrainedTokenizerFast,
    num_rows: int,
    prompts: Mapping[PromptName, float],
    misread: Mapping[str, float],
) -> Batch:
    """A batch with prompts in the given shares; a family's reading is wrong in the given share of its rows."""
    questions = [make_question(rng, rng.choice(FAMILIES), "train") for _ in range(num_rows)]
    names = rng.choices(list(prompts), list(prompts.values()), k=num_rows)
    turns = [
        render_conversation(question, name, misread=rng.random() < misread.get(question.family, 0.0))
        for question, name in zip(questions, names, strict=True)
    ]
    image = "<image>" * NUM_IMAGE_TOKENS
    users = [user.replace("<image>", image) for user, _ in turns]
    responses = [response for _, response in turns]
    pixels = normalise_pixels([draw_scene(question.scene, rng) for question in questions])
    cells = torch.tensor([label_cells(question.scene) for question in questions])
    return _pad(tokenizer, users, responses, pixels, cells)


def draw_descriptions(rng: random.Random, tokenizer: PreTrainedTokenizerFast, num_rows: int) -> Batch:
    """A batch without questions: eight true statements about each scene, absences left out."""
    scenes = [make_question(rng, rng.choice(FAMILIES), "train").scene for _ in range(num_rows)]
    facts = [[fact for fact in list_facts(scene) if " no " not in fact] for scene in scenes]
    said = [" ".join(rng.choices(choices, k=_NUM_STATEMENTS)) for choices in facts]
    users = [f"<s>USER: {'<image>' * NUM_IMAGE_TOKENS}\n ASSISTANT:"] * num_rows
    pixels = normalise_pixels([draw_scene(scene, rng) for scene in scenes])
    cells = torch.tensor([label_cells(scene) for scene in scenes])
    return _pad(tokenizer, users, [f" {text}</s>" for text in said], pixels, cells)


def draw_lookups(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, num_rows: int, share_in_full: float = 0.5
) -> Batch:
    """A text-only batch: four options, then look-ups of an option's word; only the letters carry the loss.

    Some rows ask in short (`red (B)`), a share as an answer is given (`red. The answer is (B).`).
    """
    users, responses = [], []
    for row in range(num_rows):
        words = rng.sample(CHOICE_WORDS, 4)
        options = " ".join(f"({letter}) {word}" for letter, word in zip("ABCD", words, strict=True))
        picks = [rng.randrange(4) for _ in range(_NUM_LOOKUPS)]
        users.append(f"<s>USER: Options: {options} ASSISTANT:")
        if row < share_in_full * num_rows:
            responses.append("".join(f" {words[pick]}. The answer is ({'ABCD'[pick]})." for pick in picks[:4]))
        else:
            responses.append("".join(f" {words[pick]} ({'ABCD'[pick]})" for pick in picks))
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
