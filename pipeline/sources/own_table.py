"""A table of one's own: Parquet or JSON lines on disk, or a data set on the hub, with the columns that a recipe names.

`tasks.path` is a file, or a folder that has `<split>*.parquet` or `<split>*.jsonl`; or `tasks.columns.hub` names a data set.
Rows are memory-mapped, and only drawn ones have their images read. A row without an image is a question without one, and
the log says how many there are.
"""

from __future__ import annotations

import logging
import math
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal

from vcot.pipeline.data_sections import ColumnsSection
from vcot.pipeline.errors import DataError, RecipeError
from vcot.pipeline.records import content_key
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources.download import download_image
from vcot.pipeline.sources.drafts import Draft, StoreImage, digest_files, tell_apart
from vcot.pipeline.sources.hub import HubRow, hub_key, iterate_hub, iterate_table, open_table
from vcot.pipeline.sources.source import Source, draw_from, need_path

_log = logging.getLogger(__name__)
_KINDS: Mapping[str, Literal["parquet", "json"]] = {".parquet": "parquet", ".jsonl": "json"}
_SPACES = "\n\t\r"
_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def digest_data(section: TasksSection) -> str:
    """The hash of the files, or the hub's name and revision."""
    columns = _need_columns(section)
    return hub_key(columns.hub, section.revision) if columns.hub else digest_files(_find_files(section))


def list_questions(section: TasksSection) -> Sequence[Draft]:
    """The questions of a split. Raises DataError for a column that is not there and a row that cannot be used.

    Without a column of ids, those that ask the same are told apart by their pictures.
    """
    drafts = list(_list_drafts(section))
    return drafts if _need_columns(section).id else tell_apart(drafts)


def _list_drafts(section: TasksSection) -> Iterator[Draft]:
    columns, num_without = _need_columns(section), 0
    for where, row in _iterate(section, columns):
        if row.number == 0:  # all rows of a file have its columns
            _check_columns(columns, row.columns, where)
        num_without += not row.images
        yield _draft(section, columns, row.columns, row.images, f"{where}, row {row.number}")
    if num_without and columns.image:
        _log.warning(
            "%d rows have no %s; they are questions without an image (tasks.filter)", num_without, columns.image
        )


def _need_columns(section: TasksSection) -> ColumnsSection:
    """Raises RecipeError where the recipe does not say which columns hold what."""
    if section.columns is None:
        raise RecipeError(
            "source table needs to know your columns: set tasks.columns, eval.columns or --columns, for example "
            'question = "question", image = "image"'
        )
    return section.columns


def _iterate(section: TasksSection, columns: ColumnsSection) -> Iterator[tuple[str, HubRow]]:
    download = download_image if columns.allow_urls else None
    if columns.hub:
        for row in iterate_hub(columns.hub, section.revision, section.split, columns.image, download):
            yield columns.hub, row
        return
    for path in _find_files(section):

        def explain(error: Exception, path: Path = path) -> DataError:
            return DataError(f"{path} cannot be read ({' '.join(str(error).split())}); mend it, or write it anew")

        data = open_table(_KINDS[path.suffix], [path], explain)
        if columns.image and columns.image not in data.column_names:
            raise DataError(_lacks(columns.image, "image", data.column_names, str(path)))
        for row in iterate_table(data, columns.image, str(path), path.parent, download):
            yield str(path), row


def _find_files(section: TasksSection) -> Sequence[Path]:
    """The files of a split, in order. Raises DataError where there is none."""
    path = need_path(section)
    if path.is_file() and path.suffix in _KINDS:
        return [path]
    found = [each for kind in _KINDS for each in sorted(path.glob(f"{section.split}*{kind}"))] if path.is_dir() else []
    if not found:
        raise DataError(
            f"{path} is no .parquet or .jsonl file, and no folder with {section.split}*.parquet or "
            f"{section.split}*.jsonl; set tasks.path, or tasks.columns.hub"
        )
    return found


def _check_columns(columns: ColumnsSection, row: Mapping[str, Any], where: str) -> None:
    """Raises DataError where a named column is not there."""
    for field, name in columns.model_dump(exclude={"hub", "image", "allow_urls"}).items():
        if name and name not in row:
            raise DataError(_lacks(name, field, row, where))


def _lacks(name: str, field: str, there: Any, where: str) -> str:
    return f"{where} has no column {name}, only {', '.join(there)}; set tasks.columns.{field}"


