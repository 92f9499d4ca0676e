"""Questions about things that are not in the drawing, beside the same about things that are."""

import pytest

from tests.eval.test_benchmark import respond
from vcot.eval.benchmark import BENCHMARKS
from vcot.pipeline.errors import DataError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources import load_tasks
from vcot.pipeline.sources.absent import ABSENT, THERE, generate_absent


@pytest.fixture
def tasks(tmp_path):
    return list(generate_absent(ImageStore(tmp_path)))


def test_each_question_is_asked_about_its_thing_and_about_another_with_the_same_options(tasks):
    assert len(tasks) == 42
    there, absent = ([task for task in tasks if task.family == family] for family in (THERE, ABSENT))
    for one, other in zip(there, absent, strict=True):
        assert (one.question, one.choices, one.prior) == (other.question, other.choices, other.prior)
        assert one.images != other.images
        assert one.answer == one.prior
        assert other.choices[other.answer].startswith("there is no ")
    shown = [[task.images[0].sha256 for task in some] for some in (there, absent)]
    assert sorted(shown[0]) == sorted(shown[1]), "no drawing tells by itself whether its question is the absent one"
    assert len(set(shown[0])) == 21


def test_the_order_of_options_tells_nothing_and_stays(tasks, tmp_path):
    places = {task.answer for task in tasks if task.family == ABSENT}
    assert len(places) >= 4
    assert tasks == list(generate_absent(ImageStore(tmp_path)))


def test_it_is_asked_whole(tmp_path):
    section = TasksSection(source="absent", split="test")
    assert len(load_tasks(section, tmp_path, ImageStore(tmp_path))) == 42
    with pytest.raises(DataError, match="asked whole"):
        load_tasks(section.model_copy(update={"num_tasks": 3}), tmp_path, ImageStore(tmp_path))


def test_the_benchmark_counts_the_two_apart(tasks):
    benchmark = BENCHMARKS.resolve("absent")
    [stop_sign] = [task for task in tasks if task.id == "absent-stop-sign"]
    scores = [benchmark.score(stop_sign, respond(f"The answer is ({letter})")) for letter in "ABCDE"]
    assert {score.subject for score in scores} == {"absent"}
    assert [score.value for score in scores].count("correct") == 1
    assert set(benchmark.columns) == {THERE, ABSENT}
