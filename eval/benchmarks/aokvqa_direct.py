"""A-OKVQA's questions answered in words (Schwenk et al. 2022), by the authors' rule.

An answer earns a third of a point for each of ten people who gave the same, and one point at most, as in the file
`evaluation/eval_predictions.py` of allenai/aokvqa. Questions that the authors marked as difficult to answer in words are
left out, as there. They compare character by character; here case, spaces and a full stop at the end make no difference.
"""

from __future__ import annotations

from vcot.eval.benchmark import Benchmark
from vcot.eval.scorer import build_score, read_final_part
from vcot.pipeline.records import Response, Score, Task

_NEEDED = 3


def score_words(task: Task, response: Response) -> Score:
    """The score of an answer in words, against the accepted ones."""
    said = _plain(read_final_part(response))
    points = min(1.0, sum(said == _plain(answer) for answer in task.accepted) / _NEEDED)
    return build_score(task, response, said or None, is_right=points > 0, target=task.gold, points=points)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".").rstrip()


AOKVQA_DA = Benchmark(
    name="aokvqa_da",
    source="aokvqa_da",
    splits=("train", "validation"),
    prompts=("short_answer",),
    scorer=score_words,
    note=lambda _: "An answer earns a third of a point for each of ten people who gave the same, and one at most.",
)
