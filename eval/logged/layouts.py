"""How tools lay out what they log: where a row has its id, its texts, and what was asked.

inspect_ai's log as JSON: `samples[]` with id, epoch, input, choices, target, `output.choices[].message.content`.
lmms-eval's `*_samples_*.jsonl`: doc_id, doc (question, choices, answer), resps, or filtered_resps where these are the same.
VLMEvalKit's predictions: index, question, A, B, C ..., answer, prediction.
LLaVA's answers: question_id, text. Its result file, and ScienceQA's: one document with `outputs`, a text by question id.
Any other: an id and a text, or a list of texts, under a usual name or one that the user gives.

Where a row holds what was asked, that says which question it is, for a running number does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vcot.eval.logged.log_rows import Fault, Row, read_rows
from vcot.pipeline.errors import InputError
from vcot.pipeline.sources.own_table import plain_cell

_IDS = ("id", "question_id", "task_id", "task", "sample_id", "qid", "pid")
_TEXTS = ("text", "response", "prediction", "output", "completion", "generated_text", "model_output", "responses")
_SAMPLES = ("sample", "epoch", "sample_index")
_STOPS = ("finish_reason", "stop_reason")
_CUT = ("length", "max_tokens", "model_length")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Asked(NamedTuple):
    """What a row says was asked."""

    question: str
    choices: tuple[str, ...]
    """None where the row holds no options, which the question may have all the same."""
    answer: str
    """The gold option's letter; empty where the row does not say."""


class Logged(NamedTuple):
    """One response that a tool logged."""

    where: str
    """`line 3`."""
    id: str
    text: str | None
    """None where the request failed."""
    sample: str = ""
    """Which of several responses to the question, where the row says so."""
    is_cut: bool = False
    """Whether it reached its longest length."""
    asked: Asked | None = None
    is_numbered: bool = False
    """Whether the id is a row's number in the tool's own list, and says nothing of the question."""

    @property
    def name(self) -> str:
        """For messages: `line 3 (id 17)`."""
        return f"{self.where} (id {self.id[:60]})"


Read = Callable[[str, Mapping[str, Any]], Iterator[Logged]]


@dataclass(frozen=True)
class Fields:
    """Where the user says that id and text are; a dot goes into a nested object."""

    id: str | None = None
    text: str | None = None


def read_log(path: Path, fields: Fields) -> Iterator[Logged | tuple[str, Fault]]:
    """The responses of a file, and the places that hold none. Raises InputError where nothing of it can be understood."""
    read: Read | None = None
    is_any = False
    for where, row in _unfold(read_rows(path)):
        is_any = True
        if isinstance(row, Fault):
            yield where, row
        elif not isinstance(row, Mapping):
            yield where, Fault(f"is a JSON {type(row).__name__}, not an object")
        else:
            read = read or _find_layout(path, where, row, fields)
            try:
                yield from read(where, row)
            except (KeyError, TypeError, IndexError, AttributeError) as error:
                yield where, Fault(f"is laid out unlike the first row ({type(error).__name__}: {error})")
    if not is_any:
        raise InputError(f"{path} holds no row; the tool that wrote it may have been stopped")


def _unfold(rows: Iterator[Row]) -> Iterator[Row]:
    """A document's rows: an inspect log's samples, the texts of a result file."""
    for where, row in rows:
        document = row if where == "the document" and isinstance(row, dict) else {}
        if isinstance(document.get("samples"), list):
            yield from ((f"sample {number}", sample) for number, sample in enumerate(document["samples"], 1))
        elif isinstance(document.get("outputs"), dict):
            texts = document["outputs"].items()
            yield from (
                (f"output {number}", {"id": name, "text": text}) for number, (name, text) in enumerate(texts, 1)
            )
        else:
            yield where, row


def _find_layout(path: Path, where: str, row: Mapping[str, Any], fields: Fields) -> Read:
    """Says by the first row how all are laid out. Raises InputError where it is none that is known."""
    if not fields.id and not fields.text:
        if "epoch" in row and isinstance(row.get("output"), Mapping):
            return _read_inspect
        if "doc_id" in row and ("resps" in row or "filtered_resps" in row):
            return _read_lmms_eval
        if "index" in row and "prediction" in row:
            return _read_vlmevalkit
    id_field, text_field = fields.id or _pick(_IDS, row), fields.text or _pick(_TEXTS, row)
    for what, flag, name in (("an id", "--id", id_field), ("a text", "--text", text_field)):
        if name is None or _look(row, name) is _NOTHING:
            is_given = f"has no field {name}" if name else f"has no field that is known as {what}"
            raise InputError(f"{path}, {where}, {is_given}, only {', '.join(map(str, row))}; name it with {flag}")
    return _flat(str(id_field), str(text_field))


