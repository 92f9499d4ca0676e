"""A source: a data set whose questions become `Task` records, and what is known of it.

A recipe names one in `tasks.source`: a built-in, an object of a module of one's own, or an entry point of the group
`vcot.sources`. docs/extending.md shows how to write one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vcot.pipeline.data_sections import FilterSection, PartSection
from vcot.pipeline.errors import DataError, RecipeError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.open_lists import SOURCE_NAMES
from vcot.pipeline.plugins import Plugins
from vcot.pipeline.records import Split, Task, content_key
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources.drafts import Draft, draw

NO_FILTER = FilterSection()
Load = Callable[[TasksSection, ImageStore], Iterable[Task]]


@dataclass(frozen=True)
class Source:
    """What a data set decides; which of its splits, how many of its questions and from where is the recipe's."""

    load: Load
    """The questions that a section asks for, images stored. `draw_from` makes it of a list of all the questions."""
    digest: Callable[[TasksSection], str]
    """Names the data that `load` would read, for keys: the same for the same data, wherever its files lie."""
    name_tasks: Callable[[TasksSection], Mapping[str, str]] = lambda section: {}
    """What its own files call the questions, and so other tools' logs -> the tasks' ids, where these are others."""
    has_hints: bool = False
    """Whether `tasks.hint` means something here."""
    hub_name: str | None = None
    """Where the questions are on the hub; None where they are read from files, or drawn."""
    is_drawn: bool = False
    """Whether the questions are made here, from nothing."""
    licence: str = "license: other"
    """Of questions and images, as lines of a data card's header."""
    num_questions: Mapping[Split, int] = field(default_factory=dict)
    """How many with an image each split of the published files holds, where that is known; for estimates."""
    image_bytes: int = 0
    """Of a usual image; for estimates."""


SOURCES: Plugins[Source] = SOURCE_NAMES.of_kind(lambda found: isinstance(found, Source), "a vcot.Source")


def find_source(section: TasksSection) -> Source:
    """The recipe's source. Raises RecipeError where it cannot be imported, or does not go by a setting that is set."""
    source = SOURCES.resolve(section.source)
    if section.hint and not source.has_hints:
        raise RecipeError(f"source {section.source} has no hints; leave hint out")
    if section.parts and section.source != "mix":
        raise RecipeError(f"source {section.source} does not go by tasks.parts; set tasks.source = mix")
    if section.filter != NO_FILTER and source.is_drawn:
        raise RecipeError(f"the questions of {section.source} are made here, and not filtered; leave tasks.filter out")
    return source


def list_parts(section: TasksSection) -> list[TasksSection]:
    """The data sets that a section's questions come from, each as if it were the only one: a mixture's parts, or itself.

    A part's questions are drawn by the mixture's seed, and are as many as the mixture could need.
    """
    drawn = {"num_tasks": section.num_tasks, "seed": section.seed}
    parts = [
        TasksSection(**{name: getattr(part, name) for name in PartSection.model_fields} | drawn)
        for part in section.parts
    ]
    return parts or [section]


def key_tasks(section: TasksSection) -> str:
    """Key of the tasks: which data, which draw; how a file is sorted and where it lies change nothing."""
    source = find_source(section)
    hint = {"hint": True} if section.hint else {}
    columns = {"columns": section.columns.model_dump(exclude={"allow_urls"})} if section.columns else {}
    chosen = {} if section.filter == NO_FILTER else {"filter": section.filter}
    return content_key(
        source=section.source,
        data=source.digest(section),
        split=section.split,
        num_tasks=section.num_tasks,
        seed=section.seed,
        **hint,
        **columns,
        **chosen,
        **SOURCES.digest_own(section.source),
    )


def keeps(chosen: FilterSection, question: Draft | Task) -> bool:
    """Whether a question meets every line that is set."""
    return (
        (not chosen.subjects or question.subject in chosen.subjects)
        and (not chosen.families or question.family in chosen.families)
        and _has(chosen.images, question.images)
        and _has(chosen.options, question.choices)
        and _has(chosen.gold, question.answer is not None or question.gold)
        and (chosen.max_words is None or len(question.question.split()) <= chosen.max_words)
    )


def _has(wanted: Literal["any", "some", "none"], found: object) -> bool:
    return wanted == "any" or bool(found) == (wanted == "some")


def find_path(section: TasksSection) -> Path | None:
    """Where the source's files are; None where the recipe names no place. Raises DataError where nothing is there."""
    if section.path is None:
        return None
    path = Path(section.path).expanduser()
    if not path.exists():
        raise DataError(f"{section.source} path {section.path} does not exist; give the folder of the official files")
    return path


def need_path(section: TasksSection) -> Path:
    """Where the files of a source are that has no copy on the hub. Raises DataError where the recipe names no place."""
    path = find_path(section)
    if path is None:
        raise DataError(f"{section.source} is read from files; set its path")
    return path


def draw_from(list_questions: Callable[[TasksSection], Iterable[Draft]]) -> Load:
    """Loads `num_tasks` of the listed questions that the filter keeps, or all, in an order that
    their ids and the section's seed decide.

    Only the drawn ones have their images read. Raises DataError where an id occurs twice, or a question cannot be used.
    """

    def load(section: TasksSection, store: ImageStore) -> Iterable[Task]:
        listed = (draft for draft in list_questions(section) if keeps(section.filter, draft))
        return (draft.build(store) for draft in draw(listed, section.num_tasks, section.seed))

    return load
