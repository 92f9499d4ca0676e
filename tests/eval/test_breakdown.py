"""An accuracy by finer labels: what counts where, and ScienceQA's as its authors' table has them."""

import io

import pytest
from rich.console import Console

from tests.eval.test_benchmark import task
from tests.eval.test_table import BASE, POLICY, score
from vcot.eval.benchmark import BENCHMARKS
from vcot.eval.breakdown import build_breakdown, render_breakdown
from vcot.eval.statistics import estimate_accuracy


@pytest.mark.parametrize(
    ("grade", "context", "labels"),
    [
        ("grade6", "TXT IMG", [("grade", "G1-6"), ("context", "TXT"), ("context", "IMG"), ("topic", "physics")]),
        ("grade7", "NO", [("grade", "G7-12"), ("context", "NO"), ("topic", "physics")]),
        ("grade12", "IMG", [("grade", "G7-12"), ("context", "IMG"), ("topic", "physics")]),
        ("", "TXT", [("context", "TXT"), ("topic", "physics")]),
    ],
)
@pytest.mark.parametrize("name", ["scienceqa", "scienceqa_all"])
def test_scienceqas_labels_are_the_columns_of_its_authors_table(name, grade, context, labels):
    question = task(family="physics", labels={"grade": grade, "context": context})
    assert list(BENCHMARKS.resolve(name).labels_of(question)) == labels


def test_all_of_scienceqa_is_official_with_4241_test_questions():
    benchmark = BENCHMARKS.resolve("scienceqa_all")
    assert sum(benchmark.official["test"].values()) == 4_241
    sizes = {"NAT": 2_252, "SOC": 889, "LAN": 1_100}
    tasks = [task(i, subject) for subject, size in sizes.items() for i in range(size)]
    assert benchmark.compare_official("test", tasks) is None


def label(number):
    return (("grade", "G1-6" if number < 6 else "G7-12"), *([("context", "TXT")] if number % 2 else []))


def test_a_question_counts_under_each_of_its_labels_and_a_failed_request_under_none():
    scores = [
        score(
            n,
            "correct" if n < 3 else "incorrect",
            checkpoint=checkpoint,
            labels=label(n),
            num_choices=2 if n < 6 else 4,
        )
        for checkpoint in (BASE, POLICY)
        for n in range(10)
    ]
    scores.append(score(10, None, error="timed out", labels=label(10)))
    rows = build_breakdown(scores, [BASE, POLICY])
    assert [(row.kind, row.label, row.num_questions, row.accuracy.value, row.chance) for row in rows[:3]] == [
        ("grade", "G1-6", 6, 0.5, 0.5),
        ("grade", "G7-12", 4, 0.0, 0.25),
        ("context", "TXT", 5, 0.2, pytest.approx((3 * 0.5 + 2 * 0.25) / 5)),
    ]
    assert [row.checkpoint for row in rows] == [BASE] * 3 + [POLICY] * 3
    assert build_breakdown([score(1, "correct")], [BASE]) == []


def test_the_table_fits_eighty_columns():
    scores = [
        score(n, "correct", prompt=prompt, temperature=temperature, labels=label(n))
        for n in range(10)
        for prompt in ("zero_shot", "cot")
        for temperature in (0.4, 0.8)
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(render_breakdown(build_breakdown(scores, [BASE])))
    text = console.file.getvalue()
    assert "…" not in text
    assert "grade G7-12" in text


def test_each_cell_is_of_its_label_checkpoint_and_setting():
    labels = {0: (("grade", "G1-6"),), 1: (("grade", "G7-12"),)}
    # of four questions each; under zero_shot none has G7-12
    rights = {("cot", 0.4, 0): 1, ("cot", 0.4, 1): 3, ("zero_shot", 0.4, 0): 2}
    scores = [
        score(
            4 * grade + n, "correct" if n < right else "incorrect", prompt=prompt, temperature=temperature,
            labels=labels[grade], num_choices=2 if grade == 0 else 4,
        )
        for (prompt, temperature, grade), right in rights.items()
        for n in range(4)
    ]  # fmt: skip
    scores.append(score(8, "correct", prompt="cot", temperature=0.4, labels=labels[1], num_choices=4))
    console = Console(file=io.StringIO(), width=120)
    table = render_breakdown(build_breakdown(scores, [BASE]))
    console.print(table)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    header = next(line for line in lines if "chance" in line)
    rows = {line[1]: line[2:] for line in lines if line[:1] == ["grade"]}
    assert header[-2:] == ["chance", "n"]
    assert [BASE.name] in lines
    is_cot_first = header.index("cot") < header.index("zero_shot")
    easy = [cell for cell in rows["G1-6"] if cell.replace(".", "").isdigit()]
    assert easy[-2:] == ["50.0", "4"]
    assert [cell for cell in easy[:-2] if cell in ("25.0", "50.0")] == (
        ["25.0", "50.0"] if is_cot_first else ["50.0", "25.0"]
    )
    assert rows["G7-12"][0] == "80.0"
    assert rows["G7-12"][-2:] == ["25.0", "5"]
    assert "Accuracy" in str(table.title)
    assert table.caption


def test_a_label_of_one_question_has_a_row_and_questions_of_one_image_are_one_cluster():
    labels = (("topic", "physics"),)
    values = ("correct", "incorrect", "correct", "incorrect")
    scores = [score(n, value, labels=labels, image=f"image-{n // 2}") for n, value in enumerate(values)]
    scores += [score(n, "correct", labels=(("topic", "maps"),), image=None) for n in (4, 5)]
    [alone] = build_breakdown(scores[:1], [BASE])
    assert (alone.num_questions, alone.prompt, alone.temperature) == (1, "cot", 0.4)
    maps, physics = build_breakdown(scores, [BASE])
    assert physics.accuracy == estimate_accuracy([1, 0, 1, 0], ["0", "0", "1", "1"])
    assert maps.accuracy == estimate_accuracy([1, 1], ["4", "5"])
