"""Questions about things that are in the drawing, and the same about things that are not, each in a column of its own."""

from __future__ import annotations

from operator import attrgetter

from vcot.eval.benchmark import Benchmark

ABSENT = Benchmark(
    name="absent",
    source="absent",
    splits=("test",),
    columns=("there", "absent"),
    column_of=attrgetter("family"),
    note=lambda _: (
        "absent: right is only that there is no such thing; any other answer tells something of what is not there."
    ),
)
