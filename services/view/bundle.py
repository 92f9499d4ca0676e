"""A run's pages as files in a folder, to be sent: they open from disk, without a server, a network or a script.

The overview is whole. Of the tasks there are as many as asked for, with all their chains and images; the pages say how
many the run has. Kinds of tasks (outcomes, flips, pairs, refusals, faults) take turns; within one the hash of a task's
name decides: the same run gives the same tasks, and a rare kind is not crowded out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment

from vcot.pipeline.errors import InputError
from vcot.pipeline.files import replacing_folder, write_record
from vcot.pipeline.records import Record
from vcot.services.view.arrays import Mask, Numbers, read_mask, read_numbers
from vcot.services.view.examples import ViewedTask, compare_texts
from vcot.services.view.index import Index, Item
from vcot.services.view.indexing import index_once
from vcot.services.view.labels import say_agreement
from vcot.services.view.queries import Filter
from vcot.services.view.shown import ViewedRun
from vcot.services.view.summary import LIVE_PLACE
from vcot.services.view.viewer import OUTCOMES, make_pages, read_style

MANIFEST = "bundle.json"
"""By which a folder is known as an earlier bundle, that may be replaced."""


class Bundled(Record):
    """What a bundle holds."""

    run: str
    num_tasks: int
    num_left_out: int
    tasks: tuple[str, ...]
    """As part/task, in the order of their pages."""


@dataclass(frozen=True)
class Kind:
    """Tasks of one kind, and how many of them are in the bundle."""

    title: str
    num_chosen: int
    num_tasks: int


def write_bundle(directory: Path, out: Path, num_tasks: int) -> Bundled:
    """Write a run's pages into the folder `out`, in place of an earlier bundle, and say what they hold.

    Raises InputError where there is no run, where it cannot be read, and where `out` holds anything else.
    """
    run = ViewedRun(0, directory)
    try:
        _check(out)
        index_once(directory, run.folder)
        if problem := run.index.note("problem"):
            raise InputError(problem)
        with _replacing(out.resolve()) as folder:
            return _Writer(run, folder, make_pages()).write(num_tasks)
    finally:
        run.stop()


def _check(out: Path) -> None:
    if out.resolve() == Path.cwd():
        raise InputError(
            f"{out} is the folder that this command was started in, which a bundle would replace; name another"
        )
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} holds something that is no earlier bundle; choose another folder")


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A new folder, which takes the place of `out` when it is whole. Raises InputError where it cannot be written."""
    try:
        with replacing_folder(out) as folder:
            yield folder
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); choose another folder") from None


