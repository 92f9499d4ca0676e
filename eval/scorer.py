"""Scores one response against gold: a failed request is an error, not a wrong answer, and nothing is guessed.

A response that was cut off at its longest length has no final answer, whatever its draft says, and is counted as cut.
"""

from __future__ import annotations

from pipeline.errors import DataError
from pipeline.parsers import parse_choice
from pipeline.records import Outcome, Response, Score, Task


def score_response(task: Task, response: Response) -> Score:
    """The score of `response` to `task`, as the benchmark has it, whichever image was shown.

    Raises DataError for a task without a gold answer.
    """
    if task.answer_letter is None:
        raise DataError(f"task {task.id} of {task.source} has no gold answer to score against; evaluate another split")
    is_cut = response.finish_reason == "length"
    answer = None if is_cut or response.error is not None else parse_choice(_final_part(response), task.choices)
    return Score(
        key=response.key,
        task=task.id,
        index=response.index,
        subject=task.subject,
        image=task.image.sha256 if task.image else None,
        checkpoint=response.checkpoint.digest,
        prompt=response.prompt,
        temperature=response.sampling.temperature,
        value=None if response.error is not None else _judge(task, answer),
        answer=answer,
        is_cut=is_cut,
        target=task.answer_letter,
        prior=task.prior_letter,
        num_choices=len(task.choices),
        error=response.error,
    )


def _judge(task: Task, answer: str | None) -> Outcome:
    if answer is None:
        return "no_answer"
    return "correct" if task.is_right(answer) else "incorrect"


def _final_part(response: Response) -> str:
    """What the parser reads: all of a response to an evaluation prompt, else what follows the thought.

    A thought prompt's response that never left its thought gave no final answer; what its draft says does not count.
    """
    return (response.text if response.prompt in ("zero_shot", "cot") else response.answer) or ""
