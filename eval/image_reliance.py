"""Image reliance: whether a model's answers depend on the image that it is shown.

The benchmark's questions are asked again about a blank image and about another question's, with the same prompt,
settings and seeds. The accuracy that is lost is what the true image was worth; the share of answers that change also shows
an image that is looked at and does not help. Seeds being equal, a model that ignores the image changes none.

The blank image is mid-grey: the mean grey of the image itself would tell how much is drawn on it. Other images are dealt
out by a fixed permutation, so that the set of images stays the same and only their questions change. A cropped image is the
middle half of each side of the true one, scaled to its size, so that a model sees as many image tokens.

Two baselines have no image at all: the question with its options (`question_only`), and the options alone (`options_only`).
A model that is above chance there answers from what questions and options give away.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import RenderableType
from rich.text import Text

from vcot.eval.statistics import adjust_holm, chance_level, compare_paired, estimate_accuracy
from vcot.eval.table import (
    LEVEL,
    Setting,
    fill_by_checkpoint,
    format_p_cell,
    list_phrases,
    list_settings,
    new_table,
    question_shares,
    select_scores,
)
from vcot.pipeline.errors import DataError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.records import CheckpointRef, ImageRef, Interval, PromptName, Record, Score, ShownImage, Task
from vcot.pipeline.sample import SampleRequest, show_images, withhold_question

Images = tuple[ImageRef, ...]
AnImage = Literal["true", "blank", "other", "cropped"]
"""Of what may be shown, that which is an image."""
TEXT_ONLY: tuple[ShownImage, ...] = ("question_only", "options_only")
"""The rest: no image is shown."""
_MOSTLY = 0.5
_SHORT = {"question_only": "question", "options_only": "options"}
_MID_GREY = (128, 128, 128)
_SAME_ANSWER, _SAME_IMAGE = 1, 1000
"""What a partner costs in `deal_images`."""


class Reliance(Record):
    """One checkpoint under one prompt and temperature, asked about an image that is not the question's own."""

    checkpoint: CheckpointRef
    prompt: PromptName
    temperature: float
    shown: ShownImage
    true: Interval
    """Accuracy with the question's own image, on the questions that were answered with both."""
    accuracy: Interval
    """Accuracy with what was shown instead."""
    reliance: Interval
    """The paired difference `true` - `accuracy`, in [-1, 1]."""
    p_value: float
    """Two-sided, that the image makes no difference."""
    p_holm: float
    """`p_value` after Holm's correction for all the rows that are reported together."""
    changed: Interval
    """Share of the answers that differ from those to the question's own image; an unreadable one counts as an answer."""
    num_questions: int
    chance: float | None = None
    """Of a uniform guess on these questions; None in what was written before it was told."""
    no_answer: float = 0.0
    """Share of the answers to what was shown that could not be read; they count as not correct."""


def ask_instead(
    requests: Sequence[SampleRequest], tasks: Sequence[Task], shown: ShownImage, store: ImageStore
) -> list[SampleRequest]:
    """The requests about `tasks` with what is `shown` instead; those that lack what would be taken away are left out."""
    match shown:
        case "question_only":
            return [show_images(request, ()) for request in requests if request.task.images]
        case "options_only":
            return [withhold_question(request) for request in requests if request.task.choices]
    chosen = choose_images(tasks, shown, store)
    return [show_images(request, chosen[request.task.id]) for request in requests if request.task.id in chosen]


def choose_images(tasks: Sequence[Task], shown: AnImage, store: ImageStore) -> dict[str, Images]:
    """What to show for each of `tasks` that has images, by task id; what is made is stored. Raises DataError."""
    own = {task.id: task.images for task in tasks if task.images}
    match shown:
        case "true":
            return own
        case "blank":
            sizes = {(image.width, image.height) for images in own.values() for image in images}
            blanks = {size: store.put_png(Image.new("RGB", size, _MID_GREY)) for size in sizes}
            return {task: tuple(blanks[image.width, image.height] for image in images) for task, images in own.items()}
        case "cropped":
            return {
                task: tuple(store.derive(image, "cropped", crop_middle) for image in images)
                for task, images in own.items()
            }
        case "other":
            return deal_images(tasks)


