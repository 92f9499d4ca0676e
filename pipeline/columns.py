"""Which column of a table of one's own holds what: `tasks.columns` of a recipe (pipeline/sources/own_table.py)."""

from __future__ import annotations

from pipeline.fields import Section


class ColumnsSection(Section):
    """Names of columns."""

    hub: str | None = None
    """A data set on the hub, as owner/name, instead of files at `tasks.path`."""
    question: str = "question"
    """The question."""
    image: str = "image"
    """Its image: bytes, a path relative to the file, or the hub's feature Image."""
    choices: str = "choices"
    """Its options, as a list; an empty name for questions that are answered in words."""
    answer: str = "answer"
    """The right option by index from 0, letter or text; without options, the right words; an empty name for none."""
    id: str | None = None
    """What names the question; without it, a hash of what it asks."""
    subject: str | None = None
    """By which a benchmark's table may have its columns."""
    rationale: str | None = None
    """Why the answer is right."""
