"""What a benchmark decides: its questions, its columns, what its table says; and what it cannot be asked."""

from collections import Counter

import pytest

from vcot.eval.benchmark import BENCHMARKS, Benchmark, find_benchmark
from vcot.eval.benchmarks.scienceqa_img import SCIENCEQA
from vcot.eval.eval_section import EvalSection
from vcot.eval.table import build_results
from vcot.pipeline.errors import RecipeError
from vcot.pipeline.open_lists import BENCHMARK_NAMES
from vcot.pipeline.records import CheckpointRef, Response, SamplingParams, Task
from vcot.services.recipes.recipe import load_recipe

BASE = CheckpointRef(name="base", digest="sha256:00", kind="base")


def task(number=0, subject=None, **fields):
    defaults = {"question": "?", "choices": ("red", "blue"), "answer": 1, "source": "nano", "split": "test"}
    return Task(id=f"t{number}", subject=subject, **(defaults | fields))


def respond(text):
    return Response(
        key="k", group="g", task="t0", index=0, checkpoint=BASE, prompt="cot", text=text, thought="", answer=text,
        sampling=SamplingParams(temperature=0.4, max_tokens=64, seed=0),
    )  # fmt: skip


@pytest.mark.parametrize("name", list(BENCHMARK_NAMES.built_ins))
def test_every_built_in_is_found_under_its_own_name(name):
    assert BENCHMARKS.resolve(name).name == name


@pytest.mark.parametrize(
    ("text", "points", "value", "answer"),
    [
        ("Cab.", 1.0, "correct", "cab"),
        (" BUS ", 2 / 3, "correct", "bus"),
        ("a cab", 0.0, "incorrect", "a cab"),
        ("", 0.0, "no_answer", None),
    ],
)
def test_a_direct_answer_earns_a_third_for_each_who_gave_it(text, points, value, answer):
    accepted = ("cab",) * 4 + ("bus",) * 2 + ("car",) * 4
    question = task(choices=(), answer=None, gold="cab", accepted=accepted)
    found = BENCHMARKS.resolve("aokvqa_da").score(question, respond(text))
    assert (found.earned, found.value, found.answer, found.target) == (pytest.approx(points), value, answer, "cab")
    failed = respond(text).model_copy(update={"text": None, "error": "timed out"})
    assert BENCHMARKS.resolve("aokvqa_da").score(question, failed).value is None


def test_an_accuracy_is_the_mean_of_what_was_earned():
    question = task(choices=(), answer=None, gold="bus", accepted=("cab",) * 4 + ("bus",) * 2)
    benchmark = BENCHMARKS.resolve("aokvqa_da")
    scores = [
        benchmark.score(question.model_copy(update={"id": name}), respond(text).model_copy(update={"task": name}))
        for name, text in (("t0", "cab"), ("t1", "bus"), ("t2", "car"))
    ]
    (row,) = build_results(scores, [BASE], (), seed=0, num_samples=1)
    assert row.accuracy["Avg"].value == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert row.chance == 0.0


def test_what_is_no_benchmark_is_said():
    with pytest.raises(
        RecipeError, match=r"benchmark string:digits is an object of type str, and must be a vcot\.Bench"
    ):
        find_benchmark(EvalSection(benchmark="string:digits"))


def test_the_recipe_says_how_many_of_its_questions_and_the_benchmark_which():
    paper = load_recipe("paper", ["eval.num_tasks=40", "eval.seed=3"]).eval
    tasks = find_benchmark(paper).tasks(paper, "validation")
    assert (tasks.source, tasks.split, tasks.num_tasks, tasks.seed) == ("scienceqa", "validation", 40, 3)
    assert tasks.revision == paper.revision, "the benchmark's data is pinned for every split"


@pytest.mark.parametrize(
    ("fields", "split", "said"),
    [
        ({"benchmark": "aokvqa"}, "test", "benchmark aokvqa has answers for train and validation only, not for test"),
        ({"benchmark": "nano", "hint": True}, "test", "source nano has no hints; leave hint out"),
    ],
)
def test_questions_that_it_cannot_have_are_refused(fields, split, said):
    section = EvalSection(**fields)
    with pytest.raises(RecipeError, match=said):
        find_benchmark(section).tasks(section, split)


def test_columns_are_told_apart():
    with pytest.raises(ValueError, match="name each once, and none Avg"):
        Benchmark("mine", "nano", columns=("NAT", "Avg"))
    with pytest.raises(ValueError, match="name each once"):
        Benchmark("mine", "nano", columns=("NAT", "NAT"))


def test_a_score_counts_in_the_column_that_the_benchmark_says():
    by_family = Benchmark("mine", "nano", columns=("colours",), column_of=lambda task: task.family)
    asked = task(subject="NAT", family="colours")
    assert by_family.score(asked, respond("The answer is (B)")).subject == "colours"
    assert SCIENCEQA.score(asked, respond("The answer is (B)")).subject == "NAT"


def test_prompts_are_the_recipes_or_else_the_benchmarks():
    assert SCIENCEQA.list_prompts(EvalSection(benchmark="scienceqa", prompts=("cot",))) == ("cot",)
    assert SCIENCEQA.list_prompts(EvalSection(benchmark="scienceqa")) == ("zero_shot", "cot")


def test_scienceqas_table_says_whether_the_questions_had_their_hints():
    assert "without ScienceQA's hints, as in the paper" in SCIENCEQA.note(EvalSection(benchmark="scienceqa"))
    assert "asked with it" in SCIENCEQA.note(EvalSection(benchmark="scienceqa", hint=True))
    assert Benchmark("mine", "nano").note(EvalSection(benchmark="nano")) == ""


def test_questions_that_are_not_the_official_ones_are_said():
    counts = {"NAT": 1209, "SOC": 764, "LAN": 44}
    official = [task(number, subject) for number, subject in enumerate(Counter(counts).elements())]
    assert len(official) == 2017
    assert SCIENCEQA.compare_official("test", official) is None
    assert SCIENCEQA.compare_official("validation", official[:9]) is None
    assert SCIENCEQA.compare_official("test", official[1:]) == (
        "these scienceqa test questions are not the official ones (NAT 1208, SOC 764, LAN 44; official: NAT 1209, SOC 764, "
        "LAN 44), so published figures do not compare"
    )
