"""Reading what a judge answers: tolerant of how it is wrapped, and never a guess. Pure.

A verdict is one object with the fields that were asked for, such as a `rationale` and a whole `score` from 1 to 10. It is
read in a code fence, after a thought, between other words, inside one other object, with further fields, with 8.0, "8" or
"8/10" for 8, and with Python's quotes or a comma too many. Two objects, a field twice, 7.5 or 11 of 10 are unreadable.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from vcot.pipeline.plain import after_reasoning
from vcot.pipeline.records import Verdict

MIN_SCORE, MAX_SCORE = 1, 10
_WHOLE = re.compile(r"\s*\+?(\d+)(?:\.0+)?\s*(?:(?:/|out\s+of)\s*10\s*)?")


class Unreadable(ValueError):
    """A text that is no verdict; the message says why."""


def read_verdict(text: str) -> Verdict:
    """The one verdict in `text`. Raises Unreadable."""
    fields = read_object(text, "rationale", "score")
    rationale, score = read_rationale(fields), fields.get("score")
    number = _read_number(score)
    if number is None or not MIN_SCORE <= number <= MAX_SCORE:
        raise Unreadable(f"its score {score!r} is not a whole number from {MIN_SCORE} to {MAX_SCORE}")
    return Verdict(score=float(number), rationale=rationale)


def read_object(text: str, *names: str) -> dict[str, Any]:
    """The fields of the one object in `text`, which begins with one of `names` or a quoted one. Raises Unreadable."""
    objects = _find_objects(after_reasoning(text), names)
    if len(objects) != 1:
        raise Unreadable(f"it holds {len(objects)} JSON objects instead of one")
    return _unwrap(objects[0])


def read_rationale(fields: Mapping[str, Any]) -> str:
    """The rationale, half a character in it as a question mark. Raises Unreadable where there is none."""
    rationale = fields.get("rationale")
    if not isinstance(rationale, str):
        raise Unreadable("it has no rationale")
    return clean(rationale)


def clean(text: str) -> str:
    """A text that a record can hold."""
    return text.encode("utf-8", "replace").decode()


def build_format(name: str, properties: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's `response_format` for an object with these fields and no other."""
    schema = {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}


def _unwrap(found: dict[str, Any]) -> dict[str, Any]:
    """The fields by their names in lower case, of what stands alone in another object, too."""
    while len(found) == 1 and isinstance(inner := next(iter(found.values())), dict):
        found = inner
    return _refuse_twice([(str(name).lower(), value) for name, value in found.items()])


def _read_number(score: object) -> int | None:
    """A whole number, also written as 8.0, "8" or "8/10"; None for anything else."""
    if isinstance(score, str):
        found = _WHOLE.fullmatch(score)
        return int(found[1]) if found and len(found[1]) < 5 else None
    if isinstance(score, float):
        return int(score) if score.is_integer() else None
    return score if isinstance(score, int) and not isinstance(score, bool) else None


def _find_objects(text: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """The outermost objects, in order; a brace before anything but a name is a word of the judge's."""
    begin = re.compile(rf"""\{{\s*(?:["'\u201c]|{"|".join(names)})""", re.IGNORECASE)
    objects, found = [], begin.search(text)
    while found:
        fields, end = _decode(text, found.start())
        objects.append(fields)
        found = begin.search(text, end)
    return objects


def _decode(text: str, at: int) -> tuple[dict[str, Any], int]:
    """The object that begins at `at`, and where it ends: JSON, or else a literal of Python's. Raises Unreadable."""
    try:
        fields, end = json.JSONDecoder(object_pairs_hook=_refuse_twice, strict=False).raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        end = _find_end(text, at)
        try:
            fields = _read_literal(text[at:end])
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise Unreadable(f"it is not JSON ({error})") from None
    return fields, end


def _read_literal(text: str) -> Any:
    """Raises ValueError or SyntaxError for what is no literal object, or gives a field twice."""
    with warnings.catch_warnings(action="ignore"):  # of an escape that Python does not know
        tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            _refuse_twice([(ast.dump(name), None) for name in node.keys if name is not None])
    fields = ast.literal_eval(tree)
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise ValueError("it is no object")
    return fields


def _find_end(text: str, at: int) -> int:
    """Where the object that begins at `at` ends: behind the brace that closes it, those in strings not counted."""
    depth, quote, position = 0, "", at
    while position < len(text):
        character = text[position]
        if quote:
            position += character == "\\"
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return position + 1
        position += 1
    return len(text)


def _refuse_twice(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise Unreadable("it gives a field twice")
    return dict(pairs)
