"""One response, scored: correct, incorrect, no answer, or the error that came instead."""

import pytest

from vcot.eval.scorer import is_known_right, score_by_kind, score_choice, score_exact, score_judged
from vcot.pipeline.errors import DataError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges import find_judge
from vcot.pipeline.prompts import split_thought
from vcot.pipeline.records import CheckpointRef, ImageRef, Judgment, Response, SamplingParams, Task
from vcot.pipeline.sections import JudgeSection

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


OPEN = TASK.model_copy(update={"choices": (), "answer": None, "gold": "the taxi", "accepted": ("the taxi", "Cab")})


@pytest.mark.parametrize(
    ("text", "value", "answer"),
    [
        ("Taxi.", "correct", "taxi"),
        ("  a  CAB!", "correct", "cab"),
        ("a yellow taxi", "incorrect", "yellow taxi"),
        ("theatre", "incorrect", "theatre"),
        ("The.", "no_answer", None),
        ("", "no_answer", None),
    ],
)
def test_an_answer_in_words_is_compared_without_case_punctuation_and_articles(text, value, answer):
    score = score_exact(OPEN, respond(text, prompt="short_answer"))
    assert (score.value, score.answer, score.target, score.num_choices) == (value, answer, "the taxi", 0)
    assert score_by_kind(OPEN, respond(text, prompt="short_answer")) == score
    assert is_known_right(OPEN, respond(text, prompt="short_answer")) is {"correct": True, "incorrect": False}.get(
        value
    )


@pytest.mark.parametrize(
    ("gold", "text", "value"),
    [
        ("35", "3.5", "incorrect"),
        ("3.5", "3.5.", "correct"),
        ("5", "-5", "incorrect"),
        ("-5", "It is (-5)", "incorrect"),
        ("-5", " (-5).", "correct"),
        ("-.5", "-.5", "correct"),
        ("-.5", ".5", "incorrect"),
        ("12", "1/2", "incorrect"),
        ("1230", "12:30", "incorrect"),
        ("1,000", "1000", "correct"),
        ("well-known", "wellknown", "correct"),
        ("A", "A.", "correct"),
        ("A", "B", "incorrect"),
        ("A", "The.", "no_answer"),
        ("+", "+", "correct"),
        ("+", "-", "no_answer"),
        ("caf\u00e9", "cafe\u0301", "correct"),
        ("red", "\u201cred\u201d\u3002", "correct"),
        ("O'Neil", "O\u2019Neil", "correct"),
    ],
)
def test_the_signs_of_a_number_count_and_an_answer_that_is_nothing_else_is_compared_as_it_is(gold, text, value):
    task = OPEN.model_copy(update={"gold": gold, "accepted": ()})
    assert score_exact(task, respond(text, prompt="short_answer")).value == value


def test_by_kind_a_question_with_options_is_scored_by_the_option():
    assert score_by_kind(TASK, respond("The answer is (B)")) == score_choice(TASK, respond("The answer is (B)"))


def test_words_without_a_gold_answer_are_refused():
    with pytest.raises(DataError, match="no gold answer"):
        score_exact(OPEN.model_copy(update={"gold": "", "accepted": ()}), respond("taxi"))


@pytest.fixture
def pointwise(tmp_path):
    return find_judge(JudgeSection(kind="pointwise", model="m"), ImageStore(tmp_path))


@pytest.mark.parametrize(
    ("score", "points", "value"), [(1, 0, "incorrect"), (5, 4 / 9, "incorrect"), (10, 1, "correct")]
)
def test_a_judges_score_is_a_share_of_its_scale(pointwise, score, points, value):
    judgment = Judgment(key="j", response="k", task=TASK.id, judge="pointwise/1:m", score=score)
    found = score_judged(OPEN, respond("a taxi"), pointwise, judgment)
    assert (found.earned, found.value, found.answer) == (pytest.approx(points), value, "a taxi")


def test_a_score_beyond_the_scale_is_no_figure(pointwise):
    judgment = Judgment(key="j", response="k", task=TASK.id, judge="pointwise/1:m", score=11)
    with pytest.raises(DataError, match=r"gave 11 .* its scale is 1 to 10"):
        score_judged(OPEN, respond("a taxi"), pointwise, judgment)


def test_what_a_judge_refused_is_an_error_and_not_wrong(pointwise):
    judgment = Judgment(key="j", response="k", task=TASK.id, judge="pointwise/1:m", error="filtered", refused=True)
    assert score_judged(OPEN, respond("a taxi"), pointwise, judgment).error == "filtered"
    assert score_judged(OPEN, respond(error="timed out"), pointwise, None).error == "timed out"
