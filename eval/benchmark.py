"""A benchmark: which questions it asks, with which prompts, how it scores a response, and which columns its table has.

A recipe names one in `eval.benchmark`: a built-in (eval/benchmarks/ has a file for each), an object of a module of one's
own, or an entry point of the group `vcot.benchmarks`. docs/extending.md shows how to write one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from pydantic import ValidationError

from vcot.eval.eval_section import EvalSection
from vcot.eval.scorer import score_choice
from vcot.eval.table import OVERALL
from vcot.pipeline.errors import RecipeError
from vcot.pipeline.files import explain
from vcot.pipeline.open_lists import BENCHMARK_NAMES
from vcot.pipeline.plugins import Plugins
from vcot.pipeline.records import PromptName, Response, Score, Split, Task
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources.source import find_source

_ALL: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark decides; how often, how hot and how many of its questions are asked is the recipe's."""

    name: str
    """What tables and pages call it."""
    source: str
    """The data set that its questions come from, as `tasks.source` names one."""
    splits: tuple[Split, ...] = _ALL
    """Those that have gold answers."""
    prompts: tuple[PromptName, ...] = ("zero_shot", "cot")
    """What is compared where the recipe does not say (eval.prompts)."""
    columns: tuple[str, ...] = ()
    """Of its table, after the average over all questions."""
    column_of: Callable[[Task], str | None] = attrgetter("subject")
    """The column that a question counts in beside the average; None for no other."""
    labels_of: Callable[[Task], tuple[tuple[str, str], ...]] = lambda _: ()
    """A question's finer labels, each with what it says, as ("grade", "G1-6"): rows of a table of their own."""
    scorer: Callable[[Task, Response], Score] = score_choice
    """Whether a response is right. Its `num_choices` say how often a guess is, and its `subject` is set by `column_of`."""
    note: Callable[[EvalSection], str] = lambda _: ""
    """A sentence below the table on how the questions were asked, or nothing."""
    official: Mapping[Split, Mapping[str, int]] = field(default_factory=dict)
    """By split and column, how many questions published figures stand on, where there are some."""

    def __post_init__(self) -> None:
        if len({OVERALL, *self.columns}) <= len(self.columns):
            raise ValueError(f"columns {', '.join(self.columns)} of {self.name}: name each once, and none {OVERALL}")

    def tasks(self, section: EvalSection, split: Split) -> TasksSection:
        """The questions of `split` that a recipe asks for. Raises RecipeError where the benchmark cannot have them."""
        if split not in self.splits:
            raise RecipeError(
                f"benchmark {self.name} has answers for {' and '.join(self.splits)} only, not for {split}; set eval.split "
                "to one that it has (with rounds.num > 1, validation is asked, too)"
            )
        fields = section.model_dump(include={"path", "columns", "revision", "num_tasks", "seed", "hint"})
        try:
            asked = TasksSection.model_validate({"source": self.source, "split": split, **fields})
        except ValidationError as error:
            raise RecipeError(f"benchmark {self.name}: {explain(error).removeprefix('Value error, ')}") from None
        find_source(asked)
        return asked

    def list_prompts(self, section: EvalSection) -> tuple[PromptName, ...]:
        """The recipe's prompts, or else the benchmark's own."""
        return section.prompts or self.prompts

    def score(self, task: Task, response: Response) -> Score:
        """The score of a response, in its column and under its labels. Raises DataError for a task without a gold answer."""
        return self.label(task, self.scorer(task, response))

    def label(self, task: Task, score: Score) -> Score:
        """A score of the task in its column and under its labels."""
        return score.model_copy(update={"subject": self.column_of(task), "labels": self.labels_of(task)})

    def compare_official(self, split: Split, tasks: Sequence[Task]) -> str | None:
        """How all its questions of `split` differ in number from the official ones, in a sentence; None if they do not."""
        official, found = self.official.get(split, {}), Counter(map(self.column_of, tasks))
        if all(found[column] == number for column, number in official.items()):
            return None
        ours, theirs = (", ".join(f"{column} {counts[column]}" for column in official) for counts in (found, official))
        return (
            f"these {self.name} {split} questions are not the official ones ({ours}; official: {theirs}), so published "
            "figures do not compare"
        )


BENCHMARKS: Plugins[Benchmark] = BENCHMARK_NAMES.of_kind(lambda found: isinstance(found, Benchmark), "a vcot.Benchmark")


def find_benchmark(section: EvalSection) -> Benchmark:
    """The recipe's benchmark. Raises RecipeError where it cannot be imported, or is something else."""
    return BENCHMARKS.resolve(section.benchmark)
