"""One response, scored: correct, incorrect, no answer, or the error that came instead."""

import pytest

from eval.scorer import score_choice
from pipeline.errors import DataError
from pipeline.prompts import split_thought
from pipeline.records import CheckpointRef, ImageRef, Response, SamplingParams, Task

BASE = CheckpointRef(name="base", digest="sha256:00", kind="base")
TASK = Task(
    id="nano-1",
    question="What colour is the circle?",
    choices=("red", "blue", "green"),
    answer=1,
    images=(ImageRef(sha256="ab", path="images/ab.png", width=56, height=56),),
    subject="NAT",
    source="nano",
    split="test",
)


def respond(text=None, prompt="cot", error=None, finish_reason="stop"):
    thought, answer = split_thought(prompt, text) if text is not None else (None, None)
    return Response(
        key="k", group="g", task=TASK.id, index=0, checkpoint=BASE, prompt=prompt,
        sampling=SamplingParams(temperature=0.4, max_tokens=64, seed=0),
        text=text, thought=thought, answer=answer, error=error, finish_reason=finish_reason,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "prompt", "value", "answer"),
    [
        ("The circle is blue. The answer is (B)", "cot", "correct", "B"),
        ("The answer is (A). Wait, it is blue. The answer is (B).", "cot", "correct", "B"),
        ("The answer is (B). Wait. The answer is (A).", "cot", "incorrect", "A"),
        ("The answer is (B). Wait. The answer is unclear.", "cot", "no_answer", None),
        ("The circle is blue.", "cot", "no_answer", None),
        ("B", "cot", "correct", "B"),
        ("The answer is (B).\n\nQuestion: And then?\nThe answer is (A).", "cot", "correct", "B"),
        ("The answer is (blue)", "zero_shot", "correct", "B"),
        ("C", "zero_shot", "incorrect", "C"),
        ("(D)", "zero_shot", "no_answer", None),
        ("", "zero_shot", "no_answer", None),
        ("The answer is (A). <R> The answer is (B)", "thought_specific", "correct", "B"),
        ("The answer is (B).", "thought_specific", "no_answer", None),
    ],
)
def test_value(text, prompt, value, answer):
    score = score_choice(TASK, respond(text, prompt))
    assert (score.value, score.answer, score.error) == (value, answer, None)
    assert (score.target, score.num_choices, score.subject, score.image) == ("B", 3, "NAT", "ab")
    assert (score.checkpoint, score.prompt, score.temperature) == (BASE.digest, prompt, 0.4)


def test_a_cut_off_draft_is_no_answer():
    score = score_choice(TASK, respond("The answer is (B), or perhaps", finish_reason="length"))
    assert (score.value, score.answer, score.is_cut) == ("no_answer", None, True)
    assert not score_choice(TASK, respond("The answer is (B)")).is_cut


def test_either_of_two_equal_options_is_right():
    task = TASK.model_copy(update={"choices": ("blue", "red", "blue"), "answer": 0})
    values = [score_choice(task, respond(f"The answer is ({letter})")).value for letter in "ABC"]
    assert values == ["correct", "incorrect", "correct"]


def test_failed_request_is_an_error_and_no_wrong_answer():
    score = score_choice(TASK, respond(error="timed out"))
    assert (score.value, score.answer, score.error) == (None, None, "timed out")


def test_task_without_gold_is_refused():
    with pytest.raises(DataError, match="task nano-1 of nano has no gold answer"):
        score_choice(TASK.model_copy(update={"answer": None}), respond("B"))