def crop_middle(image: Image.Image) -> Image.Image:
    """The middle half of each side, in the image's size."""
    width, height = image.size
    left, top = width // 4, height // 4
    box = (left, top, max(left + 1, width - left), max(top + 1, height - top))
    return image.crop(box).resize((width, height), Image.Resampling.BICUBIC)


def deal_images(tasks: Sequence[Task]) -> dict[str, Images]:
    """Another question's images for each of `tasks`, as many as its own: a permutation, the same in any order of `tasks`.

    No question keeps an image of its own, and as few get those of a question with the same answer as swaps of two can make
    it. Raises DataError where swaps leave a question with its own, as where more than half of them are about one image.
    """
    by_number: dict[int, list[Task]] = defaultdict(list)
    for task in sorted(tasks, key=lambda task: hashlib.sha256(task.id.encode()).digest()):
        by_number[len(task.images)].append(task)
    return {task: images for number, asked in by_number.items() if number for task, images in _deal(asked).items()}


def _deal(asked: Sequence[Task]) -> dict[str, Images]:
    unfit, places = _Unfit(asked), np.arange(len(asked))
    givers = np.roll(places, -1)
    while sum(_swap(unfit, givers, here) for here in range(len(asked))):  # one that gains may be at another's cost
        pass
    if (unfit.count(places, givers) >= _SAME_IMAGE).any():
        raise DataError(
            f"the {len(asked)} questions with {len(asked[0].images)} image(s) are mostly about one, so there is no other to "
            "show; leave `other` out of eval.images"
        )
    return {task.id: asked[giver].images for task, giver in zip(asked, givers, strict=True)}


def _swap(unfit: _Unfit, givers: NDArray[np.intp], here: int) -> bool:
    """Whether the images of the question at `here` were swapped, for those with which it gains most."""
    places = np.arange(len(givers))
    if not (own := unfit.count(here, givers[here])):
        return False
    before = own + unfit.count(places, givers)
    gains = before - unfit.count(here, givers) - unfit.count(places, givers[here])
    if gains[best := gains.argmax()] <= 0:
        return False
    givers[[here, best]] = givers[[best, here]]
    return True


class _Unfit:
    """How unfit the images of one question are for another; all questions have as many images."""

    def __init__(self, asked: Sequence[Task]) -> None:
        golds = [_gold(task) for task in asked]
        self._golds = np.unique(golds, return_inverse=True)[1]
        self._has_gold = np.array([bool(gold) for gold in golds])
        hashes = np.array([[image.sha256 for image in task.images] for task in asked])
        self._images = np.unique(hashes, return_inverse=True)[1].reshape(hashes.shape)

    def count(self, tasks: Any, givers: Any) -> Any:
        """How unfit each giver's images are for its task: both are indices, or arrays of them that numpy broadcasts."""
        own, others = self._images[tasks], self._images[givers]
        same_image = (own[..., :, None] == others[..., None, :]).any((-1, -2))
        same_answer = self._has_gold[tasks] & (self._golds[tasks] == self._golds[givers])
        return _SAME_IMAGE * same_image + _SAME_ANSWER * same_answer


def _gold(task: Task) -> str:
    return (task.gold if task.answer is None else task.choices[task.answer]).casefold()


def build_reliance(
    scores: Mapping[ShownImage, Sequence[Score]], checkpoints: Sequence[CheckpointRef]
) -> list[Reliance]:
    """A row per checkpoint, prompt, temperature and image other than the true one, on the questions answered with both."""
    rows = [
        row
        for checkpoint in checkpoints
        for setting in list_settings(scores["true"])
        for shown in scores
        if shown != "true" and (row := _compare(scores, checkpoint, setting, shown)) is not None
    ]
    adjusted = adjust_holm([row.p_value for row in rows])
    return [row.model_copy(update={"p_holm": p_holm}) for row, p_holm in zip(rows, adjusted, strict=True)]


