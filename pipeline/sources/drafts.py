"""A question before its images are read: what every source yields, and how a draft becomes a task.

A source lists all its questions cheaply; only the drawn ones have their images read. Every fault of the data (one
choice, an answer out of range, a broken image, an id twice) is a DataError of one sentence with the value, the place
and the remedy.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from vcot.pipeline.errors import DataError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.records import ImageRef, Split, Task


class Row(BaseModel):
    """What we read of a source's row; a source's other columns are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


RowT = TypeVar("RowT", bound=Row)
JsonT = TypeVar("JsonT", list[Any], dict[str, Any])
StoreImage = Callable[[ImageStore], ImageRef]
"""Reads an image and stores it, when called."""


@dataclass(frozen=True)
class Draft:
    """One question of a source, its images not read yet."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int | None
    source: str
    split: Split
    where: str
    """The file or data set that it stands in, for messages."""
    images: tuple[StoreImage, ...]
    """In the order in which they are shown; none of a question without an image."""
    gold: str = ""
    """The right words, of a question without options."""
    accepted: tuple[str, ...] = ()
    """All answers in words that people gave; `gold` is one of them."""
    rationale: str = ""
    subject: str | None = None
    family: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    own_name: str = ""
    """What the data set's own files call it, where the id is another."""

    def build(self, store: ImageStore) -> Task:
        """The task, its images in `store`. Raises DataError for an image or a question that cannot be used."""
        try:
            task = Task(
                id=self.id,
                question=self.question,
                choices=self.choices,
                answer=self.answer,
                gold=self.gold,
                accepted=self.accepted,
                rationale=self.rationale,
                subject=self.subject,
                family=self.family,
                labels=dict(self.labels),
                source=self.source,
                split=self.split,
            )
        except ValidationError as error:
            raise DataError(f"{self.where}: {explain(error)}; correct the question or leave it out") from None
        return task.model_copy(update={"images": tuple(store_image(store) for store_image in self.images)})


def tell_apart(drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts with an id each: those that ask the same are told apart by their pictures, and the rest are counted."""
    same = Counter(draft.id for draft in drafts)
    seen: Counter[str] = Counter()
    told = []
    for draft in drafts:
        name = draft.id if same[draft.id] == 1 or not draft.images else f"{draft.id}-{_digest_pictures(draft)}"
        seen[name] += 1
        told.append(replace(draft, id=name if seen[name] == 1 else f"{name}-{seen[name]}"))
    return told


def _digest_pictures(draft: Draft) -> str:
    """A hash of the pixels, so that a file that was written anew without loss has the same; empty for a broken one."""
    digest = hashlib.sha256()
    with TemporaryDirectory() as folder:
        store = ImageStore(Path(folder))
        for store_image in draft.images:
            try:
                ref = store_image(store)
            except DataError:  # is said if the question is drawn
                return ""
            with Image.open(Path(folder, ref.path)) as image:
                digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()[:8]


def draw(drafts: Iterable[Draft], num_tasks: int | None, seed: int) -> list[Draft]:
    """`num_tasks` of `drafts`, or all, in an order that depends on `seed` and the ids alone.

    So the same questions are drawn however a file is sorted, and the first 100 of 200 are the 100. Raises DataError for
    an id that occurs twice, or that is no text.
    """
    listed: dict[str, Draft] = {}
    for draft in drafts:
        check_whole(draft.id, draft.where)
        if draft.id in listed:
            raise DataError(f"{draft.where}: id {draft.id} occurs twice; keep one of the two questions")
        listed[draft.id] = draft
    ordered = sorted(listed.values(), key=lambda draft: hashlib.sha256(f"{seed}:{draft.id}".encode()).digest())
    return ordered[:num_tasks]


def check_whole(name: str, where: str) -> None:
    """Raise DataError for a name with half a surrogate pair, which no file or record can hold."""
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise DataError(f"{where}: id {name!r} holds half a character; correct the row or leave it out")


def read_json(path: Path, kind: type[JsonT]) -> JsonT:
    """The JSON list or object in `path`. Raises DataError where it is missing, unreadable or of another kind."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be opened ({error.strerror}); check the data set's path") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(content, kind):
        raise DataError(f"{path} holds a JSON {type(content).__name__}, not a {kind.__name__}; name the official file")
    return content


def read_row(model: type[RowT], row: object, where: str) -> RowT:
    """`row` as `model`. Raises DataError, naming the field and the place."""
    try:
        return model.model_validate(row)
    except ValidationError as error:
        raise DataError(f"{where}: {explain(error)}; correct the row or leave it out") from None


def explain(error: ValidationError) -> str:
    """The first fault of a pydantic error as a clause."""
    fault = error.errors(include_url=False)[0]
    message = fault["msg"].removeprefix("Value error, ")
    field = ".".join(str(part) for part in fault["loc"])
    if not field:
        return message
    if fault["type"] == "missing":
        return f"field {field} is missing"
    return f"{field} = {fault['input']!r}: {message[0].lower()}{message[1:]}"


def file_image(path: Path) -> StoreImage:
    """Stores the image file at `path` when called."""
    return lambda store: store.put_file(path)


def digest_files(paths: Sequence[Path]) -> str:
    """SHA-256 over the contents of `paths`, in order. Raises DataError where one cannot be read."""
    return hashlib.sha256("".join(_digests(paths)).encode()).hexdigest()


def _digests(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        try:
            with path.open("rb") as file:
                yield hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path} cannot be opened ({error.strerror}); check the data set's path") from None
