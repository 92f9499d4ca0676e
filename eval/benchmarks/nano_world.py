"""Questions about small drawn scenes, under the names of ScienceQA's subjects."""

from __future__ import annotations

from vcot.eval.benchmark import Benchmark

NANO = Benchmark(name="nano", source="nano", columns=("NAT", "SOC", "LAN"))
