"""An evaluation: what a benchmark asks of each checkpoint, the scores of the responses, and what they show.

Whoever evaluates asks `Questions.requests` with `vcot.sample`, which keeps each response in a ledger, reads them
back with `Questions.scores`, and gives the scores to `evaluate`. Nothing here talks to a server.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from vcot.eval.benchmark import Benchmark, find_benchmark
from vcot.eval.breakdown import PartRow, build_breakdown, render_breakdown
from vcot.eval.eval_section import EvalSection
from vcot.eval.findings import Difference, EvalResult
from vcot.eval.image_reliance import Reliance, ask_instead, build_reliance, render_reliance
from vcot.eval.margins import Margin, Margins, render_margins
from vcot.eval.matrix import Matrix
from vcot.eval.published import PaperRow, compare_published, load_published, render_published
from vcot.eval.repeats import Repeats, build_repeats, render_repeats
from vcot.eval.scorer import score_judged
from vcot.eval.table import build_chance, build_differences, build_results, render_results
from vcot.pipeline.errors import DataError, OwedError, RecipeError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges import JUDGES, Judge, find_judge
from vcot.pipeline.judging import look_at_judgments
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.odds import OptionScores
from vcot.pipeline.option_scores import NOT_DRAWN, OPTION_PROMPT, key_options
from vcot.pipeline.records import CheckpointRef, Record, Response, Score, ShownImage, Split, Task
from vcot.pipeline.sample import Group, Plan, SampleRequest
from vcot.pipeline.sources import load_tasks

_log = logging.getLogger(__name__)
Scores = dict[ShownImage, list[Score]]
"""By the image that was shown."""


@dataclass(frozen=True)
class Questions:
    """One split of a benchmark, asked as a recipe's section says."""

    benchmark: Benchmark
    section: EvalSection
    split: Split
    tasks: Sequence[Task]
    images: ImageStore
    """Holds the tasks' images, and is given the blank ones."""

    @property
    def summary(self) -> str:
        """What is asked, for people: `900 nano questions of test, zero_shot, cot at temperatures 0.4, 0.8`."""
        prompts, images = self.benchmark.list_prompts(self.section), self.section.images
        return (
            f"{len(self.tasks)} {self.benchmark.name} questions of {self.split}, {', '.join(prompts)} at temperatures "
            + ", ".join(f"{temperature:g}" for temperature in self.section.temperatures)
            + (f", images {', '.join(images)}" if len(images) > 1 else "")
        )

    @property
    def are_in_words(self) -> bool:
        """Whether some are answered in words, so that no rule which reads options applies."""
        return any(not task.choices for task in self.tasks)

    def requests(self, checkpoint: CheckpointRef, images: Sequence[ShownImage] = ()) -> list[SampleRequest]:
        """Every prompt at every temperature about every kind of image: those of the recipe, or `images` only."""
        own = [
            request
            for prompt in self.benchmark.list_prompts(self.section)
            for temperature in self.section.temperatures
            for turn in range(self.section.num_seeds)
            for request in Plan(self.tasks, prompt, checkpoint, self.section.params(temperature, turn))
        ]
        return self._show(own, images)

    def _show(self, own: list[SampleRequest], images: Sequence[ShownImage]) -> list[SampleRequest]:
        """The requests about each kind of image: those of the recipe, or `images` only."""
        asked: list[SampleRequest] = []
        for name in images or self.section.images:
            asked += own if name == "true" else ask_instead(own, self.tasks, name, self.images)
        return asked

    def option_requests(self, checkpoint: CheckpointRef, images: Sequence[ShownImage] = ()) -> list[SampleRequest]:
        """What is asked of each question with a wrong option, about each kind of image as in `requests`.

        Raises RecipeError where none has any.
        """
        tasks = [task for task in self.tasks if {*task.right_options} == {True, False}]
        if not tasks:
            raise RecipeError(
                f"eval.margins asks how likely each option is, and no question of {self.benchmark.name} has options; leave "
                "it out"
            )
        return self._show(list(Plan(tasks, OPTION_PROMPT, checkpoint, NOT_DRAWN)), images)

    def margins(self, checkpoints: Sequence[CheckpointRef], ledger: Ledger, *, is_done: bool = True) -> Margins:
        """What was told of the options, where the recipe asks.

        Raises OwedError where a checkpoint lacks it, unless the evaluation goes on, and is not done.
        """
        if not self.section.margins:
            return {}
        return {
            shown: [
                told for checkpoint in checkpoints for told in self._read_options(checkpoint, shown, ledger, is_done)
            ]
            for shown in self.section.images
        }

    def _read_options(
        self, checkpoint: CheckpointRef, shown: ShownImage, ledger: Ledger, is_done: bool
    ) -> list[OptionScores]:
        keys = [key_options(request) for request in self.option_requests(checkpoint, [shown])]
        found = ledger.get(OptionScores, keys)
        if keys and not found and is_done:
            raise OwedError(
                f"the run does not hold how likely {checkpoint.name} finds the options on {self.split} with the {shown} "
                "image; run `vcot eval` first"
            )
        return list(found.values())

    def requests_by_task(self, checkpoint: CheckpointRef) -> list[SampleRequest]:
        """The same, question by question: what is asked about one image comes together, and a server that keeps images and
        the beginnings of prompts computes each once.
        """
        place = {task.id: number for number, task in enumerate(self.tasks)}
        return sorted(self.requests(checkpoint), key=lambda request: place[request.task.id])

    def scores(self, checkpoints: Sequence[CheckpointRef], ledger: Ledger) -> Scores:
        """A score for each response that is there, errors included. Raises OwedError where a checkpoint has none."""
        return {
            shown: [score for checkpoint in checkpoints for score in self._score(checkpoint, shown, ledger)]
            for shown in self.section.images
        }

    def _score(self, checkpoint: CheckpointRef, shown: ShownImage, ledger: Ledger) -> list[Score]:
        keys = [key for request in self.requests(checkpoint, [shown]) for key in request.response_keys()]
        found = ledger.get(Response, keys)
        if not found:
            raise OwedError(
                f"the run holds no answer of {checkpoint.name} on {self.split} with the {shown} image; run `vcot eval` first"
            )
        return self.score([found[key] for key in keys if key in found], ledger)

    def score(self, responses: Sequence[Response], ledger: Ledger) -> list[Score]:
        """The scores of `responses`, in their order: by the benchmark's rule, or the recipe's judge."""
        tasks, judge = self._tasks_by_id, self.judge
        if judge is None:
            return [self.benchmark.score(tasks[response.task], response) for response in responses]
        groups = (Group(tasks[response.task], [response]) for response in responses if response.error is None)
        judged = {
            seen.response.key: seen.judgment
            for _, group in look_at_judgments(judge, groups, ledger, whole=True)
            for seen in group
        }
        return [
            self.benchmark.label(task, score_judged(task, response, judge, judged.get(response.key)))
            for response in responses
            for task in [tasks[response.task]]
        ]

    @cached_property
    def _tasks_by_id(self) -> dict[str, Task]:
        return {task.id: task for task in self.tasks}

    @cached_property
    def judge(self) -> Judge | None:
        """Who scores the answers in place of the benchmark's rule. Raises RecipeError for one that cannot."""
        check_grader(self.section)
        return None if self.section.judge is None else find_judge(self.section.judge, self.images)

    def answers(self, checkpoints: Iterable[CheckpointRef], ledger: Ledger) -> Iterator[Group]:
        """What the judge is to score: of each question, the answers of `checkpoints` that came to an end."""
        by_task: dict[str, list[Response]] = {}
        for checkpoint in checkpoints:
            keys = [key for request in self.requests(checkpoint) for key in request.response_keys()]
            for response in ledger.get(Response, keys).values():
                if response.finish_reason != "length":
                    by_task.setdefault(response.task, []).append(response)
        for task in self.tasks:
            if task.id in by_task:
                yield Group(task, by_task[task.id])


