"""A mixture of data sets: `tasks.source = "mix"` draws from each of `tasks.parts` by its weight.

Questions come in turns, of whichever part is furthest behind, so that at every point each has given its share to within two
questions: the first 100 of 200 are the 100. A part that has no more drops out, and the others go on in their proportions.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping

from vcot.pipeline.errors import DataError, RecipeError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.records import Task, content_key
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources.source import Source, find_source, key_tasks, list_parts

_log = logging.getLogger(__name__)


def digest_data(section: TasksSection) -> str:
    """A hash of the parts' keys and weights."""
    parts = _need_parts(section)
    weights = [part.weight for part in section.parts]
    return content_key(parts=[key_tasks(part) for part in parts], weights=weights)


def load(section: TasksSection, store: ImageStore) -> Iterator[Task]:
    """The questions in turns. Raises RecipeError for weights that say nothing, DataError for an id in two parts."""
    parts = _need_parts(section)
    if section.num_tasks is None and len({part.weight for part in section.parts}) > 1:
        raise RecipeError(
            "weights of tasks.parts say which questions are drawn; set tasks.num_tasks, or leave them out"
        )
    waiting = {number: iter(find_source(part).load(part, store)) for number, part in enumerate(parts)}
    taken: Counter[int] = Counter()
    seen: dict[str, int] = {}
    while waiting and taken.total() != section.num_tasks:
        number = _find_behind({number: section.parts[number].weight for number in waiting}, taken)
        task = next(waiting[number], None)
        if task is None:
            _log.info("%s has no more than %d questions", parts[number].source, taken[number])
            del waiting[number]
            continue
        if (other := seen.setdefault(task.id, number)) != number:
            raise DataError(
                f"task {task.id} is in parts {other + 1} and {number + 1} of tasks.parts; leave one of them out, or "
                "tell them apart by columns.id"
            )
        taken[number] += 1
        yield task


def _find_behind(weights: Mapping[int, float], taken: Mapping[int, int]) -> int:
    """The part that would be furthest behind its share, were the next question another's."""
    each = (1 + sum(taken[number] for number in weights)) / sum(weights.values())
    return max(weights, key=lambda number: weights[number] * each - taken[number])


def _need_parts(section: TasksSection) -> list[TasksSection]:
    if not section.parts:
        raise RecipeError(
            'tasks.source = mix needs tasks.parts, for example [{source = "aokvqa"}, {source = "scienceqa"}]'
        )
    return list_parts(section)


MIX = Source(load=load, digest=digest_data)
