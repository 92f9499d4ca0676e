"""ScienceQA (Lu et al. 2022): the questions with an image, from the official files or the hub's copy.

Official layout: `problems.json` (pid -> problem), `pid_splits.json` (split -> pids; our `validation` is its `val`) and
`images/<split>/<pid>/<image>`. On the hub, `derek-thomas/ScienceQA` has the same fields as columns and no pid, so its
tasks are known by their row.

The question is kept as it is: the paper's prompts have a place for question and options only, so the `hint` (a passage
that some questions refer to) is left out. The `solution` is the rationale, the `topic` the family.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from pipeline.errors import DataError
from pipeline.records import Split, Subject
from pipeline.sources.drafts import Draft, Row, StoreImage, digest_files, file_image, read_json, read_row
from pipeline.sources.hub import hub_key, iterate_hub

HUB_NAME = "derek-thomas/ScienceQA"
TEST_NUM_QUESTIONS: dict[Subject, int] = {"NAT": 1209, "SOC": 764, "LAN": 44}
"""Questions with an image in the official test split, 2,017 together: what published ScienceQA-IMG figures stand on."""

_SUBJECTS: dict[str, Subject] = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_OFFICIAL_SPLIT = {"train": "train", "validation": "val", "test": "test"}
_log = logging.getLogger(__name__)


class Problem(Row):
    """What is read of a problem; the official file and the hub agree on these names."""

    question: str = Field(min_length=1)
    choices: tuple[str, ...]
    answer: int
    subject: Literal["natural science", "social science", "language science"]
    topic: str = ""
    solution: str = ""


class OfficialProblem(Problem):
    """A problem of `problems.json`, which names its image file."""

    image: str | None


class Splits(Row):
    """The official splits that we read (`pid_splits.json` also has smaller ones)."""

    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


def data_key(path: Path | None, revision: str | None) -> str:
    """Which data stands behind `path`: the hash of its lists, or the hub's name and revision."""
    return (
        hub_key(HUB_NAME, revision)
        if path is None
        else digest_files([path / "problems.json", path / "pid_splits.json"])
    )


def list_questions(path: Path | None, revision: str | None, split: Split) -> list[Draft]:
    """The image questions of `split`. Raises DataError for files that are missing or malformed."""
    drafts = _list_hub(revision, split) if path is None else _list_official(path, split)
    if split == "test" and drafts and (warning := check_test_counts([draft.subject for draft in drafts])):
        _log.warning(warning)
    return drafts


def check_test_counts(subjects: Sequence[Subject | None]) -> str | None:
    """None for the full official test split; else a sentence that says how these questions differ from it."""
    counts = Counter(subjects)
    if all(counts[subject] == expected for subject, expected in TEST_NUM_QUESTIONS.items()):
        return None
    found = ", ".join(f"{subject} {counts[subject]}" for subject in TEST_NUM_QUESTIONS)
    official = ", ".join(f"{subject} {expected}" for subject, expected in TEST_NUM_QUESTIONS.items())
    return (
        f"these ScienceQA test questions are not the official ones ({found}; official: {official}), "
        "so published figures do not compare"
    )


def _list_official(path: Path, split: Split) -> list[Draft]:
    problems = read_json(path / "problems.json", dict)
    splits = read_row(Splits, read_json(path / "pid_splits.json", dict), str(path / "pid_splits.json"))
    official = _OFFICIAL_SPLIT[split]
    drafts = []
    for pid in getattr(splits, official):
        where = f"{path / 'problems.json'}, problem {pid}"
        if pid not in problems:
            raise DataError(f"{where}: listed in pid_splits.json but missing; download both files again")
        problem = read_row(OfficialProblem, problems[pid], where)
        if problem.image:
            image = path / "images" / official / pid / problem.image
            drafts.append(_draft(problem, pid, split, str(path / "problems.json"), file_image(image)))
    return drafts


def _list_hub(revision: str | None, split: Split) -> list[Draft]:
    drafts = []
    for row in iterate_hub(HUB_NAME, revision, split):
        if row.store_image is not None:
            problem = read_row(Problem, row.columns, f"{HUB_NAME}, split {split}, row {row.number}")
            drafts.append(_draft(problem, f"{split}-{row.number}", split, HUB_NAME, row.store_image))
    return drafts


def _draft(problem: Problem, name: str, split: Split, where: str, store_image: StoreImage) -> Draft:
    return Draft(
        id=f"scienceqa/{name}",
        question=problem.question,
        choices=problem.choices,
        answer=problem.answer,
        rationale=problem.solution,
        subject=_SUBJECTS[problem.subject],
        family=problem.topic,
        source="scienceqa",
        split=split,
        where=where,
        store_image=store_image,
    )
