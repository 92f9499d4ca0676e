"""All of ScienceQA's questions (Lu et al. 2022), more than half of them without an image, by subject and by finer labels.

The 4,241 of test are 2,252 of natural, 889 of social and 1,100 of language science.
"""

from __future__ import annotations

from vcot.eval.benchmark import Benchmark
from vcot.eval.benchmarks.scienceqa_img import describe_hint, list_labels

SCIENCEQA_ALL = Benchmark(
    name="scienceqa_all",
    source="scienceqa_all",
    columns=("NAT", "SOC", "LAN"),
    labels_of=list_labels,
    note=describe_hint,
    official={"test": {"NAT": 2252, "SOC": 889, "LAN": 1100}},
)
