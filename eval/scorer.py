"""Scores one response against gold: a failed request is an error, not a wrong answer, and nothing is guessed."""

from __future__ import annotations

from pipeline.errors import DataError
from pipeline.parsers import parse_choice
from pipeline.records import Response, Score, Task


def score_response(task: Task, response: Response) -> Score:
    """The score of `response` to `task`, as the benchmark has it, whichever image was shown.

    Raises DataError for a task without a gold answer.
    """
    if task.answer_letter is None:
        raise DataError(f"task {task.id} of {task.source} has no gold answer to score against; evaluate another split")
    answer = None if response.error is not None else parse_choice(_final_part(response), task.choices)
    outcome = "no_answer" if answer is None else "correct" if answer == task.answer_letter else "incorrect"
    return Score(
        key=response.key,
        task=task.id,
        index=response.index,
        subject=task.subject,
        image=task.image.sha256 if task.image else None,
        checkpoint=response.checkpoint.digest,
        prompt=response.prompt,
        temperature=response.sampling.temperature,
        value=None if response.error is not None else outcome,
        answer=answer,
        target=task.answer_letter,
        prior=task.prior_letter,
        num_choices=len(task.choices),
        error=response.error,
    )


def _final_part(response: Response) -> str:
    """What the parser reads: the final answer or, of a response to an evaluation prompt that kept no format, all of it.

    A thought prompt's response that never left its thought gave no final answer; what its draft says does not count.
    """
    if response.answer is not None:
        return response.answer
    return (response.text or "") if response.prompt in ("zero_shot", "cot") else ""
