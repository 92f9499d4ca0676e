"""What differs between two texts: word by word, whatever they are."""

import time

import pytest

from vcot.services.view.examples import compare_texts


def rejoin(stretches, *kinds):
    return "".join(stretch.text for stretch in stretches if stretch.kind in kinds)


def test_what_is_the_same_in_two_texts_is_told_from_what_is_not():
    told = [(each.kind, each.text) for each in compare_texts("The cat is red.", "The cat was red.")]
    assert told == [("same", "The cat"), ("first", " is"), ("second", " was"), ("same", " red.")]


@pytest.mark.parametrize(
    ("first", "second"),
    [("x " * 2000, "x y " * 1000), ("The answer is A. " * 200, "The answer is (B). " * 200), ("x" * 9000, "")],
)
def test_texts_that_repeat_a_few_words_for_ever_are_compared_at_once(first, second):
    began = time.process_time()
    stretches = compare_texts(first, second)
    assert time.process_time() - began < 5, "it took minutes"
    assert rejoin(stretches, "same", "first") == first[:4000]
    assert rejoin(stretches, "same", "second") == second[:4000]


def test_a_long_text_of_usual_words_is_aligned_by_each_of_them():
    text = " ".join(f"the thing {number} is in the room and it is red." for number in range(90))
    stretches = compare_texts(text, text.replace("thing 40 is", "thing 40 was"))
    assert [each.text for each in stretches if each.kind != "same"] == [" is", " was"]
