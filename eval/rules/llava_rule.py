"""LLaVA's: github.com/haotian-liu/LLaVA, llava/eval/eval_science_qa.py at ce1aa08d (unchanged at c121f043, the newest).

A text that is one of the letters A to E, or that begins with one and ". "; else ScienceQA's "The answer is X", exactly once.
There is no random option: what cannot be read is wrong. Letters only count: the option's text is never looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

from vcot.eval.rules import Rule
from vcot.eval.rules.scienceqa_rule import STATED

_LETTERS = ("A", "B", "C", "D", "E")


def read_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter that the text is, begins with, or states once."""
    if text in _LETTERS:
        return text
    if text[:1] in _LETTERS and text[1:3] == ". ":
        return text[0]
    found = STATED.findall(text)
    return found[0] if len(found) == 1 and found[0] in _LETTERS else None


LLAVA = Rule(read_letter)
