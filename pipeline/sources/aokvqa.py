"""A-OKVQA v1.0 (Schwenk et al. 2022): questions about COCO 2017 photos, from the official files or the hub's copy.

Each is asked with its options (`aokvqa`), or is to be answered in words (`aokvqa_da`, direct answers), of which ten people
gave one each. As in the authors' evaluation, those that they marked as difficult to answer in words are then left out.

Official layout: the list `aokvqa_v1p0_<split>.json`, and COCO's images as `<image_id, 12 digits>.jpg` in one of the
usual folders beside it. `path` is that folder, or one such list (an extract, say). On the hub, `HuggingFaceM4/A-OKVQA`
has the same fields as columns and the image beside them. Both keep the test split's answers secret: there, tasks have
none.
"""

from __future__ import annotations

import ast
import logging
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field, field_validator

from vcot.pipeline.errors import DataError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.records import ImageRef, Split
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources.drafts import Draft, Row, StoreImage, digest_files, read_json, read_row
from vcot.pipeline.sources.hub import hub_key, iterate_hub
from vcot.pipeline.sources.source import Source, draw_from, find_path

_HUB_NAME = "HuggingFaceM4/A-OKVQA"
_log = logging.getLogger(__name__)
_OFFICIAL_SPLIT = {"train": "train", "validation": "val", "test": "test"}
_IMAGE_FOLDERS = (
    "images",
    "{split}2017",
    "images/{split}2017",
    "coco/{split}2017",
    "coco/images/{split}2017",
    "../coco/{split}2017",
    ".",
)


class Annotation(Row):
    """What is read of an annotation; the official list and the hub agree on these names."""

    question_id: str = Field(min_length=1)
    question: str = Field(min_length=1)
    choices: tuple[str, ...]
    correct_choice_idx: int | None = None
    direct_answers: tuple[str, ...] | None = None
    difficult_direct_answer: bool | None = None
    rationales: tuple[str, ...] | None = None

    @field_validator("direct_answers", mode="before")
    @classmethod
    def _read_hub(cls, answers: object) -> object:
        """The hub's copy has the list as Python writes it."""
        try:
            return ast.literal_eval(answers) if isinstance(answers, str) else answers
        except (ValueError, SyntaxError):
            raise ValueError("the list cannot be read") from None


class OfficialAnnotation(Annotation):
    """An annotation of the official list, which names its COCO image and, in most copies, its split."""

    image_id: int = Field(ge=0)
    split: str | None = None


def digest_data(section: TasksSection) -> str:
    """The hash of the split's list, or the hub's name and revision."""
    path = find_path(section)
    return hub_key(_HUB_NAME, section.revision) if path is None else digest_files([_find_list(path, section.split)])


def list_questions(section: TasksSection) -> list[Draft]:
    """The questions of a split with their options. Raises DataError for a list that is missing or malformed."""
    return [_draft(annotation, place) for annotation, place in _list_annotations(section)]


def list_direct(section: TasksSection) -> list[Draft]:
    """The questions of a split that are answered in words. Raises DataError as `list_questions` does."""
    listed = _list_annotations(section)
    return [_draft_direct(annotation, place) for annotation, place in listed if not annotation.difficult_direct_answer]


@dataclass(frozen=True)
class _Place:
    """Where an annotation stands, and its image."""

    split: Split
    where: str
    store_image: StoreImage


def _list_annotations(section: TasksSection) -> list[tuple[Annotation, _Place]]:
    path, split = find_path(section), section.split
    return _list_hub(section.revision, split) if path is None else _list_official(_find_list(path, split), split)


def _find_list(path: Path, split: Split) -> Path:
    """`path` itself if it is a file, else the split's official list in that folder."""
    return path if path.is_file() else path / f"aokvqa_v1p0_{_OFFICIAL_SPLIT[split]}.json"