def _compare(
    scores: Mapping[ShownImage, Sequence[Score]], checkpoint: CheckpointRef, setting: Setting, shown: ShownImage
) -> Reliance | None:
    true, other = (
        [s for s in select_scores(scores[name], setting) if s.checkpoint == checkpoint.digest and s.error is None]
        for name in ("true", shown)
    )
    answered = {(score.task, score.seed, score.index): score for score in other}
    pairs = [(score, answered[key]) for score in true if (key := (score.task, score.seed, score.index)) in answered]
    if not pairs:
        return None
    images = [score.image or score.task for score, _ in pairs]
    right_true, right_shown = ([score.earned for score in side] for side in zip(*pairs, strict=True))
    with_true, with_other = (question_shares(side) for side in zip(*pairs, strict=True))
    clusters = {score.task: image for (score, _), image in zip(pairs, images, strict=True)}
    difference = compare_paired(
        [with_other[task] for task in clusters], [with_true[task] for task in clusters], list(clusters.values())
    )
    return Reliance(
        checkpoint=checkpoint,
        prompt=setting[0],
        temperature=setting[1],
        shown=shown,
        true=estimate_accuracy(right_true, images),
        accuracy=estimate_accuracy(right_shown, images),
        reliance=difference.interval,
        p_value=difference.p_value,
        p_holm=difference.p_value,
        changed=estimate_accuracy([first.answer != second.answer for first, second in pairs], images),
        num_questions=len(clusters),
        no_answer=sum(score.value == "no_answer" for _, score in pairs) / len(pairs),
        chance=chance_level(list({score.task: score.num_choices for score, _ in pairs}.values())),
    )


def describe_reliance(rows: Sequence[Reliance]) -> list[str]:
    """What the rows show, in a plain sentence or two for each checkpoint."""
    return [
        " ".join(_describe_checkpoint(name, [row for row in rows if row.checkpoint.name == name]))
        for name in dict.fromkeys(row.checkpoint.name for row in rows)
    ]


def _describe_checkpoint(name: str, rows: Sequence[Reliance]) -> Iterator[str]:
    clear = [row for row in rows if row.p_holm < LEVEL and row.reliance.value > 0]
    if clear:
        most = max(clear, key=lambda row: row.reliance.value)
        yield (
            f"{name} loses accuracy without its image in {len(clear)} of {len(rows)} comparisons, at most "
            f"{100 * most.reliance.value:.1f} points ({most.shown}, {most.prompt} at {most.temperature:g})."
        )
    else:
        yield f"{name} loses no accuracy without its image that could be told from noise."
    unread = dict.fromkeys(row.shown for row in clear if row.no_answer > _MOSTLY)
    if unread:
        yield (
            f"With {list_phrases(list(unread))} most answers cannot be read, so that the loss says more of the format than "
            "of what was seen."
        )
    guessed = [row for row in rows if row.chance is not None and row.accuracy.low > row.chance]
    for shown in dict.fromkeys(row.shown for row in guessed if row.shown in TEXT_ONLY):
        best = max((row for row in guessed if row.shown == shown), key=lambda row: row.accuracy.value)
        yield (
            f"With {shown} it is right in {100 * best.accuracy.value:.1f} %, where a guess is in "
            f"{100 * (best.chance or 0):.1f} % ({best.prompt} at {best.temperature:g}): the text gives that much away."
        )


def render_reliance(rows: Sequence[Reliance]) -> list[RenderableType]:
    """The rows for a terminal, and what they say."""
    table = new_table(
        "Image reliance: accuracy in % when the image is taken away",
        "question, options: only these are asked, without an image. lost: the true image's accuracy minus this one's. "
        "unread: no readable answer. differ: answers that are not those to the true image. "
        f"p is corrected (Holm) for all {len(rows)} rows together.",
        ("true", "shown", "lost", "95 % interval", "p", "unread", "differ"),
    )
    fill_by_checkpoint(table, rows, _list_cells)
    return [table, *(Text(f"\n{text}") for text in describe_reliance(rows))]


def _list_cells(row: Reliance) -> Iterable[str]:
    yield f" {row.prompt} {row.temperature:g} {_SHORT.get(row.shown, row.shown)}"
    yield f"{100 * row.true.value:.1f}"
    yield f"{100 * row.accuracy.value:.1f}"
    yield f"{100 * row.reliance.value:+.1f}"
    yield f"{100 * row.reliance.low:+.1f} to {100 * row.reliance.high:+.1f}"
    yield format_p_cell(row.p_holm)
    yield f"{100 * row.no_answer:.0f} %"
    yield f"{100 * row.changed.value:.0f} %"
