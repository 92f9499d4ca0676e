"""ScienceQA (Lu et al. 2022), from the official files or the hub's copy: the questions with an image, or all.

Official layout: `problems.json` (pid -> problem), `pid_splits.json` (split -> pids; our `validation` is its `val`) and
`images/<split>/<pid>/<image>`. On the hub, `derek-thomas/ScienceQA` has the same fields as columns and no pid, so a
task's id is a hash of what it asks, and where several ask the same, of its picture, too: both copies give the same tasks,
and the same seed draws the same of them.

The paper's prompts have a place for question and options only, so the `hint` (a passage that 1,257 of the 2,017 test
questions come with) is left out, unless it is asked for: then it stands before the question. The `solution` is the
rationale, the `topic` the family.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from vcot.pipeline.errors import DataError
from vcot.pipeline.records import Split, content_key
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources.drafts import (
    Draft,
    Row,
    StoreImage,
    check_whole,
    digest_files,
    file_image,
    read_json,
    read_row,
    tell_apart,
)
from vcot.pipeline.sources.hub import hub_key, iterate_hub
from vcot.pipeline.sources.source import Source, draw_from, find_path

_HUB_NAME = "derek-thomas/ScienceQA"
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_OFFICIAL_SPLIT = {"train": "train", "validation": "val", "test": "test"}


class Problem(Row):
    """What is read of a problem; the official file and the hub agree on these names."""

    question: str = Field(min_length=1)
    choices: tuple[str, ...]
    answer: int
    hint: str = ""
    subject: Literal["natural science", "social science", "language science"]
    topic: str = ""
    grade: str = ""
    solution: str = ""


class OfficialProblem(Problem):
    """A problem of `problems.json`, which names its image file."""

    image: str | None


class Splits(Row):
    """The official splits that we read (`pid_splits.json` also has smaller ones)."""

    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


def digest_data(section: TasksSection) -> str:
    """The hash of the lists, or the hub's name and revision."""
    path = find_path(section)
    if path is None:
        return hub_key(_HUB_NAME, section.revision)
    return digest_files([path / "problems.json", path / "pid_splits.json"])


def list_questions(section: TasksSection) -> list[Draft]:
    """The questions of a split that have an image, with `hint` each after its passage.

    Raises DataError for files that are missing or malformed.
    """
    return tell_apart([draft for draft in _list_all(section) if draft.images])


def list_all(section: TasksSection) -> list[Draft]:
    """All questions of a split. Raises DataError as `list_questions` does."""
    return tell_apart(_list_all(section))


def _list_all(section: TasksSection) -> list[Draft]:
    path, split, hint = find_path(section), section.split, section.hint
    return _list_hub(section.revision, split, hint=hint) if path is None else _list_official(path, split, hint=hint)


def _list_official(path: Path, split: Split, *, hint: bool) -> list[Draft]:
    problems = read_json(path / "problems.json", dict)
    splits = read_row(Splits, read_json(path / "pid_splits.json", dict), str(path / "pid_splits.json"))
    official = _OFFICIAL_SPLIT[split]
    drafts = []
    pids = getattr(splits, official)
    for pid, num in Counter(pids).items():
        check_whole(pid, str(path / "problems.json"))
        where = f"{path / 'problems.json'}, problem {pid}"
        if num > 1:
            raise DataError(f"{where}: occurs twice in split {official} of pid_splits.json; keep one of the two")
        if pid not in problems:
            raise DataError(f"{where}: listed in pid_splits.json but missing; download both files again")
        problem = read_row(OfficialProblem, problems[pid], where)
        images = (file_image(path / "images" / official / pid / problem.image),) if problem.image else ()
        drafts.append(replace(_draft(problem, split, where, images, hint=hint), own_name=pid))
    return drafts


def map_pids(list_drafts: Callable[[TasksSection], list[Draft]]) -> Callable[[TasksSection], dict[str, str]]:
    """Gives the task of each pid among the listed questions; the hub's copy has no pids."""

    def name_tasks(section: TasksSection) -> dict[str, str]:
        drafts = [] if section.path is None else list_drafts(section)
        return {draft.own_name: draft.id for draft in drafts}

    return name_tasks


def _list_hub(revision: str | None, split: Split, *, hint: bool) -> list[Draft]:
    drafts = []
    for row in iterate_hub(_HUB_NAME, revision, split):
        where = f"{_HUB_NAME}, split {split}, row {row.number}"
        problem = read_row(Problem, row.columns, where)
        drafts.append(_draft(problem, split, where, row.images, hint=hint))
    return drafts


def _draft(problem: Problem, split: Split, where: str, images: tuple[StoreImage, ...], *, hint: bool) -> Draft:
    asked = [" ".join(text.split()) for text in (problem.question, problem.hint, *problem.choices)]
    passage = f"{problem.hint.strip()}\n" if hint and problem.hint.strip() else ""
    return Draft(
        id=f"scienceqa/{content_key(asked=asked, answer=problem.answer)[:16]}",
        question=passage + problem.question,
        choices=problem.choices,
        answer=problem.answer,
        rationale=problem.solution,
        subject=_SUBJECTS[problem.subject],
        family=problem.topic,
        source="scienceqa",
        split=split,
        where=where,
        images=images,
        labels={"grade": problem.grade, "context": _name_context(problem, images)},
    )


def _name_context(problem: Problem, images: tuple[StoreImage, ...]) -> str:
    """The columns of the authors' table that it counts in: TXT with a passage, IMG with an image, NO with neither."""
    names = [name for name, is_there in (("TXT", problem.hint.strip()), ("IMG", images)) if is_there]
    return " ".join(names) or "NO"


SCIENCEQA = Source(
    load=draw_from(list_questions),
    digest=digest_data,
    name_tasks=map_pids(list_questions),
    has_hints=True,
    hub_name=_HUB_NAME,
    licence="license: cc-by-nc-sa-4.0",
    num_questions={"train": 6_218, "validation": 2_097, "test": 2_017},
    image_bytes=69_000,
)
"""Questions with an image, counted in the published files; the bytes are the mean of 58 images."""
SCIENCEQA_ALL = replace(
    SCIENCEQA,
    load=draw_from(list_all),
    name_tasks=map_pids(list_all),
    num_questions={"train": 12_726, "validation": 4_241, "test": 4_241},
)
"""All questions, more than half of which have no image."""
