"""The verifier: a program that scores a chain against the scene's truth. It is not a language model.

The score is in [0, 1]: half for the right answer, half for the share of the thought's statements that are true. A
statement counts once however often it is repeated, and a response that did not keep the prompt's format scores 0. Tasks
without facts (real photos) are scored by the answer alone.
"""

from __future__ import annotations

import re

from vcot.pipeline.judges import Judge
from vcot.pipeline.parser_version import PARSER
from vcot.pipeline.parsers import parse_choice
from vcot.pipeline.records import Response, Task, Verdict, content_key

_SENTENCE_END = re.compile(r"[.!?\n]+")


class Verifier(Judge):
    """The programmatic judge."""

    name = "verifier/1"
    knows_gold = True
    fingerprint = content_key(weights=[0.5, 0.5], parser=PARSER)

    async def score(self, task: Task, response: Response, *, num_asked: int = 0) -> Verdict:
        """Never fails for a task with a gold answer; refuses one without."""
        if task.answer is None:
            error = f"task {task.id} has no gold answer for the verifier; use judge.kind = pointwise"
            return Verdict(error=error, reason="no_gold", refused=True)
        score, rationale = verify(task, response)
        return Verdict(score=score, rationale=rationale)


def verify(task: Task, response: Response) -> tuple[float, str]:
    """The score in [0, 1] and one line that says where it comes from."""
    if response.answer is None or response.thought is None:
        return 0.0, "format not kept"
    letter = parse_choice(response.answer, task.choices)
    right = letter is not None and task.is_right(letter)
    verdict = "answer right" if right else f"answer {letter or 'not readable'}, gold {task.answer_letter}"
    if not task.facts:
        return float(right), verdict
    statements = split_statements(response.thought)
    facts = {normalise_statement(fact) for fact in task.facts}
    wrong = [statement for statement in statements if statement not in facts]
    share = 1 - len(wrong) / len(statements) if statements else 0.0
    told = f"{len(statements) - len(wrong)} of {len(statements)} statements true"
    return 0.5 * right + 0.5 * share, f"{verdict}; {told}" + (f"; false: {wrong[0]}" if wrong else "")


def split_statements(thought: str) -> list[str]:
    """The distinct sentences of a thought, normalised, in order."""
    return list(dict.fromkeys(s for part in _SENTENCE_END.split(thought) if (s := normalise_statement(part))))


def normalise_statement(text: str) -> str:
    """Lower case, single spaces, no final stop."""
    return " ".join(text.lower().split()).rstrip(" .!?")
