"""lmms-eval's: github.com/EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/scienceqa/utils.py at 75571cfe, `sqa_process_results`.

The text must be the letter, in upper or lower case, or begin with a capital letter and a full stop; whitespace around it
does not count. (Up to 2f636e7b, whitespace counted and the letter had to be a capital.)
"""

from __future__ import annotations

from collections.abc import Sequence

from vcot.eval.rules import Rule


def read_exact(text: str, choices: Sequence[str]) -> str | None:
    """The letter that the text is, or begins with."""
    said = text.strip()
    if len(said) == 1 or (said[:1].isupper() and said[1:2] == "."):
        return said[0].upper()[0]
    return None


LMMS_EVAL = Rule(read_exact)