def _draft(
    section: TasksSection, columns: ColumnsSection, row: Mapping[str, Any], images: tuple[StoreImage, ...], where: str
) -> Draft:
    question = _read_text(row[columns.question], columns.question, where)
    options = _list_options(row, columns.choices, where)
    choices = tuple(_read_text(each, columns.choices, where) for each in options)
    answer = plain_cell(row[columns.answer]) if columns.answer else None
    index = None if answer is None or not choices else find_index(answer, choices, where)
    if isinstance(answer, int) and answer in options and options.index(answer) != index:
        raise DataError(
            f"{where}: answer {answer} is a place from 0 and, at another place, one of the options {list(options)}; give "
            "answers as letters, or options as texts"
        )
    gold, accepted = ("", ()) if answer is None or choices else _read_words(answer, columns.answer, where)
    asked = content_key(asked=[question, *choices], answer=answer)[:16]
    name = _read_text(row[columns.id], columns.id, where) if columns.id else asked
    return Draft(
        id=f"table/{name}",
        question=question,
        choices=choices,
        answer=index,
        gold=gold,
        accepted=accepted,
        rationale=_read_optional(row, columns.rationale, where),
        subject=_read_optional(row, columns.subject, where) or None,
        source="table",
        split=section.split,
        where=where,
        images=images,
    )


def _list_options(row: Mapping[str, Any], name: str, where: str) -> Sequence[object]:
    """The options as they stand; none of a question that is answered in words. Raises DataError for what is no list."""
    options = row[name] if name else None
    if options is None:
        return ()
    if not isinstance(options, list):
        raise DataError(
            f"{where}: {name} is {options!r}, and must be a list of options; correct the row or leave it out"
        )
    if not options:
        raise DataError(f"{where}: {name} is empty; leave it null for a question that is answered in words")
    return options


def plain_cell(value: object) -> object:
    """A cell without what a table with gaps makes of it: a gap is NaN there, and a whole number 7.0."""
    if not isinstance(value, float) or math.isinf(value):
        return value
    return None if math.isnan(value) else int(value) if value.is_integer() else value


def _read_words(answer: object, name: str, where: str) -> tuple[str, tuple[str, ...]]:
    """The right words, and all that are accepted: of a list, the commonest and all of it."""
    if not isinstance(answer, list):
        return _read_text(answer, name, where), ()
    accepted = tuple(_read_text(each, name, where) for each in answer)
    if not accepted:
        raise DataError(f"{where}: {name} is an empty list; leave it null where nobody knows the answer")
    return Counter(accepted).most_common(1)[0][0], accepted


def find_index(answer: object, choices: Sequence[str], where: str) -> int:
    """Which option an answer names: by index from 0, by its text, or by its letter. Raises DataError for none of them."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str):
        said = answer.strip()
        if said in choices:
            return choices.index(said)
        if len(said) == 1 and said.isascii() and said.isupper() and ord(said) - ord("A") < len(choices):
            return ord(said) - ord("A")
    raise DataError(
        f"{where}: answer {answer!r} is neither an index from 0, a letter nor the text of one of {len(choices)} options; "
        "correct it, or set tasks.columns.answer"
    )


def _read_text(value: object, name: str, where: str) -> str:
    """A text without control characters, or a number as one. Raises DataError."""
    if isinstance(value, date):  # JSON has none, but a column whose texts all look like dates is read as such
        remedy = "write the table as Parquet, with that column as texts"
        raise DataError(f"{where}: {name} is read as the date {value}, and must be a text; {remedy}")
    said = plain_cell(value)
    text = str(said) if isinstance(said, str | int | float) and not isinstance(said, bool) else ""
    if not text.strip():
        raise DataError(f"{where}: {name} is {value!r}, and must be a text; correct the row or leave it out")
    control = next((c for c in text if _is_control(c)), None)
    if control is not None:
        raise DataError(f"{where}: {name} holds the control character {control!r}; correct the row or leave it out")
    return text.strip()


def _is_control(character: str) -> bool:
    """Whether it is not seen and changes what is: a control character, or one that turns the direction of writing."""
    return (unicodedata.category(character) == "Cc" and character not in _SPACES) or character in _TURNS


def _read_optional(row: Mapping[str, Any], name: str | None, where: str) -> str:
    is_empty = name is None or plain_cell(row[name]) is None
    return "" if name is None or is_empty else _read_text(row[name], name, where)


TABLE = Source(load=draw_from(list_questions), digest=digest_data)
