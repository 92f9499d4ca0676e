"""The drawings of unusual things: a usual and a contradicting one of each, with the same question."""

import io
from collections import Counter

import pytest
from PIL import Image, ImageChops

from vcot.pipeline.errors import DataError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources import load_tasks
from vcot.pipeline.sources.unusual import THINGS, UNUSUAL, USUAL, generate_unusual

SECTION = TasksSection(source="unusual", split="test")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return ImageStore(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def tasks(store):
    return list(generate_unusual(store))


def test_each_thing_is_asked_about_twice_and_only_one_drawing_contradicts_the_prior(tasks):
    assert len(tasks) == 2 * len(THINGS) == 48
    assert len({task.id for task in tasks}) == 48
    for usual, odd in zip(tasks[::2], tasks[1::2], strict=True):
        assert (usual.family, odd.family) == (USUAL, UNUSUAL)
        assert (usual.question, usual.choices, usual.prior) == (odd.question, odd.choices, odd.prior)
        assert usual.answer == usual.prior != odd.answer
        assert len(set(usual.choices)) == len(usual.choices)


def test_every_drawing_differs_visibly_from_all_others(tasks, store):
    images = [Image.open(io.BytesIO(store.read(task.images[0]))) for task in tasks]
    assert {(image.size, image.mode) for image in images} == {((336, 336), "RGB")}
    assert len({task.images[0].sha256 for task in tasks}) == 48
    for usual, odd in zip(images[::2], images[1::2], strict=True):
        changed = ImageChops.difference(usual, odd).convert("L").point(lambda value: 255 * (value > 40))
        assert changed.histogram()[255] > 300, "pixels that differ"


def test_drawings_are_the_same_each_time(tasks, tmp_path):
    assert [task.images[0].sha256 for task in generate_unusual(ImageStore(tmp_path))] == [
        t.images[0].sha256 for t in tasks
    ]


def test_no_letter_is_the_priors_or_the_right_one_much_more_often(tasks):
    odd = [task for task in tasks[1::2] if len(task.choices) == 4]
    for letters in (Counter(task.prior_letter for task in odd), Counter(task.answer_letter for task in odd)):
        assert set(letters) == set("ABCD")
        assert max(letters.values()) <= len(odd) / 2.5


def test_they_are_a_test_and_nothing_to_train_on(tmp_path):
    assert len(load_tasks(SECTION, tmp_path, ImageStore(tmp_path))) == 48
    for update in ({"split": "train"}, {"num_tasks": 5}, {"path": "x"}):
        with pytest.raises(DataError, match="asked whole"):
            load_tasks(SECTION.model_copy(update=update), tmp_path / "other", ImageStore(tmp_path))
