"""What a benchmark's own rule reads in the answers of one log, where questions are answered in words.

That is the rule of an evaluation of ours (exact match, or A-OKVQA's), under the name of our rule for options; the rules of
other harnesses in eval/rules/ read options only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from vcot.eval.benchmark import Benchmark
from vcot.eval.logged.readings import CUT, Readings, Said
from vcot.eval.rules import OWN, UNREAD
from vcot.pipeline.records import CheckpointRef, Response, SamplingParams, Task
from vcot.pipeline.stage import batched

_BATCH = 2000
_READ_WHOLE = "short_answer"
"""A prompt whose responses have no thought before the answer: what of a text is the answer was found already."""
_UNKNOWN = {
    "checkpoint": CheckpointRef(name="a log", digest="", kind="base"),
    "sampling": SamplingParams(temperature=0, max_tokens=1, seed=0),
}
"""What a log need not say, and no rule asks."""


def read_words(said: Iterable[Said], tasks: Sequence[Task], benchmark: Benchmark) -> Iterator[Readings]:
    """The same object again and again, which holds more with each batch."""
    found = Readings(reasons={OWN: Counter()})
    for batch in batched(said, _BATCH):
        found.tasks.append(np.fromiter((each.task for each in batch), np.int32, len(batch)))
        found.points.append(np.array([_score(each, tasks[each.task], benchmark) for each in batch]))
        unread = np.isnan(found.points[-1])
        found.reasons[OWN].update(CUT if batch[number].is_cut else UNREAD for number in np.flatnonzero(unread))
        yield found


def _score(said: Said, task: Task, benchmark: Benchmark) -> float:
    response = Response(
        key="", group="", task=task.id, index=0, prompt=_READ_WHOLE, text=said.text,
        finish_reason="length" if said.is_cut else "stop", **_UNKNOWN,
    )  # fmt: skip
    score = benchmark.score(task, response)
    return np.nan if score.value == "no_answer" else score.earned
