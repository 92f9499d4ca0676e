"""An answer that is taken back, shared with another option or conditional is no answer; what looks alike is one."""

import time

import pytest

from vcot.pipeline.parsers import parse_choice, parse_or_explain

COLOURS = ("red", "blue", "dark blue", "green")

TAKEN_BACK = [
    "The answer is A. Just kidding.",
    "The answer is A because the sky is red. Just kidding!",
    "The answer is A. I'm only joking.",
    "The answer is A (just kidding)",
    "The answer is (A). JK",
    "The answer is red. Scratch that.",
    "The answer is A. Oh, never mind.",
    "The answer is A. I take that back.",
    "The answer is A. That was a joke.",
    "The answer is A. Ignore that.",
    "The answer is A. Disregard my previous answer.",
    "The answer is A. I was wrong.",
    "The answer is A. Sorry, I made a mistake.",
    "The answer is A - I have changed my mind.",
    "The answer is A. My mistake!",
    "The answer is A. April fools!",
    "The answer is A. Or is it?",
    "The answer is A. Not really.",
    "The answer is A. Or maybe not.",
    "The answer is A. Well, no.",
    "The answer is A. Hmm, maybe not.",
    "Answer: A. Just kidding.",
    "A\n\nJust kidding.",
    "The answer is A. Explanation: A is wrong.",
    "Answer: A\nExplanation: option A is not the right answer.",
    "The answer is (A). (A) is the wrong option.",
]

SHARED = [
    "The answer is A because both A and B are right",
    "The answer is A because A and B are correct",
    "The answer is (A). Both (A) and (B) are correct.",
    "The answer is A because both red and blue are right",
    "The answer is A because either A or B works",
    "The answer is A because either would be right: B or A. Both are right.",
    "The answer is A since B is also right",
    "The answer is A since it is red. B is correct too.",
    "The answer is A, though B works as well",
    "The answer is (A). Both options are correct.",
    "The answer is A. All of the options are correct.",
    "Answer: A (if red) or B",
    "Answer: A (if it is red), B (if blue)",
    "The answer is A, if red; otherwise B",
    "The answer is (A) if red, (B) if blue.",
    "The answer is A (if red)",
    "The answer is (A), assuming that it is red",
    "The answer is A (maybe B)",
    "The answer is A (B is also ok)",
    "The answer is A (see the picture) or (B)",
    "The answer is red (if dark) or blue",
    "Answer: A\nExplanation: the correct answer is B.",
    "Answer: A. Explanation: B is right.",
    "(A) red\nExplanation: we see the sky, so the answer is blue.",
]

READ = [
    ("The answer is A. Just kidding. The answer is B.", "B"),
    ("The answer is A. The joke is that it is red.", "A"),
    ("The answer is A. He was just kidding.", "A"),
    ("The answer is A. Never mind the clouds.", "A"),
    ("The answer is A. We ignore that part of the picture.", "A"),
    ("The answer is A. I was wrong about the clouds before.", "A"),
    ("The answer is A. I am sure that it is so, and you can take that back to your teacher.", "A"),
    ("The answer is A. Is the sky green? Not really.", "A"),
    ("The answer is A since both B and C are wrong", "A"),
    ("The answer is A. Both B and C are right about the sky.", "A"),
    ("The answer is B because A and B are both blue.", "B"),
    ("The answer is A, and B is also wrong.", "A"),
    ("The answer is A. All the other options are wrong.", "A"),
    ("The answer is A, if I am not mistaken.", "A"),
    ("The answer is A (if you look at it).", "A"),
    ("The answer is A (see the picture), not (B).", "A"),
    ("The answer is A (red, not blue).", "A"),
    ("The answer is A (the sky) and B is wrong.", "A"),
    ("The answer is A. If it were blue, B would be right.", "A"),
    # an explanation
    ("B. Explanation: A is wrong", "B"),
    ("(B) Explanation: A is wrong.", "B"),
    ("The answer is B Explanation: A is wrong", "B"),
    ("Answer: B Explanation: A is wrong", "B"),
    ("The answer is B.\nExplanation: A is wrong", "B"),
    ("Explanation: the sky is so, hence the answer is B.", "B"),
    ("Answer: B\nExplanation: the sky is so, hence the answer is B.", "B"),
    # a further question that has a number
    ("The answer is B.\n1. What else? The answer is A.", "B"),
    ("The answer is B. 1. What else? The answer is A.", "B"),
    ("B\n1. What else? The answer is A.", "B"),
    ("The answer is B.\n\n2) What is green?\nThe answer is A.", "B"),
    ("1. What is it?\nThe answer is B.\n2. What else?\nThe answer is A.", "B"),
    ("1. What is it? The answer is B.", "B"),
    ("We find the answer in steps.\n1. What is it? The sky.\n2. Which colour? The answer is B.", "B"),
    (
        "The answer is what we look for:\n1. What is it? The sky.\n2. The answer is B.\n3. And now? The answer is A.",
        "B",
    ),
    ("The answer is A.\n1. The sky is red.\n2. So the answer is B.", "B"),
]

