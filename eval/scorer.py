"""Scores one response against gold: a failed request is an error, not a wrong answer, and nothing is guessed.

A response that was cut off at its longest length has no final answer, whatever its draft says, and is counted as cut.
"""

from __future__ import annotations

import re
import string

from vcot.pipeline.errors import DataError
from vcot.pipeline.judges import Judge
from vcot.pipeline.parsers import parse_choice
from vcot.pipeline.plain import simplify
from vcot.pipeline.prompts import PROMPTS
from vcot.pipeline.records import Judgment, Response, Score, Task


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


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_OF_NUMBER = r"(?<=\d)[./:-](?=\d)|(?<![^\s(\[\"'$])-?\.?(?=\d)"
_PUNCTUATION = re.compile(rf"(?!{_OF_NUMBER})[{re.escape(string.punctuation)}]")
"""All but the signs of a number."""


def score_exact(task: Task, response: Response) -> Score:
    """The score of an answer in words: right where it is one of the accepted ones, but for case, punctuation, articles and
    spaces, as in SQuAD's official script (Rajpurkar et al. 2016). Unlike there, 3.5 is not 35, nor -5 the same as 5, and an
    answer that is punctuation or an article alone is compared as it is.

    Raises DataError for a task without a gold answer.
    """
    if not task.gold:
        raise DataError(f"task {task.id} of {task.source} has no gold answer to score against; evaluate another split")
    final, right = read_final_part(response), {_simplify(each) or _whole(each) for each in (task.gold, *task.accepted)}
    said = _simplify(final) or (_whole(final) if _whole(final) in right else "")
    return build_score(task, response, said or None, is_right=said in right, target=task.gold)


def _simplify(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub("", simplify(text).lower())).split())


def _whole(text: str) -> str:
    """What there is of a text that is articles and punctuation alone: the articles, or else the punctuation."""
    plain = " ".join(simplify(text).lower().split())
    return _PUNCTUATION.sub("", plain).strip() or plain


def score_by_kind(task: Task, response: Response) -> Score:
    """By the option that it names, or of a question without options by exact match."""
    return score_choice(task, response) if task.choices else score_exact(task, response)


def is_known_right(task: Task, response: Response) -> bool | None:
    """Whether it is right by that rule, which knows no other words for the same; None where no answer can be read."""
    value = score_by_kind(task, response).value
    return None if value in (None, "no_answer") else value == "correct"


def score_judged(task: Task, response: Response, judge: Judge, judgment: Judgment | None) -> Score:
    """What a judge says of a response, as a share of its scale; from the middle on it counts as right.

    A response that was cut off is judged by nobody, and has no answer; any other without a verdict is an error, and in no
    figure. Raises DataError for a score beyond the judge's scale.
    """
    points = 0.0
    if judgment is not None and judgment.score is not None:
        points = _find_share(judgment.score, judge, response)
    elif response.error is None and response.finish_reason != "length":
        response = response.model_copy(update={"error": (judgment and judgment.error) or "not judged yet"})
    said, target = read_final_part(response).strip(), task.gold or task.answer_letter or ""
    return build_score(task, response, said or None, is_right=points >= 0.5, target=target, points=points)


def _find_share(score: float, judge: Judge, response: Response) -> float:
    low, high = judge.scale
    share = (score - low) / (high - low)
    if not 0 <= share <= 1:
        raise DataError(
            f"judge {judge.name} gave {score:g} to response {response.key[:12]} of task {response.task}, and its scale is "
            f"{low:g} to {high:g}; mend the judge"
        )
    return share


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
