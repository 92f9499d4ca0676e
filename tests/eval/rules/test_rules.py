"""Each published rule reads what its original reads, and no more; ours says why it reads nothing."""

import json
from pathlib import Path

import pytest

from vcot.eval.rules import RULES, Rule
from vcot.pipeline.errors import RecipeError

COLOURS = ("red", "blue", "green")
RULE_NAMES = tuple(RULES.built_ins)
ANSWERS = Path(__file__).parents[4] / "shared" / "data" / "answers" / "unread.json"

READ = {
    # text: vcot, scienceqa, llava, lmms_eval, vlmevalkit, inspect; a dot where nothing is read
    "B": "B.BBB.",
    "b": "B..B..",
    " B\n": "B..BB.",
    "B.": "B..BB.",
    "B. blue": "B.BBB.",
    "(B)": "B...B.",
    "blue": "B...B.",
    "The answer is B.": "BBB.B.",
    "The answer is B": "B...B.",
    "It is cold. The answer is B. It is": "BBB.B.",
    "The answer is A. No. The answer is B.": "B...A.",
    "the correct answer is **B**, for the sky is what one sees above": "B...B.",
    "ANSWER: B": "B...BB",
    "answer: b": "B....B",
    "ANSWER: B,": "B...BB",
    "ANSWER: A, B": "......",
    "ANSWER: A\nWait.\nANSWER: B": "B....B",
    "So ANSWER: B": "B...BB",
    "So ANSWER: A\nANSWER: B\nso ANSWER: C": "B....B",
    "The answer is blue.": "B...B.",
    "I see a blue sky and a green hill.": "......",
    "The answer is E.": "......",
    "E. none of these": "......",
    "A bird sits there and sings a song.": "......",
    "": "......",
    ".": "......",
    "Ответ: Б": "......",
}  # fmt: skip


def read_all(text, choices=COLOURS):
    picked = [RULES.resolve(name).pick(text, choices) for name in RULE_NAMES]
    return "".join("." if isinstance(found, str) else chr(ord("A") + found) for found in picked)


@pytest.mark.parametrize("text", READ)
def test_rules_read_as_their_originals_do(text):
    assert read_all(text) == READ[text]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I do not know.", "none"),
        ("", "none"),
        ("The answer is (A) or (B).", "two"),
        ("Both red and blue are right.", "two"),
        ("The answer is F.", "off_list"),
        ("(E)", "off_list"),
        ("The answer is Z.", "off_list"),
        ("A tree, and a hill.", "none"),
    ],
)
def test_ours_says_why_nothing_is_read(text, reason):
    assert RULES.resolve("vcot").pick(text, COLOURS) == reason


def test_only_scienceqas_own_rule_guesses():
    assert [name for name in RULE_NAMES if RULES.resolve(name).guesses] == ["scienceqa"]


@pytest.mark.parametrize("text", ["I can't process this file.", "Z", "Cannot determine the answer: A"])
def test_a_refusal_is_told_as_one_and_never_guessed(text):
    assert RULES.resolve("vlmevalkit").pick(text, COLOURS) == "refused"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("I would say C here now indeed", "C"),
        ("I say C here now indeed then", "."),
        ("C is what I would say", "."),
        ("C is what I say", "."),
        ("C is what I", "C"),
        ("The answer is D, for all of the reasons that I gave above", "."),
        ("The answer is C, for all of the reasons that I gave above", "C"),
        ("The ANSWER   is **c** for all of the reasons that I gave above", "C"),
    ],
)
def test_vlmevalkit_looks_at_the_last_four_words_or_at_what_is_stated(text, read):
    assert read_all(text)[4] == read


@pytest.mark.parametrize(("text", "read"), [("it is blue and so on too  ", "B"), ("it is blue and so on too   ", ".")])
def test_vlmevalkit_reads_an_options_words_in_a_text_up_to_twice_as_long_as_all_options(text, read):
    assert read_all(text, ("Red!", "BLUE", "green"))[4] == read


def test_a_letter_that_is_no_option_is_told_as_such():
    assert RULES.resolve("llava").pick("E", COLOURS) == "off_list"
    assert RULES.resolve("llava").pick("E", "vwxyz") == 4


@pytest.mark.parametrize("name", RULE_NAMES)
@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text", ["x" * 100_000, "The answer is " * 8000, "ANSWER: A, " * 10_000, " " * 100_000, "(A) " * 25_000]
)
def test_long_texts_are_read_in_time(name, text):
    RULES.resolve(name).pick(text, COLOURS)


def test_a_rule_of_ones_own_is_a_function(tmp_path, monkeypatch):
    (tmp_path / "letter_at_end.py").write_text(
        "from vcot.eval.rules import Rule\nLAST = Rule(lambda text, choices: text[-1:] or None)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rule = RULES.resolve("letter_at_end:LAST")
    assert isinstance(rule, Rule)
    assert [rule.pick(text, COLOURS) for text in ("so B", "", "?")] == [1, "none", "off_list"]


def test_a_mistyped_rule_is_told_with_its_nearest_name():
    with pytest.raises(RecipeError, match="no rule 'lava'; do you mean llava"):
        RULES.resolve("lava")


@pytest.mark.skipif(not ANSWERS.is_file(), reason="../shared/data/answers (answers of public models) is absent")
def test_published_answers_are_read_by_each_rule_as_often_as_by_its_original():
    rows = json.loads(ANSWERS.read_text("utf-8"))
    readings = [(read_all(row["text"], row["choices"]), row["reading"]) for row in rows]
    right = {name: sum(read[i] == reading for read, reading in readings) for i, name in enumerate(RULE_NAMES)}
    wrong = {
        name: sum(read[i] not in (".", reading) for read, reading in readings) for i, name in enumerate(RULE_NAMES)
    }
    assert right == {"vcot": 69, "scienceqa": 6, "llava": 33, "lmms_eval": 27, "vlmevalkit": 36, "inspect": 0}
    assert not any(wrong.values())