@dataclass(frozen=True)
class _Writer:
    """Writes the pages of one run into one folder."""

    run: ViewedRun
    folder: Path
    pages: Environment

    def write(self, num_tasks: int) -> Bundled:
        kinds, every = list_kinds(self.run.index), read_numbers(self.run.index, "order|order")
        names = dict(self.run.index.rows("SELECT num, part || '/' || task FROM items"))
        chosen = set(choose([*kinds.values(), every], names, num_tasks))
        items = self.run.finder.read(every[[number in chosen for number in every.tolist()]])
        places = {item.num: f"tasks/{place:0{len(str(len(items)))}}.html" for place, item in enumerate(items, start=1)}
        fields = {
            "name": self.run.name, "items": items, "total": len(every), "kinds": _count(kinds, chosen),
            "is_ended": not self.run.find_pulse().is_at_work,
        }  # fmt: skip
        self._write_static()
        self._write_overview(fields)
        self._render(
            "tasks.html", "bundle_tasks.html", **fields, address=lambda item: places[item.num], at="Tasks", root=""
        )
        for before, item, after in zip([None, *items], items, [*items[1:], None], strict=False):
            self._write_task(item, before, after, {num: Path(place).name for num, place in places.items()})
        told = tuple(f"{item.part}/{item.task}" for item in items)
        bundled = Bundled(run=self.run.name, num_tasks=len(items), num_left_out=len(every) - len(items), tasks=told)
        write_record(self.folder / MANIFEST, bundled)
        return bundled

    def _write_static(self) -> None:
        own = resources.files("vcot.services.view").joinpath("static")
        texts = {name: own.joinpath(name).read_text("utf-8") for name in ("view.css", "icon.svg")}
        for name, text in (texts | {"style.css": read_style()}).items():
            self._put(f"static/{name}", text.encode())

    def _write_overview(self, fields: Mapping[str, Any]) -> None:
        index, summary = self.run.index, self.run.summary
        said = say_agreement(self.run.measure_agreement(), summary.judge) if summary and self.run.labels.all else ()
        account = self.run.find_pulse().status
        begin = self.pages.get_template("bundle_account.html").render(fields, status=account, agreement=said)
        self._put("index.html", (index.note("bundle_overview") or "").replace(LIVE_PLACE, begin, 1).encode())
        for name, svg in index.rows("SELECT substr(name, 8), body FROM notes WHERE name LIKE 'figure/%'"):
            self._put(f"figures/{name}", svg.encode())

    def _write_task(self, item: Item, before: Item | None, after: Item | None, places: Mapping[int, str]) -> None:
        example = self.run.find_example(item.part, item.task)
        assert example is not None, "the index has just told of it"
        both = example.choose_two()
        self._render(
            f"tasks/{places[item.num]}",
            "bundle_task.html",
            name=self.run.name,
            at="Tasks",
            root="../",
            example=example,
            images=[(image, self._put_image(example, number)) for number, image in enumerate(example.task.images)],
            both=both,
            stretches=compare_texts(both[0].text, both[1].text) if both else [],
            before=before,
            after=after,
            wanted=Filter(),
            address=lambda other: places[other.num],
            labels=self.run.labels,
            outcomes=OUTCOMES,
        )

    def _put_image(self, example: ViewedTask, number: int) -> str:
        found = self.run.read_image(example, number)
        assert found is not None, "the task names it"
        name = f"images/{Path(example.task.images[number].path).name}"
        self._put(name, found[0])
        return f"../{name}"

    def _render(self, place: str, template: str, **fields: Any) -> None:
        self._put(place, self.pages.get_template(template).render(fields).encode())

    def _put(self, place: str, data: bytes) -> None:
        path = self.folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def list_kinds(index: Index) -> dict[str, Numbers]:
    """The numbers of the tasks of each kind, by its name for people."""
    marks = index.rows("SELECT substr(name, 6) FROM columns WHERE name LIKE 'mark|%' ORDER BY name")
    told = ((mark, _tell(mark)) for (mark,) in marks)
    return {title: _list_numbers(read_mask(index, f"mark|{mark}")) for mark, title in told if title}


def _tell(mark: str) -> str:
    """A mark's name for people; empty for a subject, and for an outcome of one checkpoint or setting."""
    kind, _, rest = mark.partition("|")
    if kind in OUTCOMES and "|" in rest:  # `failed|overloaded` is a fault, and `failed|*|*` an outcome
        return f"outcome: {OUTCOMES[kind]}" if rest == "*|*" else ""
    return "" if kind == "subject" else f"{kind}: {rest.replace('_', ' ')}"


def _list_numbers(mask: Mask) -> Numbers:
    return mask.nonzero()[0].astype("int32")


def choose(kinds: Iterable[Numbers], names: Mapping[int, str], num: int) -> Iterator[int]:
    """Numbers of `num` tasks, or of all that are of a kind: the kinds take turns, and a name's hash says which is next."""
    place = {number: hashlib.sha256(name.encode()).digest() for number, name in names.items()}
    queues = [sorted(kind.tolist(), key=place.__getitem__) for kind in kinds]
    in_turn = (number for number in chain.from_iterable(zip_longest(*queues)) if number is not None)
    yield from islice(dict.fromkeys(in_turn), num)


def _count(kinds: Mapping[str, Numbers], chosen: set[int]) -> Sequence[Kind]:
    return [Kind(title, len(chosen & set(own.tolist())), len(own)) for title, own in kinds.items()]
