"""ScienceQA's questions with an image (Lu et al. 2022), by subject; the test split's 2,017 are the paper's."""

from __future__ import annotations

from eval.benchmark import Benchmark
from pipeline.sections import EvalSection


def describe_hint(section: EvalSection) -> str:
    """Whether the questions came with ScienceQA's hints."""
    if section.hint:
        return "A question that has a hint was asked with it (eval.hint), unlike in the paper's figures."
    return "The questions were asked without ScienceQA's hints, as in the paper's figures (eval.hint)."


SCIENCEQA = Benchmark(
    name="scienceqa",
    source="scienceqa",
    columns=("NAT", "SOC", "LAN"),
    note=describe_hint,
    official={"test": {"NAT": 1209, "SOC": 764, "LAN": 44}},
)
