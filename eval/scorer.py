"""Scores one response against gold: a failed request is an error, not a wrong answer, and nothing is guessed.

A response that was cut off at its longest length has no final answer, whatever its draft says, and is counted as cut.
"""

from __future__ import annotations

from pipeline.errors import DataError
from pipeline.parsers import parse_choice
from pipeline.prompts import PROMPTS
from pipeline.records import Response, Score, Task


def score_choice(task: Task, response: Response) -> Score:
    """The score of a response to a multiple-choice question, whichever image was shown.

    Raises DataError for a task without a gold answer.
    """
    if task.answer_letter is None:
        raise DataError(f"task {task.id} of {task.source} has no gold answer to score against; evaluate another split")
    answer = parse_choice(read_final_part(response), task.choices)
    is_right = answer is not None and task.is_right(answer)
    return build_score(
        task, response, answer, is_right=is_right, target=task.answer_letter, num_choices=len(task.choices)
    )


def build_score(
    task: Task,
    response: Response,
    answer: str | None,
    *,
    is_right: bool,
    target: str,
    num_choices: int = 0,
    points: float | None = None,
) -> Score:
    """The score of a response in which `answer` was read, or None, where `target` was right; `points` are for a rule that
    knows more than right and wrong.

    A uniform guess is right once in `num_choices` times; 0 says that nobody guesses the answer. A response that failed or
    was cut off counts as that, whatever was read in it.
    """
    is_cut = response.finish_reason == "length"
    found = None if is_cut or response.error is not None else answer
    value = "no_answer" if found is None else "correct" if is_right else "incorrect"
    return Score(
        key=response.key,
        task=task.id,
        index=response.index,
        seed=response.sampling.seed,
        subject=task.subject,
        image=task.picture,
        checkpoint=response.checkpoint.digest,
        prompt=response.prompt,
        temperature=response.sampling.temperature,
        value=None if response.error is not None else value,
        points=None if points is None or response.error is not None else points if found is not None else 0.0,
        answer=found,
        is_cut=is_cut,
        target=target,
        prior=task.prior_letter,
        num_choices=num_choices,
        error=response.error,
    )


def read_final_part(response: Response) -> str:
    """Where the answer stands: all of a response to an evaluation prompt, else what follows the thought.

    A thought prompt's response that never left its thought gave no final answer; what its draft says does not count.
    """
    return (response.text if PROMPTS.resolve(response.prompt).is_read_whole else response.answer) or ""
