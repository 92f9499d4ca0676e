"""inspect_ai's: github.com/UKGovernmentBEIS/inspect_ai, src/inspect_ai/solver/_multiple_choice.py at 499e6152
(`parse_answers`, one right answer) and scorer/_choice.py (`choice`).

The last line that is "ANSWER: X", or else the last "ANSWER: X" anywhere, in upper or lower case; X must be one letter of the
options, and a comma around it does not count. (At 0af52d4d the first one counted, and several letters were several answers.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vcot.eval.rules import Rule

_LINE = re.compile(r"(?i)^ANSWER\s*:\s*([A-Za-z\d ,]+)\s*(?:$|\n|\.)", re.MULTILINE)
_ANYWHERE = re.compile(r"(?i)ANSWER\s*:\s*([A-Za-z\d ,]+)(?:[^\w]|\n|$|\.)")


def read_marked(text: str, choices: Sequence[str]) -> str | None:
    """The letter after the last "ANSWER:"."""
    if ":" not in text:
        return None
    marked = _LINE.findall(text) or _ANYWHERE.findall(text)
    said = marked[-1].strip().upper() if marked else ""
    letters = [part for part in said.split(",") if part]
    return letters[0] if len(letters) == 1 and len(letters[0]) == 1 else None


INSPECT = Rule(read_marked)
