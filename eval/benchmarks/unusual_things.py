"""Drawings of unusual things and of usual ones, asked whole; eval/prior.py tells what was seen from what was expected."""

from __future__ import annotations

from vcot.eval.benchmark import Benchmark

UNUSUAL = Benchmark(name="unusual", source="unusual", splits=("test",))