ABOUT_A_LETTER = [
    "A is the first letter of the alphabet",
    "B is the second letter.",
    "A is a vowel.",
    "A is an article",
    "A is similar to B",
    "A is unclear",
]


@pytest.mark.parametrize("text", TAKEN_BACK)
def test_what_is_taken_back_is_no_answer(text):
    assert parse_or_explain(text, COLOURS) == "none"


@pytest.mark.parametrize("text", SHARED)
def test_an_answer_that_is_not_one_option_is_none(text):
    assert parse_or_explain(text, COLOURS) in ("none", "two")


@pytest.mark.parametrize("text", ["The answer is A because both A and B are right", "Answer: A (if red) or B"])
def test_the_reason_is_that_two_are_named(text):
    assert parse_or_explain(text, COLOURS) == "two"


@pytest.mark.parametrize(("text", "letter"), READ)
def test_what_looks_like_a_hedge_is_read(text, letter):
    assert parse_choice(text, COLOURS) == letter


@pytest.mark.parametrize("text", ABOUT_A_LETTER)
def test_a_sentence_about_a_letter_is_no_answer(text):
    assert parse_choice(text, COLOURS) is None


@pytest.mark.parametrize(
    ("text", "choices", "letter"),
    [
        ("The answer is C because both A and B are right", ("red", "blue", "both"), "C"),
        ("The answer is C. Both are right.", ("red", "blue", "both of them"), "C"),
        ("The answer is D. All of the options are correct.", ("red", "blue", "green", "all of the above"), "D"),
        ("The answer is A. Both A and C are right.", ("same", "other", "same"), "A"),
        ("The answer is A. A is false, for it is blue.", ("It is red.", "It is blue."), "A"),
        ("The answer is (D) or (B)", ("red", "blue", "green", "or"), None),
        ("B is the vowel.", ("b", "e"), None),
    ],
)
def test_options_that_speak_of_several(text, choices, letter):
    assert parse_choice(text, choices) == letter


OTHER_SIGNS = [
    ("\u24b7", "B"),
    ("\u24d1", "B"),
    ("\u249d", "B"),
    ("The answer is \U0001d401.", "B"),
    ("The answer is \U0001d5d5.", "B"),
    ("\u3014B\u3015", "B"),
    ("\u300aB\u300b", "B"),
    ("\u3008B\u3009", "B"),
    ("\uff3bB\uff3d", "B"),
    ("\ufe59B\ufe5a", "B"),
    ("B\u3001 blue", "B"),
    ("B\uff61", "B"),
    ("\u200f(B)\u200f", "B"),
    ("\u202bB\u202c", "B"),
    ("\u2067B\u2069", "B"),
    ("B\ufe0f", "B"),
    ("The answer is (B)\u3002\u56e0\u4e3a\u5929\u7a7a", "B"),
]

UNSURE_SIGNS = [
    "\u0410",  # a Cyrillic letter that looks like A
    "The answer is \u0412",
    "The answer is (\u0412) blue",
    "The answer is \u0391.",  # a Greek one
    "The answer is A\u0336 B",  # struck through
    "The answer is B\u0301",
    "The answer is A\u061f",  # an Arabic question mark
    "The answer is (A)\ufe56",
    "The answer is B\u3001A",
    "The answer is B\uff0c\u4e0d\uff0cA",
    "The answer is (A)\u6216(B)",
    "The answer is (A) \u6216 (B)",
    "The answer is (A) oder (B)",
    "The answer is (A) ou (B)",
    "The answer is (A) \u0438 (B)",
    "The answer is B. Nein, A.",
    "The answer is (B) \u4e0d\u5bf9",
    "The answer is (B)\u4e0d\u5bf9",
    "(B) \u4e0d\u6b63\u786e",
    "La respuesta es A",
    "Die Antwort ist C",
    "A mi juicio, B",
    "\u7b54\u6848\u662f A",
    "A oder B",
]


@pytest.mark.parametrize(("text", "letter"), OTHER_SIGNS)
def test_a_letter_in_other_signs_is_read(text, letter):
    assert parse_choice(text, COLOURS) == letter


@pytest.mark.parametrize("text", UNSURE_SIGNS)
def test_what_is_unsure_in_other_scripts_has_a_reason(text):
    assert parse_or_explain(text, COLOURS) in ("none", "two", "off_list")


@pytest.mark.parametrize("before", ["The answer is A. ", "A\n", "Answer: A (if "])
@pytest.mark.parametrize(
    "word",
    ["both ", "both A and ", "both A and B ", "A and ", "A and B are ", "B is ", "just ", "I was ", "(", "1. What ",
     "1. a?\n", "Explanation: ", "\nExplanation: ", "if ", "A is wrong ", "kidding. ", "(a) "],
)  # fmt: skip
def test_hedges_for_ever_are_read_in_time(before, word):
    began = time.monotonic()
    parse_choice(before + word * (100_000 // len(word)) + "x", COLOURS)
    assert time.monotonic() - began < 4  # a rule that is quadratic takes minutes
