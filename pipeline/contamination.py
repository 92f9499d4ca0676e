"""Whether questions that are trained on are in the evaluation set, too: by image, by picture, by text. Pure.

- *same image*: the stored files are the same, byte for byte (SHA-256).
- *alike picture*: at most MAX_DISTANCE of the 64 bits of their perceptual hashes differ (`imagehash.phash`: which of the
  lowest frequencies are above their median). It finds what was scaled or encoded anew, not what was cropped or turned.
- *alike text*: of an evaluation question's word 8-grams at least 70 % are in training questions (PaLM's rule, Chowdhery et
  al. 2022, section 8); one of fewer than 8 words must be the same. The text is the question with its options in alphabetical
  order, in lower case and without punctuation: "What is the man doing?" alone is asked about a thousand images.

Where pictures are drawn by a program only the first rule holds: drawings are alike, and questions are made from templates.
"""

from __future__ import annotations

import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from vcot.pipeline.records import ImageRef, Record, Task

MAX_DISTANCE = 4
MAX_SHOWN = 8
_N, _SHARE = 8, 0.7
_ROWS = 512
_SIDE_PX = 128
"""A JPEG may be decoded at a fraction of its size, but not below this."""
_WORD = re.compile(r"\w+")

Kind = Literal["same image", "alike picture", "alike text"]
KINDS: tuple[Kind, ...] = ("same image", "alike picture", "alike text")


class Match(Record):
    """A question that is trained on, and one of the evaluation that it is like."""

    kind: Kind
    distance: int = 0
    """In bits, of alike pictures."""
    share: float = 1.0
    """Of alike texts, of the evaluation question's 8-grams."""
    trained: str
    """The task's id."""
    asked: str
    trained_question: str
    asked_question: str
    trained_image: ImageRef | None = None
    asked_image: ImageRef | None = None


class Contamination(Record):
    """What was found."""

    num_trained: int
    num_asked: int
    is_drawn: bool
    """Whether only the same image counts, since a program drew the pictures."""
    touched: dict[Kind, int]
    """Evaluation questions that have a match, by its kind."""
    worst: tuple[Match, ...] = ()
    """Some of the matches, of each kind the closest first."""

    @property
    def summary(self) -> str:
        """`2 of 2,017 evaluation questions (1 same image, 1 alike text)`, or that there is none."""
        found = ", ".join(f"{number:,} {kind}" for kind, number in self.touched.items() if number)
        if not found:
            return f"none of {self.num_asked:,} evaluation questions is among the {self.num_trained:,} for training"
        return f"of {self.num_asked:,} evaluation questions, by match with one of {self.num_trained:,} for training: {found}"

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found."""
        return not any(self.touched.values())


def hash_picture(data: bytes) -> int:
    """The 64-bit perceptual hash of an image file."""
    import imagehash  # with scipy, half a second
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        image.draft("L", (_SIDE_PX, _SIDE_PX))
        return int(str(imagehash.phash(image)), 16)


def find_contamination(
    trained: Sequence[Task], asked: Sequence[Task], hashes: Mapping[str, int] | None
) -> Contamination:
    """Compare two sets of questions; `hashes` has those of all their images by SHA-256, or is None where they are drawn."""
    matches = list(_match_images(trained, asked))
    if hashes is not None:
        matches += _match_pictures(trained, asked, hashes)
        matches += _match_texts(trained, asked)
    by_kind = {kind: [match for match in matches if match.kind == kind] for kind in KINDS}
    for found in by_kind.values():
        found.sort(key=lambda match: (match.distance, -match.share))
    return Contamination(
        num_trained=len(trained),
        num_asked=len(asked),
        is_drawn=hashes is None,
        touched={kind: len({match.asked for match in found}) for kind, found in by_kind.items()},
        worst=tuple(match for found in by_kind.values() for match in found[:MAX_SHOWN]),
    )


def _first_by_image(tasks: Sequence[Task]) -> dict[str, tuple[Task, ImageRef]]:
    """SHA-256 -> the first task that shows it."""
    return {image.sha256: (task, image) for task in reversed(tasks) for image in task.images}


def _match_images(trained: Sequence[Task], asked: Sequence[Task]) -> Iterator[Match]:
    known = _first_by_image(trained)
    for task in asked:
        for image in task.images:
            if image.sha256 in known:
                yield _join("same image", known[image.sha256], (task, image))


def _match_pictures(trained: Sequence[Task], asked: Sequence[Task], hashes: Mapping[str, int]) -> Iterator[Match]:
    """Each evaluation question's nearest picture in training, if it is near and no copy."""
    import numpy as np

    known = list(_first_by_image(trained).values())
    shown = [(task, image) for task in asked for image in task.images]
    if not known or not shown:
        return
    theirs = np.array([hashes[image.sha256] for _, image in known], dtype=np.uint64)
    ours = np.array([hashes[image.sha256] for _, image in shown], dtype=np.uint64)
    for start in range(0, len(shown), _ROWS):
        distances = np.bitwise_count(ours[start : start + _ROWS, None] ^ theirs[None, :])
        for row, nearest in enumerate(distances.argmin(axis=1)):
            ours_at, theirs_at, distance = shown[start + row], known[nearest], int(distances[row, nearest])
            if distance <= MAX_DISTANCE and ours_at[1].sha256 != theirs_at[1].sha256:
                yield _join("alike picture", theirs_at, ours_at, distance=distance)


def _match_texts(trained: Sequence[Task], asked: Sequence[Task]) -> Iterator[Match]:
    """In time that grows with the texts' length alone."""
    grams = [(task, dict.fromkeys(_list_grams(task))) for task in asked]  # in order, unlike a set of texts
    wanted = set[tuple[str, ...]]().union(*(own for _, own in grams))
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, task in enumerate(trained):
        for gram in wanted.intersection(_list_grams(task)):
            holders[gram].append(number)
    for task, own in grams:
        share = sum(gram in holders for gram in own) / len(own)
        if share >= _SHARE:
            nearest, _ = Counter(number for gram in own for number in holders.get(gram, ())).most_common(1)[0]
            match = _join("alike text", (trained[nearest], None), (task, None), share=share)
            yield match


def _list_grams(task: Task) -> list[tuple[str, ...]]:
    """The word 8-grams of a question with its options; of a shorter one, all its words."""
    text = " ".join([task.question, *sorted(choice.lower() for choice in task.choices)])
    words = _WORD.findall(text.lower())
    return [tuple(words[start : start + _N]) for start in range(max(1, len(words) - _N + 1))]


def _join(
    kind: Kind,
    trained: tuple[Task, ImageRef | None],
    asked: tuple[Task, ImageRef | None],
    *,
    distance: int = 0,
    share: float = 1.0,
) -> Match:
    return Match(
        kind=kind,
        distance=distance,
        share=share,
        trained=trained[0].id,
        asked=asked[0].id,
        trained_question=trained[0].question,
        asked_question=asked[0].question,
        trained_image=trained[1],
        asked_image=asked[1],
    )
