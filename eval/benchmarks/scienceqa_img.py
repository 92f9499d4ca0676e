"""ScienceQA's questions with an image (Lu et al. 2022), by subject; the test split's 2,017 are the paper's."""

from __future__ import annotations

from vcot.eval.benchmark import Benchmark
from vcot.eval.eval_section import EvalSection
from vcot.pipeline.records import Task

_LAST_OF_PRIMARY = 6


def describe_hint(section: EvalSection) -> str:
    """Whether the questions came with ScienceQA's hints."""
    if section.hint:
        return "A question that has a hint was asked with it (eval.hint), unlike in the paper's figures."
    return "The questions were asked without ScienceQA's hints, as in the paper's figures (eval.hint)."


def list_labels(task: Task) -> tuple[tuple[str, str], ...]:
    """Grade, context and topic as the authors' `evaluate_acc.py` has them: TXT and IMG both, of a question that has both."""
    grade = task.labels.get("grade", "").removeprefix("grade")
    years = [("grade", "G1-6" if int(grade) <= _LAST_OF_PRIMARY else "G7-12")] if grade.isdecimal() else []
    contexts = [("context", name) for name in task.labels.get("context", "").split()]
    return (*years, *contexts, *([("topic", task.family)] if task.family else ()))


SCIENCEQA = Benchmark(
    name="scienceqa",
    source="scienceqa",
    columns=("NAT", "SOC", "LAN"),
    labels_of=list_labels,
    note=describe_hint,
    official={"test": {"NAT": 1209, "SOC": 764, "LAN": 44}},
)
