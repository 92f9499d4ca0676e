"""Image reliance: whether a model's answers depend on the image that it is shown.

The benchmark's questions are asked again about a blank image and about another question's, with the same prompt,
settings and seeds. The accuracy that is lost is what the true image was worth; the share of answers that change also shows
an image that is looked at and does not help. Seeds being equal, a model that ignores the image changes none.

The blank image is mid-grey: the mean grey of the image itself would tell how much is drawn on it. Other images are dealt
out by a fixed permutation, so that the set of images stays the same and only their questions change.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

from PIL import Image
from rich.table import Table
from rich.text import Text

from eval.statistics import adjust_holm, compare_paired, estimate_accuracy
from eval.table import Setting, format_p, list_settings, new_table, question_shares, select_scores
from pipeline.errors import DataError
from pipeline.images import ImageStore
from pipeline.records import CheckpointRef, ImageRef, Interval, PromptName, Record, Score, ShownImage, Task

Images = tuple[ImageRef, ...]
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
    """Accuracy with the image that was shown."""
    reliance: Interval
    """The paired difference `true` - `accuracy`, in [-1, 1]."""
    p_value: float
    """Two-sided, that the image makes no difference."""
    p_holm: float
    """`p_value` after Holm's correction for all the rows that are reported together."""
    changed: Interval
    """Share of the answers that differ from those to the question's own image; an unreadable one counts as an answer."""
    num_questions: int


def choose_images(tasks: Sequence[Task], shown: ShownImage, store: ImageStore) -> dict[str, Images]:
    """What to show for each of `tasks` that has images, by task id; a blank image is stored. Raises DataError."""
    own = {task.id: task.images for task in tasks if task.images}
    match shown:
        case "true":
            return own
        case "blank":
            sizes = {(image.width, image.height) for images in own.values() for image in images}
            blanks = {size: store.put_png(Image.new("RGB", size, _MID_GREY)) for size in sizes}
            return {task: tuple(blanks[image.width, image.height] for image in images) for task, images in own.items()}
        case "other":
            return deal_images(tasks)


def deal_images(tasks: Sequence[Task]) -> dict[str, Images]:
    """Another question's images for each of `tasks`, as many as its own: a permutation, the same in any order of `tasks`.

    No question keeps an image of its own, and none gets those of a question with the same answer as long as there are
    others. Raises DataError where one image has more than half of the questions with as many images.
    """
    by_number: dict[int, list[Task]] = defaultdict(list)
    for task in sorted(tasks, key=lambda task: hashlib.sha256(task.id.encode()).digest()):
        by_number[len(task.images)].append(task)
    return {task: images for number, asked in by_number.items() if number for task, images in _deal(asked).items()}


def _deal(asked: Sequence[Task]) -> dict[str, Images]:
    givers = [*asked[1:], *asked[:1]]
    places = range(len(asked))
    for here in places:

        def gain(there: int, here: int = here) -> int:
            before = _clash(asked[here], givers[here]) + _clash(asked[there], givers[there])
            return before - _clash(asked[here], givers[there]) - _clash(asked[there], givers[here])

        if _clash(asked[here], givers[here]) and gain(best := max(places, key=gain)) > 0:
            givers[here], givers[best] = givers[best], givers[here]
    if any(_clash(task, giver) >= _SAME_IMAGE for task, giver in zip(asked, givers, strict=True)):
        raise DataError(
            f"the {len(asked)} questions with {len(asked[0].images)} image(s) are mostly about one, so there is no other to "
            "show; leave `other` out of eval.images"
        )
    return {task.id: giver.images for task, giver in zip(asked, givers, strict=True)}


def _clash(task: Task, giver: Task) -> int:
    """How unfit the giver's images are for the task."""
    own = {image.sha256 for image in task.images}
    same_image = not own.isdisjoint(image.sha256 for image in giver.images)
    same_answer = bool(_gold(task)) and _gold(task) == _gold(giver)
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
    answered = {(score.task, score.index): score for score in other}
    pairs = [(score, answered[key]) for score in true if (key := (score.task, score.index)) in answered]
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
    )


def render_reliance(rows: Sequence[Reliance]) -> Table:
    """The rows for a terminal."""
    table = new_table(
        "Image reliance: accuracy in % when the image is taken away",
        "lost: the true image's accuracy minus this one's. changed: answers that differ. p: after Holm's correction.",
        ("true", "shown", "lost", "95 % interval", "p", "changed"),
    )
    for checkpoint in dict.fromkeys(row.checkpoint for row in rows):
        table.add_row(Text(checkpoint.name, style="bold"))
        for row in rows:
            if row.checkpoint == checkpoint:
                interval = f"{100 * row.reliance.low:+.1f} to {100 * row.reliance.high:+.1f}"
                p_value = format_p(row.p_holm).removeprefix("p ").removeprefix("= ")
                figures = (f"{100 * row.true.value:.1f}", f"{100 * row.accuracy.value:.1f}")
                lost = f"{100 * row.reliance.value:+.1f}"
                changed = f"{100 * row.changed.value:.0f} %"
                name = f"  {row.prompt} {row.temperature:g} {row.shown}"
                table.add_row(name, *figures, lost, interval, p_value, changed)
    return table
