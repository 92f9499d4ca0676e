"""A-OKVQA's multiple-choice questions (Schwenk et al. 2022). They have no subjects; the test split's answers are secret."""

from __future__ import annotations

from vcot.eval.benchmark import Benchmark

AOKVQA = Benchmark(name="aokvqa", source="aokvqa", splits=("train", "validation"))
