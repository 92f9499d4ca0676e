"""The nano world: true, balanced, image-bound questions with splits that share no image."""

import hashlib
import io
import random
from collections import Counter
from dataclasses import replace

import pytest
from PIL import Image

from vcot.pipeline.prompts import split_thought
from vcot.pipeline.records import ImageRef
from vcot.pipeline.sources.nano.questions import FAMILIES, SUBJECTS, generate_nano, make_question, render_target
from vcot.pipeline.sources.nano.scene import Cell, Scene, assign_split, draw_scene, list_facts

SPLITS = ("train", "validation", "test")


class MemoryStore:
    def __init__(self):
        self.images = {}

    def put_png(self, image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
        self.images[sha256] = image
        return ImageRef(sha256=sha256, path=f"images/{sha256}.png", width=image.width, height=image.height)


def statements(thought):
    return [f"{sentence.strip()}." for sentence in thought.split(".") if sentence.strip()]


@pytest.fixture(scope="module")
def questions():
    rng = random.Random(7)
    return [make_question(rng, FAMILIES[i % len(FAMILIES)], "train") for i in range(9 * 400)]


def test_same_seed_gives_the_same_tasks_and_a_longer_run_begins_with_the_shorter():
    store = MemoryStore()
    first = list(generate_nano("test", 40, 3, store))
    assert first == list(generate_nano("test", 60, 3, MemoryStore()))[:40]
    assert first != list(generate_nano("test", 40, 4, MemoryStore()))
    assert {task.images[0].sha256 for task in first} == set(store.images)


def test_tasks_are_complete_and_cover_every_family_evenly():
    tasks = list(generate_nano("validation", 90, 0, MemoryStore()))
    assert len({task.id for task in tasks}) == 90
    assert Counter(task.family for task in tasks) == dict.fromkeys(FAMILIES, 10)
    assert Counter(task.subject for task in tasks) == {"NAT": 30, "SOC": 30, "LAN": 30}
    for task in tasks:
        assert task.source == "nano"
        assert task.split == "validation"
        assert task.subject == SUBJECTS[task.family]
        assert len(set(task.choices)) == 4
        assert set(statements(task.rationale)) <= set(task.facts)
        assert (task.images[0].width, task.images[0].height) == (56, 56)


def test_splits_share_no_image_and_no_scene_up_to_colour():
    images, forms = {}, {}
    for split in SPLITS:
        rng = random.Random(1)
        images[split], forms[split] = set(), set()
        for i in range(600):
            scene = make_question(rng, FAMILIES[i % 9], split).scene
            images[split].add(hashlib.sha256(draw_scene(scene, rng).tobytes()).hexdigest())
            cells = [replace(c, colour=c.colour if scene.kind == "map" else "") if c else None for c in scene.cells]
            forms[split].add((scene.kind, tuple(cells)))
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not images[a] & images[b]
        assert not forms[a] & forms[b]


def test_recolouring_a_scene_never_moves_it_to_another_split():
    scene = Scene("shapes", (Cell("star", "red"), None, Cell("ring", "blue"), None))
    recoloured = Scene("shapes", (Cell("star", "green"), None, Cell("ring", "red"), None))
    assert assign_split(scene) == assign_split(recoloured)


def test_gold_letter_is_uniform_in_every_family(questions):
    for family in FAMILIES:
        letters = Counter(q.answer for q in questions if q.family == family)
        assert all(70 <= letters[i] <= 130 for i in range(4)), (family, letters)  # 100 expected, sd 8.7


@pytest.mark.parametrize("by", ["word", "rank", "pair"])
def test_a_guess_from_the_text_is_at_chance(by, questions):
    """Policies fitted on one half and tried on the other: by the answer word's prior, its rank, its partners."""

    def key(question, choice):
        match by:
            case "word":
                return (question.question, choice)
            case "rank":
                return (question.family, sorted(question.choices).index(choice))
            case _:
                return (question.family, choice, tuple(sorted(question.choices)))

    for family in FAMILIES:
        rows = [q for q in questions if q.family == family]
        seen, won = Counter(), Counter()
        for q in rows[::2]:
            seen.update(key(q, choice) for choice in q.choices)
            won[key(q, q.reading.answer)] += 1
        prior = {k: (won[k] + 1) / (count + 4) for k, count in seen.items()}
        guesses = [max(q.choices, key=lambda c: (prior.get(key(q, c), 0.25), c)) for q in rows[1::2]]
        right = sum(g == q.reading.answer for g, q in zip(guesses, rows[1::2], strict=True)) / len(guesses)
        assert right < 0.38, (family, right)  # chance 0.25, sd 0.031


def test_a_misreading_says_something_false_and_leads_to_another_choice(questions):
    for q in questions:
        facts = set(list_facts(q.scene))
        assert set(q.reading.statements) <= facts
        if q.misreading is not None:
            assert not set(q.misreading.statements) <= facts
            assert q.misreading.answer in q.choices
            assert q.misreading.answer != q.reading.answer


def test_facts_of_a_scene_are_all_its_true_statements_and_no_false_one():
    scene = Scene("shapes", (Cell("star", "red"), Cell("ring", "blue"), None, Cell("star", "green")))
    facts = list_facts(scene)
    assert len(facts) == len(set(facts))
    for true in (
        "The star is at the top left.",
        "The star is at the bottom right.",
        "The star is green.",
        "The top row has one star.",
        "The bottom row has no rings.",
        "There are two stars.",
        "There are no crosses.",
        "The star is left of the ring.",
        "The star is below the ring.",
    ):
        assert true in facts
    for false in ("The star is blue.", "The ring is at the top left.", "The ring is left of the star."):
        assert false not in facts


def test_facts_of_the_other_kinds():
    goods = (("fish", 2), ("key", 1), ("hat", 4), ("lamp", 3))
    market = list_facts(Scene("market", tuple(Cell(good, count=price) for good, price in goods)))
    assert {"The key costs one coin.", "The key is the cheapest.", "The hat is the dearest."} <= set(market)
    assert "The fish is the cheapest." not in market
    colours = ("red", "blue", "green", "purple")
    lands = list_facts(Scene("map", tuple(Cell("land", colour, int(colour == "green")) for colour in colours)))
    assert "The capital is at the bottom left." in lands
    assert "The bottom left land is green." in lands
    assert len(lands) == 5
    letters = list_facts(Scene("letters", tuple(Cell(t, ink) for t, ink in zip("MEQT", colours, strict=True))))
    assert {"E comes first.", "The vowel is E.", "The red letter is M.", "The top letters are E and M."} <= set(letters)


def test_every_thing_is_drawn_differently():
    """A family whose answers looked alike could not be answered from the image."""
    pictures = set()
    cells = {
        "shapes": [Cell("star", "red"), Cell("cross", "red"), Cell("star", "orange")],
        "market": [Cell("fish", count=1), Cell("fish", count=2), Cell("key", count=1)],
        "map": [Cell("land", "red", 1), Cell("land", "red", 0)],
        "letters": [Cell("C", "red"), Cell("G", "red")],
    }
    for kind, cell in [(kind, cell) for kind, group in cells.items() for cell in group]:
        image = draw_scene(Scene(kind, (cell, None, None, None)), random.Random(0))
        assert isinstance(image, Image.Image)
        assert (image.mode, image.size) == ("RGB", (56, 56))
        pictures.add(image.tobytes())
    assert len(pictures) == 10


def test_targets_keep_each_prompts_format():
    task = next(generate_nano("train", 1, 0, MemoryStore()))
    final = f"The answer is ({task.answer_letter})."
    assert render_target(task, "zero_shot") == final
    for prompt in ("thought_specific", "thought_generic", "cot"):
        thought, answer = split_thought(prompt, render_target(task, prompt))
        assert thought == task.rationale
        assert answer == final
