"""Sources of tasks, each as a list of `Task` records; a source is what pipeline/sources/source.py says.

Tasks are loaded once per run and kept in `<run>/tasks/<key>.jsonl`. The key says which data it is (the hash of a source's
question lists, or its name and revision on the hub), which split and which draw; where the files lie is not part of it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from vcot.pipeline.errors import DataError, OwedError, RecipeError
from vcot.pipeline.files import replace_file
from vcot.pipeline.images import ImageStore
from vcot.pipeline.records import Task
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources.drafts import explain
from vcot.pipeline.sources.source import find_source, keeps, key_tasks, list_parts

_log = logging.getLogger(__name__)


def load_tasks(section: TasksSection, run_directory: Path, store: ImageStore | None) -> list[Task]:
    """The questions that `section` names, images stored; the second time, as kept in the run.

    Raises RecipeError for a source that cannot be used; DataError, with no task kept, for data that is missing, empty or
    malformed; without a store, OwedError for what is not kept yet.
    """
    kept = run_directory / "tasks" / f"{key_tasks(section)}.jsonl"
    if kept.is_file():
        return _read(kept)
    if store is None:
        raise OwedError(
            f"run {run_directory} does not hold the questions of {_describe(section)} yet; `vcot sample` and `vcot eval` "
            "load them"
        )
    tasks = list(find_source(section).load(section, store))
    if not tasks:
        raise DataError(
            f"{_describe(section)} holds no question that can be drawn; set another split, path or tasks.filter"
        )
    if (wrong := next((task.id for task in tasks if not keeps(section.filter, task)), None)) is not None:
        raise RecipeError(
            f"source {section.source} does not go by tasks.filter, and gave task {wrong}; leave the filter out"
        )
    if section.num_tasks is not None and len(tasks) < section.num_tasks:
        _log.warning("%s holds %d questions, not the %d asked for", _describe(section), len(tasks), section.num_tasks)
    _write(kept, tasks)
    return tasks


def load_round(section: TasksSection, number: int, run_directory: Path, store: ImageStore | None) -> list[Task]:
    """The questions of round `number` (from 1): the next `num_tasks` of one draw, without those about an earlier image.

    Raises DataError where the source has none left, and as `load_tasks` does.
    """
    if number == 1 or section.num_tasks is None:
        return load_tasks(section, run_directory, store)
    size = section.num_tasks
    drawn = load_tasks(section.model_copy(update={"num_tasks": size * number}), run_directory, store)
    earlier, fresh = drawn[: size * (number - 1)], drawn[size * (number - 1) :]
    seen = {image.sha256 for task in earlier for image in task.images}
    tasks = [task for task in fresh if seen.isdisjoint(image.sha256 for image in task.images)]
    if not tasks:
        raise DataError(
            f"{_describe(section)} has no question left for round {number}; lower rounds.num or tasks.num_tasks"
        )
    return tasks


def name_sources(section: TasksSection) -> str:
    """The data sets that questions come from, as `aokvqa`, or `aokvqa + table` of a mixture."""
    return " + ".join(part.source for part in list_parts(section))


def _describe(section: TasksSection) -> str:
    part, *others = list_parts(section)
    place = "" if others else part.path or ("drawn here" if find_source(part).is_drawn else "from the hub")
    return " ".join(filter(None, [name_sources(section), place])) + f", split {part.split},"


def _read(path: Path) -> list[Task]:
    try:
        return [Task.model_validate_json(line) for line in path.read_bytes().splitlines()]
    except ValidationError as error:
        raise DataError(f"{path} was altered ({explain(error)}); delete it, and it is loaded again") from None


def _write(path: Path, tasks: Sequence[Task]) -> None:
    """Keep `tasks` in one step: after a crash the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(f"{task.model_dump_json()}\n" for task in tasks))