def _list_official(path: Path, split: Split) -> list[tuple[Annotation, _Place]]:
    official = _OFFICIAL_SPLIT[split]
    folders = [path.parent / folder.format(split=official) for folder in _IMAGE_FOLDERS]
    folders = [folder for folder in folders if folder.is_dir()]
    rows = read_json(path, list)
    annotations = [read_row(OfficialAnnotation, row, f"{path}, row {number}") for number, row in enumerate(rows)]
    distinct = list(dict.fromkeys(annotations))
    if len(distinct) < len(annotations):
        _log.warning("%s repeats %d rows word for word; each counts once", path, len(annotations) - len(distinct))
    for annotation in distinct:
        if annotation.split not in (None, official):
            raise DataError(
                f"{path}: question {annotation.question_id} is of split {annotation.split}, not {official}; set split"
            )
    return [(each, _Place(split, str(path), _find_image(each, folders, path))) for each in distinct]


def _find_image(annotation: OfficialAnnotation, folders: list[Path], where: Path) -> StoreImage:
    """Stores the annotation's image from the first folder that has it."""

    def store_image(store: ImageStore) -> ImageRef:
        name = f"{annotation.image_id:012d}.jpg"
        for folder in folders:
            if (folder / name).is_file():
                return store.put_file(folder / name)
        raise DataError(
            f"image {name} of question {annotation.question_id} in {where} is in none of "
            f"{', '.join(_IMAGE_FOLDERS)} beside it; put COCO's 2017 images there, or name a list of those you have"
        )

    return store_image


def _list_hub(revision: str | None, split: Split) -> list[tuple[Annotation, _Place]]:
    listed: list[tuple[Annotation, _Place]] = []
    for row in iterate_hub(_HUB_NAME, revision, split):
        where = f"{_HUB_NAME}, split {split}, row {row.number}"
        annotation = read_row(Annotation, row.columns, where)
        if not row.images:
            raise DataError(f"{where}: question {annotation.question_id} has no image; set path to the official files")
        listed.append((annotation, _Place(split, _HUB_NAME, row.images[0])))
    return listed


def _draft(annotation: Annotation, place: _Place) -> Draft:
    name = annotation.question_id
    if place.split != "test" and annotation.correct_choice_idx is None:
        raise DataError(f"{place.where}: question {name} has no correct_choice_idx; only test may lack it")
    if not annotation.choices:
        raise DataError(f"{place.where}: question {name} has no choices; correct the row or leave it out")
    return Draft(
        id=f"aokvqa/{name}",
        question=annotation.question,
        choices=annotation.choices,
        answer=None if place.split == "test" else annotation.correct_choice_idx,
        rationale=" ".join(annotation.rationales or ()),
        source="aokvqa",
        split=place.split,
        where=place.where,
        images=(place.store_image,),
    )


def _draft_direct(annotation: Annotation, place: _Place) -> Draft:
    """The gold answer is the one that most people gave, of several the first."""
    answers = () if place.split == "test" else annotation.direct_answers or ()
    if not answers and place.split != "test":
        raise DataError(
            f"{place.where}: question {annotation.question_id} has no direct_answers; only test may lack them"
        )
    return Draft(
        id=f"aokvqa/{annotation.question_id}",
        question=annotation.question,
        choices=(),
        answer=None,
        gold=Counter(answers).most_common(1)[0][0] if answers else "",
        accepted=answers,
        rationale=" ".join(annotation.rationales or ()),
        source="aokvqa_da",
        split=place.split,
        where=place.where,
        images=(place.store_image,),
    )


AOKVQA = Source(
    load=draw_from(list_questions),
    digest=digest_data,
    hub_name=_HUB_NAME,
    licence="license: other\nlicense_name: as-a-okvqa-and-coco\nlicense_link: https://github.com/allenai/aokvqa",
    num_questions={"train": 17_056, "validation": 1_145, "test": 6_702},
    image_bytes=140_000,
)
"""Counted in the published files; the bytes are the mean of 8 COCO images."""
AOKVQA_DA = replace(AOKVQA, load=draw_from(list_direct), num_questions={})
"""To be answered in words."""