def check_grader(section: EvalSection) -> None:
    """Raise RecipeError where the section's judge does not score each answer alone."""
    if section.judge is not None and JUDGES.resolve(section.judge.kind).compares:
        raise RecipeError(
            f"eval.judge.kind = {section.judge.kind} scores an answer by the others to its question, so that no figure of "
            "one checkpoint would stand by itself; take a judge that scores each answer alone, such as pointwise"
        )


def load_questions(
    section: EvalSection, split: Split, run_directory: Path, images: ImageStore, *, is_read: bool = False
) -> Questions:
    """The questions of one split, each with a gold answer; with `is_read`, only as an earlier command kept them.

    Raises RecipeError, DataError or OwedError, as `find_benchmark`, `Benchmark.tasks` and `load_tasks` do.
    """
    benchmark = find_benchmark(section)
    tasks = load_tasks(benchmark.tasks(section, split), run_directory, None if is_read else images)
    secret = next((task.id for task in tasks if task.answer is None and not task.gold), None)
    if secret is not None:
        raise DataError(
            f"task {secret} of {benchmark.name} has no gold answer, so that only a judge could score it; "
            "evaluate another split, name the column that holds the answer (eval.columns), or make it a task of a run and "
            "`vcot judge` it"
        )
    if section.num_tasks is None and (warning := benchmark.compare_official(split, tasks)):
        _log.warning(warning)
    return Questions(benchmark, section, split, tasks, images)


