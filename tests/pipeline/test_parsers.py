"""The parser reads what is said and never guesses."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcot.pipeline.parsers import parse_choice

COLOURS = ("red", "blue", "dark blue", "green")

READ = [
    ("The answer is (B)", "B"),
    ("The answer is (B).", "B"),
    ("The answer is (b).", "B"),
    ("The answer is B", "B"),
    ("The answer is B.", "B"),
    ("The answer is: B", "B"),
    ("the answer is **B**.", "B"),
    ('The answer is "B".', "B"),
    ("THE ANSWER IS (D)!", "D"),
    ("The answer is\n(B)", "B"),
    ("The answer is B because the sky is.", "B"),
    ("The answer is B, since it is blue", "B"),
    ("The answer is (B) blue.", "B"),
    ("B <think>or is it A", "B"),
    ("The answer is (B) because of it, not (A).", "B"),
    ("The answer is B. blue", "B"),
    ("The answer is (B. blue)", "B"),
    ("The answer is ( B )", "B"),
    ("The answer is (blue)", "B"),
    ("The answer is (Blue).", "B"),
    ("The answer is blue", "B"),
    ("The answer is BLUE. I am sure.", "B"),
    ("The answer is dark blue.", "C"),
    ("The answer is (dark  blue)", "C"),
    ("The answer is 'red'.", "A"),
    ("The sky is blue. The answer is (A). Wait. The answer is (B).", "B"),
    ("The answer is (A). The answer is (B).", "B"),
    ("B", "B"),
    (" B. ", "B"),
    ("(B)", "B"),
    ("(B).", "B"),
    ("B. blue", "B"),
    ("B: blue", "B"),
    ("(B) blue.", "B"),
    # other words for the same statement
    ("The final answer: B", "B"),
    ("The correct answer is (B).", "B"),
    ("The correct answer is B. Some things are blue, and others red.", "B"),
    ("The final answer is B.", "B"),
    ("My answer is (B)", "B"),
    ("The best option is (B)", "B"),
    ("So the answer would be (B).", "B"),
    ("The answer is most likely (B).", "B"),
    ("### Final answer\nB", "B"),
    ("**Answer:** (B) blue", "B"),
    ("It is the sky. Answer: B", "B"),
    ("The answer is \\boxed{B}.", "B"),
    ("We see a sky, so $\\boxed{\\text{B}}$", "B"),
    ("<answer>B</answer>", "B"),
    ("Some thought. <answer> (B) blue </answer>", "B"),
    # other notations of a letter and its text
    ("The answer is option B.", "B"),
    ("The answer is Option (B) blue. The sky is.", "B"),
    ("The answer is option b", "B"),
    ("The answer is Option B: blue.", "B"),
    ("The answer is B - blue.", "B"),
    ('The answer is "B" - Blue.', "B"),
    ("The answer is B \u2013 blue", "B"),
    ("The answer is B (blue). The sky is.", "B"),
    ("The answer is B) blue", "B"),
    ("The answer is [B]", "B"),
    ("The answer is B blue", "B"),
    ("The answer is B. A is wrong.", "B"),
    # a text that goes on
    ("The answer is blue, the colour of the sky.", "B"),
    ('The answer is "blue" which the sky has.', "B"),
    ("The answer is blue because of the sky.", "B"),
    ("The answer is dark blue, which is a blue.", "C"),
    ("The answer is the blue.", "B"),
    # no statement
    ("blue", "B"),
    ("Dark blue.", "C"),
    ("blue\n\nThe sky has that colour.", "B"),
    ("B. blue\n\nThe sky has that colour.", "B"),
    ("B. blue. The sky has that colour.", "B"),
    ("B\n\nThe sky has that colour.", "B"),
    ("B is the colour of the sky.", "B"),
    # what is not the answer
    ("<think>The answer is (A). Or not?</think>The answer is (B)", "B"),
    ("Maybe red. The answer is (A).</think>\n\n(B)", "B"),
    ("The answer is (B).\n\nQuestion: What is green?\nOptions: (A) grass\nThe answer is (A).", "B"),
    ("The answer is (B).\nUSER: Why?\nASSISTANT: The answer is (A).", "B"),
    ("B. blue\n\n### Question: What is green?\nThe answer is (A).", "B"),
    ("Question: What is it?\nOptions: (A) red (B) blue\nThe answer is (B).", "B"),
    ("So.\nQuestion: What is it?\nThe answer is (B).\nQuestion: What is green?\nThe answer is (A).", "B"),
    ("Final answer: B\nQuestion: What is green?\nFinal answer: D", "B"),
    # signs whose lower case has another length
    (100 * "\u0130" + ". The answer is B" + 30 * ", the colour", "B"),
]

NOT_READ = [
    "",
    "B. Let me look at the picture.",
    "A red thing",
    "The answer is",
    "The answer is ()",
    "The answer is (",
    "The answer is (B",
    "The answer is (blue",
    "The answer is not (B)",
    "The answer is unclear.",
    "The answer is a blue one",
    "The answer is A blue one",
    "The answer is (E)",
    "The answer is E.",
    "The answer is Z",
    "E",
    "(E)",
    "The answer is (A) or (B)",
    "The answer is A or B.",
    "The answer is (A), (B)",
    "The answer is A and B.",
    "The answer is A/B",
    "The answer is (A and B)",
    "The answer is (red) or (blue)",
    "The answer is red or blue",
    "The answer is red blue",
    "The answer is (B) red.",
    "The answer is B. red",
    "B. red",
    "The answer is Blueberry",
    "The answer is (B). No: the answer is hard to tell.",
    "The answer is (answer)",
    "The answer is B) red",
    "The answer is (A) (B)",
    "The answer is (A)? No, (B).",
    "The answer is (A). No, wait.",
    "The answer is (A) - blue",
    "The answer is option A or option B",
    "The answer is red, blue",
    "The answer is red - blue",
    "The answer is blue, no: red",
    "The answer is \\boxed{A} or \\boxed{}",
    "The answer is blue-ish",
    "The wrong answer is (B)",
    "The other option is (B)",
    "B is not right.",
    "B is wrong.",
    "Answer: I cannot tell.",
    "<think>The answer is (B)",
    "<answer>(A) or (B)</answer>",
    "Blue is a colour.",
    "red? No, blue.",
    "red, no: (B)",
]


@pytest.mark.parametrize(("text", "letter"), READ)
def test_read(text, letter):
    assert parse_choice(text, COLOURS) == letter


@pytest.mark.parametrize("text", NOT_READ)
def test_not_read(text):
    assert parse_choice(text, COLOURS) is None


@pytest.mark.parametrize(
    ("said", "choices", "letter"),
    [
        ("(F)", ("F", "f"), "A"),  # beyond the letters: the option's text
        ("(f)", ("F", "f"), "B"),
        ("(B)", ("B", "A"), "B"),  # the prompt's letters win over one-letter options
        ("C. elegans", ("C. elegans", "E. coli", "D. melanogaster"), "A"),
        ("A breath of Fresh Air.", ("A breath of fresh air", "A breath of Fresh Air"), "B"),
        ("a breath of fresh air", ("A breath of fresh air", "A breath of Fresh Air"), None),
        ("1.5", ("1", "1.5"), "B"),
        ("1.5", ("1", "2"), None),
        ("Dr. Grey. He is old.", ("Dr. Grey", "Dr. White"), "A"),
        ("(2, 3)", ("(3, 2)", "(2, 3)"), "B"),
        ("((2, 3))", ("(3, 2)", "(2, 3)"), "B"),
        ("(red (dark))", ("red", "red (dark)"), "B"),
        ("Hello!", ("Hello.", "Hello!"), "B"),
        ("hello", ("Hello.", "Hello!"), None),
        (".", ("?", "stop"), None),
        ("?", ("?", "!"), None),
        ("same", ("same", "other", "same"), "A"),  # whoever names either is right: vcot.pipeline.records.is_same_option
        ("(C) same", ("same", "other", "same"), "C"),
        ("yes, it turns", ("no", "yes"), "B"),
        ('"B" - No.', ("yes", "no"), "B"),
        ("B - 2/4.", ("4/4", "2/4"), "B"),
        ("2/4", ("2", "4"), None),
        ("the U.S. Constitution, of 1789", ("the U.S. Constitution", "the Magna Carta"), "A"),
        ("When will it rain?", ("When will it rain?", "Why does it rain?"), "A"),
        ("\u201cthe end\u201d", ('"the end"', '"The End"'), "A"),
        ("2*3", ("2*3", "23"), "A"),
        ("A and B", ("A", "B", "A and B"), "C"),
        ("(Boston)", ("Plymouth", "Albany", "Wichita", "Boston"), "D"),
    ],
)
def test_unusual_options(said, choices, letter):
    assert parse_choice(f"The answer is {said}", choices) == letter


words = st.text(string.ascii_lowercase, min_size=2, max_size=8)
thoughts = st.text(st.characters(exclude_characters="<["), max_size=60)
"""Without the signs of markup, which may end the model's turn."""
options = st.lists(words, min_size=2, max_size=8, unique=True).map(tuple)