def _pick(names: Sequence[str], row: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in row), None)


_NOTHING = object()


def _look(row: Any, name: str) -> Any:
    """The field of that name, or of that way through nested objects and lists."""
    if isinstance(row, Mapping) and name in row:
        return row[name]
    for part in name.split("."):
        if isinstance(row, Mapping):
            row = row.get(part, _NOTHING)
        elif isinstance(row, list) and part.isdigit() and int(part) < len(row):
            row = row[int(part)]
        else:
            return _NOTHING
    return row


def _flat(id_field: str, text_field: str) -> Read:
    def read(where: str, row: Mapping[str, Any]) -> Iterator[Logged]:
        name, said = _look(row, id_field), _look(row, text_field)
        if name is _NOTHING or said is _NOTHING:
            raise KeyError(id_field if name is _NOTHING else text_field)
        sample = _pick(_SAMPLES, row)
        stop = _pick(_STOPS, row)
        yield from _list(
            where,
            str(plain_cell(name)),
            said,
            first="" if sample is None else str(row[sample]),
            is_cut=stop is not None and row[stop] in _CUT,
            asked=_find_asked(row, row.get("answer")),
        )

    return read


def _list(where: str, name: str, said: Any, first: str = "", **others: Any) -> Iterator[Logged]:
    """One response, or each of a list of them."""
    if isinstance(said, list):
        for number, text in enumerate(said):
            yield Logged(where, name, _read_said(text), f"{first}/{number}", **others)
    else:
        yield Logged(where, name, _read_said(said), first, **others)


def _read_said(said: Any) -> str | None:
    """A text, or the texts of a message's parts; None also for a gap in a column. Raises TypeError for what is neither."""
    said = plain_cell(said)
    if said is None or isinstance(said, str):
        return said
    if isinstance(said, int | float):
        return str(said)
    if isinstance(said, list):
        return "".join(part if isinstance(part, str) else part.get("text") or "" for part in said)
    raise TypeError(f"a {type(said).__name__} is no text")


def _read_inspect(where: str, row: Mapping[str, Any]) -> Iterator[Logged]:
    said = row.get("input")
    question = said if isinstance(said, str | None) else _read_said(said[-1]["content"])
    asked = Asked(question, (), "") if question else None
    if row.get("choices"):
        target = row["target"] if isinstance(row["target"], str) else "".join(row["target"])
        asked = Asked(question or "", tuple(row["choices"]), target)
    name, epoch, choices = str(row["id"]), str(row["epoch"]), row["output"].get("choices") or []
    if row.get("error") or not choices:
        yield Logged(where, name, None, epoch, asked=asked)
        return
    for number, choice in enumerate(choices):
        said, is_cut = _read_said(choice["message"]["content"]), choice.get("stop_reason") in _CUT
        yield Logged(where, name, said, f"{epoch}/{number}", is_cut, asked)


def _read_lmms_eval(where: str, row: Mapping[str, Any]) -> Iterator[Logged]:
    texts = list(_flatten(row.get("resps", row.get("filtered_resps"))))
    doc = row.get("doc")
    asked = _find_asked(doc, doc.get("answer")) if isinstance(doc, Mapping) else None
    for number, text in enumerate(texts or [None]):
        yield Logged(where, str(row["doc_id"]), text, str(number), asked=asked, is_numbered=True)


def _flatten(said: Any) -> Iterator[str | None]:
    """The texts in lists of lists, as lmms-eval nests them by request and by repeat."""
    if isinstance(said, list):
        for each in said:
            yield from _flatten(each)
    else:
        yield _read_said(said)


def _read_vlmevalkit(where: str, row: Mapping[str, Any]) -> Iterator[Logged]:
    asked = _find_asked(row, row.get("answer"))
    yield Logged(where, str(row["index"]), _read_said(row["prediction"]), asked=asked, is_numbered=True)


def _find_asked(row: Mapping[str, Any], answer: Any) -> Asked | None:
    """The question and its options, as a list or under letters, if any; None where the row does not hold the question."""
    if not isinstance(row.get("question"), str):
        return None
    choices = row.get("choices") or row.get("options")
    if not isinstance(choices, list):
        choices = [cell for letter in _LETTERS if (cell := plain_cell(row.get(letter))) not in (None, "")]
    options = tuple(str(plain_cell(each)) for each in choices)
    return Asked(row["question"], options, _as_letter(plain_cell(answer)) if choices else "")


def _as_letter(answer: Any) -> str:
    """A gold answer's letter, where it is a letter, or an index that has one; `?` for an index that has none."""
    if isinstance(answer, int):
        return _LETTERS[answer] if 0 <= answer < len(_LETTERS) else "?"
    return answer if isinstance(answer, str) and len(answer) == 1 and answer in _LETTERS else ""
