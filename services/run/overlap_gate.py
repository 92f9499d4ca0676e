"""Held out means held out: a round's questions are compared with the evaluation's before it samples, and before it pairs.

The perceptual hashes of the images are kept in the run (`pictures.json`), so that each is computed once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from vcot.pipeline.contamination import Contamination, find_contamination, hash_picture
from vcot.pipeline.errors import DataError
from vcot.pipeline.files import read_record, write_record
from vcot.pipeline.records import ImageRef, Record, Task
from vcot.pipeline.report import Said, Warned, progress
from vcot.pipeline.sources.source import SOURCES, list_parts
from vcot.pipeline.stage import batched
from vcot.services.run.rounds import Round
from vcot.services.run.session import Session

_KEPT = "pictures.json"
_BATCH = 1024
"""Images between two writes of what was computed."""


class PictureHashes(Record):
    """`pictures.json`: perceptual hashes of the run's images, in hexadecimal, by SHA-256."""

    hashes: dict[str, str]


def check_overlap(current: Round) -> None:
    """Compare the round's questions with the benchmark's. Raises DataError where they overlap and the recipe forbids it."""
    session = current.session
    asked = _list_asked(session)
    hashes = None if _is_drawn(session) else _hash_images(session, [*current.tasks, *asked])
    found = find_contamination(current.tasks, asked, hashes)
    if found.is_clean:
        session.report(Said(f"held out: {found.summary}"))
        return
    names = "; ".join(f"{match.trained} and {match.asked} ({match.kind})" for match in found.worst[:3])
    told = f"training and evaluation overlap: {found.summary}; the closest: {names}"
    if not session.run.recipe.tasks.allow_overlap:
        raise DataError(
            f"{told}; take another split or source for one of them, or go on all the same with tasks.allow_overlap=true"
        )
    session.report(Warned(f"{told}; tasks.allow_overlap lets it be"))


def read_overlap(current: Round) -> Contamination | None:
    """What the check finds; None where not all images were hashed yet, as in a run of an earlier version."""
    session = current.session
    asked = _list_asked(session)
    if _is_drawn(session):
        return find_contamination(current.tasks, asked, None)
    hashes = _read_hashes(session)
    if any(image.sha256 not in hashes for task in (*current.tasks, *asked) for image in task.images):
        return None
    return find_contamination(current.tasks, asked, hashes)


def _list_asked(session: Session) -> list[Task]:
    """What the benchmark asks, of all splits that are."""
    return [task for split in session.run.recipe.eval_splits for task in session.questions(split).tasks]


def _is_drawn(session: Session) -> bool:
    """Whether a program draws the pictures of either side."""
    trained = [part.source for part in list_parts(session.run.recipe.tasks)]
    return all(_draws(name) for name in trained) or _draws(session.benchmark.source)


def _draws(source: str) -> bool:
    return SOURCES.resolve(source).is_drawn


def _read_hashes(session: Session) -> dict[str, int]:
    remedy = "delete it, and the images are hashed again"
    kept = read_record(session.run.directory / _KEPT, PictureHashes, remedy=remedy) or PictureHashes(hashes={})
    return {sha: int(written, 16) for sha, written in kept.hashes.items()}


def _hash_images(session: Session, tasks: Sequence[Task]) -> dict[str, int]:
    """Those of all images of the tasks; what is computed is kept some at a time."""
    hashes = _read_hashes(session)
    images = {image.sha256: image for task in tasks for image in task.images}
    owed = [image for sha, image in images.items() if sha not in hashes]

    def compute(image: ImageRef) -> int:
        return hash_picture(session.run.images.read(image))

    with progress(session.report, "pictures") as on_steps, ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, batch in enumerate(batched(owed, _BATCH)):
            on_steps(number * _BATCH, len(owed), "")
            found = zip((image.sha256 for image in batch), pool.map(compute, batch), strict=True)
            hashes.update(found)
            written = {sha: f"{value:016x}" for sha, value in hashes.items()}
            write_record(session.run.path(_KEPT), PictureHashes(hashes=written))
    return hashes
