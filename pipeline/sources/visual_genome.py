"""Visual Genome's questions (Krishna et al. 2017): 1.4 million about 108,077 photos, each answered in a few words.

Official layout: `question_answers.json` (a list with, for each image, its questions), and the images as `<image id>.jpg` in
`VG_100K` and `VG_100K_2`, or in `images` or beside the list. `path` is that folder or such a list. It may as well be a
Parquet file, or a folder of `train*.parquet`, in the columns of the hub's copy (`image`, `image_id`, `qas`). That copy
itself, ranjaykrishna/visual_genome, is a script, and `datasets` runs none since version 4. There is one split, train.

Answers are kept as they are but for the full stop at the end, which is no part of a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field

from vcot.pipeline.errors import DataError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.records import ImageRef
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources.drafts import Draft, Row, StoreImage, digest_files, read_json, read_row
from vcot.pipeline.sources.hub import iterate_table, open_table
from vcot.pipeline.sources.source import Source, draw_from, need_path

_FOLDERS = ("VG_100K", "VG_100K_2", "images", "images/VG_100K", "images/VG_100K_2", "images2/VG_100K_2", ".")
_LIST = "question_answers.json"


class Question(Row):
    """What is read of a question; the official list and the hub agree on these names."""

    qa_id: int
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)


class OfficialQuestions(Row):
    """An image of the official list; the oldest of its lists have `id` for the image's number."""

    id: int
    qas: tuple[Question, ...]


class HubQuestions(Row):
    """An image of the hub's copy."""

    image_id: int
    qas: tuple[Question, ...]


def digest_data(section: TasksSection) -> str:
    """The hash of the lists."""
    return digest_files(_find_files(section))


def list_questions(section: TasksSection) -> Iterator[Draft]:
    """All questions. Raises DataError for another split, and for a list that is missing or malformed."""
    if section.split != "train":
        raise DataError(f"visual_genome has no split {section.split}, only train; set split=train")
    files = _find_files(section)
    if files[0].suffix == ".json":
        return _list_official(files[0])
    return (draft for path in files for draft in _list_parquet(path))


def _find_files(section: TasksSection) -> Sequence[Path]:
    path = need_path(section)
    if path.is_file():
        return [path]
    found = sorted(path.glob("train*.parquet"))
    return [path / _LIST] if (path / _LIST).is_file() or not found else found


def _list_official(path: Path) -> Iterator[Draft]:
    folders = [folder for name in _FOLDERS if (folder := path.parent / name).is_dir()]
    for number, row in enumerate(read_json(path, list)):
        where = f"{path}, image {number}"
        image = read_row(OfficialQuestions, row, where)
        for question in dict.fromkeys(image.qas):
            yield _draft(question, where, _find_image(image.id, folders, where))


def _find_image(number: int, folders: Sequence[Path], where: str) -> StoreImage:
    def store_image(store: ImageStore) -> ImageRef:
        for folder in folders:
            if (folder / f"{number}.jpg").is_file():
                return store.put_file(folder / f"{number}.jpg")
        raise DataError(
            f"{where}: {number}.jpg is in none of {', '.join(_FOLDERS)} beside the list; unpack Visual Genome's images there"
        )

    return store_image


def _list_parquet(path: Path) -> Iterator[Draft]:
    def explain(error: Exception) -> DataError:
        return DataError(f"{path} cannot be read ({' '.join(str(error).split())}); mend it, or write it anew")

    data = open_table("parquet", [path], explain)
    if "image" not in data.column_names:
        raise DataError(
            f"{path} has no column image, only {', '.join(data.column_names)}; give Visual Genome's own files"
        )
    for row in iterate_table(data, "image", str(path), path.parent):
        where = f"{path}, row {row.number}"
        if not row.images:
            raise DataError(f"{where} has no image; correct the row or leave it out")
        for question in dict.fromkeys(read_row(HubQuestions, row.columns, where).qas):
            yield _draft(question, where, row.images[0])


def _draft(question: Question, where: str, store_image: StoreImage) -> Draft:
    return Draft(
        id=f"visual_genome/{question.qa_id}",
        question=question.question,
        choices=(),
        answer=None,
        gold=question.answer.strip().removesuffix("."),
        source="visual_genome",
        split="train",
        where=where,
        images=(store_image,),
    )


VISUAL_GENOME = Source(
    load=draw_from(list_questions),
    digest=digest_data,
    licence="license: cc-by-4.0",
    num_questions={"train": 1_445_322},
    image_bytes=110_000,
)
"""The number is the authors' (Krishna et al. 2017, section 1); the bytes are a guess."""