class Evaluation(Record):
    """What an evaluation found."""

    results: tuple[EvalResult, ...]
    differences: tuple[Difference, ...]
    """Each later checkpoint minus the first, then those among themselves."""
    chance: dict[str, float]
    hint: str = ""
    """How answers were asked for and scored: for ScienceQA, whether the questions came with their hints."""
    published: tuple[PaperRow, ...] = ()
    """The base model beside the paper's Table 1, where model and benchmark are the paper's."""
    reliance: tuple[Reliance, ...] = ()
    """Where other images were shown, too."""
    margins: tuple[Margin, ...] = ()
    """Where the server was asked how likely each option is."""
    repeats: tuple[Repeats, ...] = ()
    """Where questions were answered several times."""
    breakdown: tuple[PartRow, ...] = ()
    """By the benchmark's finer labels, where it has some."""
    matrix: Matrix | None = None
    """The same answers under other harnesses' rules, where whoever has the texts read them; no score says it."""


def evaluate(
    scores: Scores,
    checkpoints: Sequence[CheckpointRef],
    benchmark: Benchmark,
    section: EvalSection,
    *,
    model: str,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Table 1, the paired differences and the rest, from the scores of `checkpoints`, the first of which is the base.

    `model` is the source of the base as a recipe names it, such as llava-hf/llava-1.5-7b-hf: what others published of it is
    set beside. `notes` are sentences below the table, in place of the benchmark's own.
    """
    true = scores["true"]
    num_responses = section.num_samples * section.num_seeds
    rows = build_results(true, checkpoints, benchmark.columns, seed=section.seed, num_samples=num_responses)
    return Evaluation(
        results=tuple(rows),
        differences=tuple(build_differences(true, checkpoints[0], checkpoints[1:])),
        chance=build_chance(true, benchmark.columns),
        hint=" ".join(filter(None, notes or [benchmark.note(section)])),
        published=tuple(compare_published(rows, section, model, load_published())),
        reliance=tuple(build_reliance(scores, checkpoints)),
        repeats=tuple(build_repeats(true, checkpoints)),
        breakdown=tuple(build_breakdown(true, checkpoints)),
    )


def render_evaluation(found: Evaluation, benchmark: Benchmark) -> list[RenderableType]:
    """The tables and sentences for a terminal."""
    parts = render_results(found.results, found.differences, found.chance, benchmark.columns)
    parts += [render_breakdown(found.breakdown)] if found.breakdown else []
    parts += render_repeats(found.repeats) if found.repeats else []
    parts += [Text(f"\n{found.hint}")] if found.hint else []
    parts += render_published(found.published) if found.published else []
    parts += render_reliance(found.reliance) if found.reliance else []
    parts += render_margins(found.margins) if found.margins else []
    return parts
