"""Questions of one's own table (pipeline/sources/own_table.py): by the gold option, or in words by exact match."""

from __future__ import annotations

from vcot.eval.benchmark import Benchmark
from vcot.eval.scorer import score_by_kind

TABLE = Benchmark(name="table", source="table", scorer=score_by_kind)
