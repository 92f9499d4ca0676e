"""What a recipe says about a data set: where it is, which column holds what, and which questions are drawn from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from vcot.pipeline.fields import Count, Section
from vcot.pipeline.open_lists import SOURCE_NAMES
from vcot.pipeline.records import Split


class ColumnsSection(Section):
    """Names of columns of a table of one's own (pipeline/sources/own_table.py)."""

    hub: str | None = None
    """A data set on the hub, as owner/name, instead of files at `tasks.path`."""
    question: str = "question"
    """The question."""
    image: str = "image"
    """Its image or a list of them: bytes, paths relative to the file, or the hub's feature Image; empty for none."""
    allow_urls: bool = False
    """Whether images may be addresses, and are then downloaded."""
    choices: str = "choices"
    """Its options, as a list; an empty name for questions that are answered in words."""
    answer: str = "answer"
    """The right option by index from 0, letter or text; without options, the right words or a list of accepted answers."""
    id: str | None = None
    """What names the question; without it, a hash of what it asks."""
    subject: str | None = None
    """By which a benchmark's table may have its columns."""
    rationale: str | None = None
    """Why the answer is right."""


class FilterSection(Section):
    """Which questions are drawn from: those that meet every line that is set."""

    subjects: tuple[str, ...] = ()
    """Only these subjects, as the source names them: NAT, SOC or LAN of ScienceQA."""
    families: tuple[str, ...] = ()
    """Only these finer labels, as a topic of ScienceQA."""
    images: Literal["any", "some", "none"] = "any"
    """Only questions with images, or only those without."""
    options: Literal["any", "some", "none"] = "any"
    """Only questions with options, or only those that are answered in words."""
    gold: Literal["any", "some", "none"] = "any"
    """Only questions whose right answer is known, or only the others."""
    max_words: Count | None = None
    """The longest question, in words."""


class PartSection(Section):
    """A data set, and which of its questions are drawn from."""

    source: Annotated[str, AfterValidator(SOURCE_NAMES.check)]
    """The data set: one of vcot's own (docs/data.md), such as aokvqa, or yours as package.module:object."""
    path: str | None = None
    """Its official on-disk layout; without it, the hub's copy is read (nano is drawn, and needs neither)."""
    columns: ColumnsSection | None = None
    """For `table`: which column of your files holds what."""
    revision: str | None = None
    """The revision of the hub's copy (a commit for a run that can be repeated)."""
    split: Split = "train"
    """The source's split."""
    hint: bool = False
    """Whether ScienceQA's hint stands before a question that has one; the paper's prompts have no place for it."""
    filter: FilterSection = FilterSection()
    """Which questions are drawn from; without it, all."""


class WeightedSection(PartSection):
    """One data set of a mixture."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its share of `num_tasks` is this over the sum of all weights."""
