"""Which question a logged response answers: by what was asked, or by its id; never by a running number."""

import pytest

from vcot.eval.logged.layouts import Asked, Logged
from vcot.eval.logged.matching import Matcher
from vcot.pipeline.records import ImageRef, Task


def make_task(name, question="Which?", choices=("this", "that"), answer=1):
    image = ImageRef(sha256=name * 8, path=name, width=1, height=1)
    place = {"source": "scienceqa", "split": "test"}
    return Task(id=f"scienceqa/{name}", question=question, choices=choices, answer=answer, images=(image,), **place)


TASKS = [
    make_task("a", "Where?", ("here", "there"), 0),
    make_task("b", "Which colony?", answer=0),
    make_task("c", "Which colony?", answer=1),
    make_task("d", "Which colony?", answer=1),
]


def where(question="Where?", choices=("here", "there"), answer="A"):
    return Asked(question, choices, answer)


def colony(answer):
    return Asked("Which colony?", ("this", "that"), answer)


@pytest.fixture
def find():
    matcher = Matcher(TASKS, {"17": "scienceqa/a", "18": "scienceqa/gone"})
    return lambda name, asked=None, **fields: matcher.find(Logged("line 1", name, "x", asked=asked, **fields))


@pytest.mark.parametrize("name", ["scienceqa/a", "a", "17"])
def test_an_id_is_the_tasks_or_what_the_data_set_calls_it(find, name):
    assert find(name) == 0


@pytest.mark.parametrize("name", ["18", "0", ""])
def test_an_id_that_is_no_questions_is_unknown(find, name):
    assert find(name) == "unknown"


def test_what_was_asked_decides_before_a_number_that_is_some_other_questions(find):
    assert find("17", where(question="  Where?\n"), is_numbered=True) == 0
    assert find("17", Asked("Who?", ("here", "there"), "A"), is_numbered=True) == "unknown"
    assert find("17", is_numbered=True) == "unknown"


def test_options_in_another_order_are_another_question(find):
    turned = where(choices=("there", "here"), answer="B")
    assert find("x", turned) == "other_options"
    assert find("a", turned) == "other_options"


def test_a_question_in_other_words_is_known_by_id_and_options(find):
    assert find("17", where(question="A passage.\nWhere?")) == 0
    assert find("17", where(question="A passage.\nWhere?", answer="B")) == "other_gold"


@pytest.mark.parametrize("answer", ["B", "?"])
def test_another_gold_answer_or_one_out_of_range_is_told(find, answer):
    assert find("x", where(answer=answer)) == "other_gold"


def test_questions_that_are_alike_but_for_the_image_are_dealt_in_order(find):
    assert [find(name, colony("B")) for name in ("5", "9", "5", "9", "12")] == [2, 3, 2, 3, 3]
    assert find("7", colony("A")) == 1


def test_an_own_id_goes_before_the_order(find):
    assert find("d", colony("B")) == 3


def test_alike_questions_with_different_answers_are_not_told_apart_without_the_answer(find):
    assert find("x", colony("")) == "unknown"
    assert find("b", colony("")) == 1