@given(st.text(max_size=200), options)
def test_any_text_gives_an_option_or_none(text, choices):
    for said in (text, f"The answer is {text}"):
        letter = parse_choice(said, choices)
        assert letter is None or letter in string.ascii_uppercase[: len(choices)]


@given(options, st.data(), thoughts)
def test_every_option_can_be_said(choices, data, thought):
    index = data.draw(st.integers(0, len(choices) - 1))
    letter = string.ascii_uppercase[index]
    for said in (
        f"({letter})",
        f"{letter}.",
        choices[index],
        f"({choices[index].upper()})",
        f"({letter}) {choices[index]}",
    ):
        assert parse_choice(f"{thought}\nThe answer is {said}", choices) == letter


@given(options, st.sampled_from(string.ascii_uppercase))
def test_letter_beyond_the_options_is_no_answer(choices, letter):
    known = letter in string.ascii_uppercase[: len(choices)]
    assert parse_choice(f"The answer is ({letter})", choices) == (letter if known else None)


@given(st.text(string.ascii_lowercase + " .,\n", max_size=100), options)
def test_words_without_a_statement_are_no_answer(text, choices):
    first = text.strip(" .,\n").partition("\n")[0].strip(" .,")
    assert parse_choice(text, choices) is None or first in choices or len(first) == 1


