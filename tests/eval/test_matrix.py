"""The matrix' figures are those of vcot's own evaluations, and a guess counts as what it is worth on average."""

import random
from contextlib import closing

import numpy as np
import pytest

from vcot.eval.benchmark import Benchmark
from vcot.eval.logged.readings import CUT, Reader, Readings, Said
from vcot.eval.matrix import Matrix, Pair, build_chance, build_differences, build_gold, build_result, mark
from vcot.eval.matrix_table import render_matrix
from vcot.eval.rules import RULES
from vcot.eval.table import build_chance as chance_of_scores
from vcot.eval.table import build_differences as differences_of_scores
from vcot.eval.table import build_results
from vcot.pipeline.records import CheckpointRef, ImageRef, Response, SamplingParams, Task

SUBJECTS = ("NAT", "SOC")
BENCHMARK = Benchmark(name="mine", source="nano", columns=SUBJECTS)
BASE, POLICY = (CheckpointRef(name=name, digest=f"sha256:{name}", kind="base") for name in ("base", "policy"))
TEXTS = (
    "The answer is A.",
    "B",
    "C. green",
    "I do not know.",
    "The answer is (A) or (B).",
    "the answer is red",
    "ANSWER: B",
)


def make_tasks(num):
    draw = random.Random(5)
    return [
        Task(
            id=f"nano/{number}", question="Which?", choices=("red", "blue", "green", "blue")[: draw.randint(2, 4)],
            answer=draw.randrange(2), subject=draw.choice((*SUBJECTS, None)), source="nano", split="test",
            images=(ImageRef(sha256=str(number // 3), path="x", width=1, height=1),),
        )
        for number in range(num)
    ]  # fmt: skip


TASKS = make_tasks(90)


@pytest.fixture
def gold():
    return build_gold(TASKS, BENCHMARK)


def draw_said(seed, num=300):
    draw = random.Random(seed)
    return [Said(draw.randrange(len(TASKS)), draw.choice(TEXTS), draw.random() < 0.1) for _ in range(num)]


def read_said(said, rules=tuple(RULES.built_ins)):
    with closing(Reader(rules, [task.choices for task in TASKS])) as reader:
        *_, found = reader.read(said)
    return found


def as_scores(said, checkpoint):
    fields = {
        "group": "",
        "index": 0,
        "prompt": "cot",
        "sampling": SamplingParams(temperature=0.4, max_tokens=9, seed=0),
    }
    for number, (task, text, is_cut) in enumerate(said):
        response = Response(
            key=f"{checkpoint.name}{number}", task=TASKS[task].id, checkpoint=checkpoint, text=text, thought="",
            answer=text, finish_reason="length" if is_cut else "stop", **fields,
        )  # fmt: skip
        yield BENCHMARK.score(TASKS[task], response)


def test_figures_of_our_rule_are_those_of_our_evaluations(gold):
    said = {BASE: draw_said(1), POLICY: draw_said(2)}
    scores = [score for checkpoint in said for score in as_scores(said[checkpoint], checkpoint)]
    reads = {checkpoint: mark(read_said(said[checkpoint]), "vcot", gold) for checkpoint in said}
    for row in build_results(scores, [BASE, POLICY], SUBJECTS, seed=0, num_samples=1):
        found = build_result("x", "vcot", reads[row.checkpoint], {}, gold)
        assert found.accuracy == row.accuracy
        assert (found.no_answer, found.num_scored) == (pytest.approx(row.no_answer), row.num_scored)
    [expected] = differences_of_scores(scores, BASE, [POLICY])
    [found] = build_differences([Pair("policy", "base", "vcot", reads[POLICY], reads[BASE])], gold)
    assert found.accuracy.model_dump() == pytest.approx(expected.accuracy.model_dump())
    assert (found.p_value, found.p_holm, found.mde, found.num_questions) == pytest.approx(
        (expected.p_value, expected.p_holm, expected.mde, expected.num_questions)
    )
    every = list(as_scores([Said(number, "A", False) for number in range(len(TASKS))], BASE))
    assert build_chance(gold) == pytest.approx(chance_of_scores(every, SUBJECTS))


def test_a_guess_counts_as_its_expectation_where_the_original_draws_one(gold):
    found = read_said([Said(number, "I do not know.", False) for number in range(len(TASKS))])
    chances = [1 / len(task.choices) for task in TASKS]
    for rule in RULES.built_ins:
        marks = mark(found, rule, gold).marks
        assert marks.tolist() == (chances if rule == "scienceqa" else [0] * len(TASKS))


def test_no_answer_is_told_apart_from_a_wrong_one(gold):
    right = [Said(number, f"({task.answer_letter})", False) for number, task in enumerate(TASKS)]
    unread = [Said(number, "Hm.", False) for number in range(len(TASKS))]
    readings = read_said([*right, *unread])
    result = build_result("x", "vcot", mark(readings, "vcot", gold), readings.reasons["vcot"], gold)
    assert (result.accuracy["Avg"].value, result.no_answer, result.of_read) == (0.5, 0.5, 1.0)
    assert result.reasons == {"none": len(TASKS)}
    assert result.num_questions == len(TASKS)


def test_nothing_read_has_no_accuracy_of_what_was_read(gold):
    readings = read_said([Said(0, "Hm.", False)])
    assert build_result("x", "vcot", mark(readings, "vcot", gold), {}, gold).of_read is None


def test_options_that_say_the_same_are_both_right():
    task = TASKS[0].model_copy(update={"choices": ("red", "blue", "blue"), "answer": 2})
    gold = build_gold([task], BENCHMARK)
    readings = Reader(("vcot",), [task.choices])
    *_, found = readings.read([Said(0, "(B)", False), Said(0, "(C)", False), Said(0, "(A)", False)])
    assert mark(found, "vcot", gold).marks.tolist() == [1, 1, 0]


def test_our_rule_alone_minds_that_a_response_was_cut():
    readings = read_said([Said(0, "B", True)])
    assert readings.reasons["vcot"] == {CUT: 1}
    assert readings.picks["llava"][0].tolist() == [1]


def test_processes_read_what_one_reads():
    said = draw_said(3, num=9000)
    several, one = read_said(said), Readings()
    for start in range(0, len(said), 3000):
        *_, part = Reader(tuple(RULES.built_ins), [task.choices for task in TASKS]).read(said[start : start + 3000])
        one.tasks += part.tasks
        for rule in RULES.built_ins:
            one.picks.setdefault(rule, []).extend(part.picks[rule])
    assert several.num_read == len(said)
    assert np.array_equal(np.concatenate(several.tasks), np.concatenate(one.tasks))
    for rule in RULES.built_ins:
        assert np.array_equal(np.concatenate(several.picks[rule]), np.concatenate(one.picks[rule]))
        assert sum(several.reasons[rule].values()) == int((np.concatenate(several.picks[rule]) < 0).sum())


def test_logs_without_a_common_question_are_not_compared(gold):
    first, second = (mark(read_said([Said(number, "B", False)]), "vcot", gold) for number in (0, 1))
    assert build_differences([Pair("b", "a", "vcot", second, first)], gold) == []


def test_differences_are_of_what_both_answered(gold):
    unread = [Said(number, "Hm.", False) for number in range(60)]
    right = [Said(number, f"({task.answer_letter})", False) for number, task in enumerate(TASKS)]
    base = mark(read_said([*right[:30], *unread[30:60]]), "vcot", gold)
    tuned = mark(read_said([*right[30:60], *(Said(number, "Hm.", False) for number in range(60, 90))]), "vcot", gold)
    [found] = build_differences([Pair("b", "a", "vcot", tuned, base)], gold)
    assert (found.num_questions, found.accuracy.value, found.no_answer) == (30, 1.0, -1.0)
    result = build_result("b", "vcot", tuned, {}, gold)
    matrix = Matrix(
        benchmark="mine", split="test", chance=build_chance(gold), accounts=(), results=(result,), differences=(found,)
    )
    assert (
        str(render_matrix(matrix, SUBJECTS)[-1])
        .strip()
        .startswith("b answers more questions right than a under vcot (+100.0")
    )
