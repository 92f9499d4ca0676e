"""ScienceQA's own: github.com/lupantech/ScienceQA, models/run_gpt3.py at 360b71cb (`get_gpt3_result`, `get_pred_idx`).

The outer whitespace is cut off, and "The answer is X" with one more character behind X must occur exactly once. Any other
text gets a random option.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vcot.eval.rules import Rule

STATED = re.compile(r"The answer is ([A-Z]).")


def read_stated(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the only "The answer is X"."""
    found = STATED.findall(text.strip())
    return found[0] if len(found) == 1 else None


SCIENCEQA_OFFICIAL = Rule(read_stated, guesses=True)