@pytest.mark.parametrize(
    "text",
    [
        "The answer is " + "a. " * 100_000,
        "The answer is " + "(" * 2_000 + "B" + ")" * 2_000,
        "The answer is (red). " * 20_000,
        "\n" * 300_000,
        "answer:\n" * 20_000,
        "Question: is it?\n" * 20_000,
        "<think>" * 50_000,
        "<answer>" * 50_000,
    ],
)
@pytest.mark.timeout(10)  # any rule that is quadratic takes minutes
def test_long_texts_are_read_in_time(text):
    parse_choice(text, COLOURS)


UNREAD = Path(__file__).parents[3] / "shared" / "data" / "answers" / "unread.json"


@pytest.mark.skipif(not UNREAD.is_file(), reason="../shared/data/answers (answers of public models) is absent")
def test_answers_of_public_models():
    answers = json.loads(UNREAD.read_text("utf-8"))
    misread = [answer for answer in answers if parse_choice(answer["text"], answer["choices"]) != answer["reading"]]
    assert answers
    assert not misread


@given(options, st.data())
def test_two_letters_are_no_answer(choices, data):
    first, second = data.draw(st.permutations(string.ascii_uppercase[: len(choices)]))[:2]
    for said in (f"({first}) or ({second})", f"{first} and {second}", f"({first}), ({second})"):
        assert parse_choice(f"The answer is {said}", choices) is None


@pytest.mark.parametrize(
    "further",
    [
        "Given the question, please choose the answer.",
        "Please answer the following question.",
        "please select the correct answer.",
        "USER: what is next?",
    ],
)
def test_what_a_model_asks_itself_in_the_same_line_is_not_answered(further):
    assert parse_choice(f"The answer is A. {further} The answer is B.", ("red", "blue")) == "A"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Yes, it is.", "A"),
        ("No. It is not there.", "B"),
        ("Yes and no", None),
        ("Yes, or rather no", None),
        ("Yes. Or is it no?", None),
        ("yesterday", None),
    ],
)
def test_yes_and_no_are_read_where_they_stand_alone_or_before_a_reason(text, letter):
    assert parse_choice(text, ("yes", "no")) == letter
