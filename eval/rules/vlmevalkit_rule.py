"""VLMEvalKit's: github.com/open-compass/VLMEvalKit, vlmeval/utils/matching_util.py at 2cf2a36c (`can_infer`), without a
language model that reads the rest (its policy `exact_matching`; with one, three failures draw a random option).

1. A known refusal is an answer of its own, Z, which is never right.
2. Split at spaces and `.()[],:;!*#{}`, exactly one of the letters occurs, among the last four words.
3. "answer is B", of A to D, wherever it stands first.
4. Exactly one option's text occurs, in upper or lower case, in a text at most twice as long as all options together.

A text with a letter from Z only is a refusal, too. (Up to 134b4ea6 there was no step 3.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from string import ascii_uppercase

from vcot.eval.rules import Rule

_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SIGNS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_STATED = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
_REFUSED = "refused"
_OPTIONS = [frozenset(ascii_uppercase[:num]) for num in range(27)]
"""The letters of so many options."""


def infer(text: str, choices: Sequence[str]) -> str | None:
    """The letter that stands alone, or is stated, or else that of the one option whose text occurs."""
    said = text.lower()
    return _infer_letter(text, said, len(choices)) or _infer_text(said, tuple(choices))


def _infer_letter(text: str, said: str, num_choices: int) -> str | None:
    if _FAILED in text:
        return None
    if any(refusal in text for refusal in _REFUSALS):
        return _REFUSED
    words = text.translate(_SIGNS).split()
    letters = _OPTIONS[num_choices].intersection(words)
    if len(letters) == 1:
        [letter] = letters
        if words.index(letter) > len(words) - 5:
            return letter
    elif not letters and "Z" in words:
        return _REFUSED
    stated = _STATED.search(text) if "answer" in said else None
    letter = stated[1].upper() if stated else ""
    return letter if letter in _OPTIONS[num_choices] else None


def _infer_text(said: str, choices: tuple[str, ...]) -> str | None:
    texts, longest = _prepare(choices)
    if len(said) > longest:
        return None
    found = [index for index, text in enumerate(texts) if text in said]
    return chr(ord("A") + found[0]) if len(found) == 1 else None


@lru_cache(maxsize=8192)
def _prepare(choices: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    """The options in lower case, and the longest text in which they are looked for."""
    return tuple(choice.lower() for choice in choices), 2 * sum(map(len, choices))


VLMEVALKIT = Rule(infer)
