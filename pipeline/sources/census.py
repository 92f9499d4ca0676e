"""What the drawn questions are, data set by data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vcot.pipeline.records import Record, Task


class SourceCount(Record):
    """The questions of one data set."""

    source: str
    num_tasks: int
    num_images: int
    """Different ones."""
    num_without_image: int
    num_with_options: int
    num_with_gold: int
    """Whose right answer is known."""
    mean_words: float
    """Length of a question."""

    @property
    def summary(self) -> str:
        """One line: its name, how many questions of how many words, about how many images, and with what."""
        images = f"about {self.num_images:,} images" if self.num_images else "without images"
        some = f" ({self.num_without_image:,} without one)" if self.num_images and self.num_without_image else ""
        return (
            f"{self.source}: {self.num_tasks:,} questions of {self.mean_words:.0f} words on average, {images}{some}; "
            f"{self.num_with_options:,} with options, {self.num_with_gold:,} with a gold answer"
        )


def count_sources(tasks: Iterable[Task]) -> list[SourceCount]:
    """The data sets in the order of their first question."""
    by_source: dict[str, list[Task]] = {}
    for task in tasks:
        by_source.setdefault(task.source, []).append(task)
    return [_count(source, own) for source, own in by_source.items()]


def _count(source: str, tasks: Sequence[Task]) -> SourceCount:
    return SourceCount(
        source=source,
        num_tasks=len(tasks),
        num_images=len({image.sha256 for task in tasks for image in task.images}),
        num_without_image=sum(not task.images for task in tasks),
        num_with_options=sum(bool(task.choices) for task in tasks),
        num_with_gold=sum(task.answer is not None or bool(task.gold) for task in tasks),
        mean_words=sum(len(task.question.split()) for task in tasks) / len(tasks),
    )
