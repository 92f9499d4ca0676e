"""How much a request may ask of the engine's scheduler by what its answer must look like. Pure.

`structured_outputs`, `response_format` and `tools` hold regular expressions, JSON schemas and grammars, which vLLM compiles
and then follows for each token, while everybody waits. The expressions' cost is estimated (patterns.py), the counts of
schemas and grammars are bounded.

Limits: what a grammar's rules or a schema's references make of each other is not followed, so a careless one may be slow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import orjson

from vcot.services.gateway.http.answers import Refusal
from vcot.services.gateway.http.patterns import MAX_DEPTH, Cost, TooDeepError, cost_of

MAX_PATTERN = 8_192
"""Characters of one regular expression."""
MAX_SIZE = 10_000
"""Places of one, its counts written out."""
MAX_WIDTH = 64
"""Places in it that are possible at once."""
MAX_PATTERNS = 32_768
"""Characters of all regular expressions of a request."""
MAX_COUNT = 100_000
"""Of a schema, times those of the arrays around it."""
MAX_GRAMMAR = 16_384
"""Characters of a grammar."""
MAX_GRAMMAR_COUNTS = 256
"""The counts of a grammar, together."""
_COUNTS = ("maxLength", "minLength", "maxItems", "minItems", "maxProperties", "minProperties")
_ITEMS = ("maxItems", "minItems")
_PATTERNS = ("pattern", "regex", "whitespace_pattern")
_NESTED = ("json", "structural_tag")
"""JSON that may stand in a string."""
_GRAMMAR_COUNT = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")


def check_compiled(name: str, value: Any) -> None:
    """Raise Refusal for a field of a request that would keep the engine's scheduler busy."""
    left = MAX_PATTERNS
    for key, found, times in _found(value):
        if key in _COUNTS:
            _check_count(name, key, found, times)
        elif key == "grammar":
            _check_grammar(name, found)
        else:
            left -= len(found)
            if left < 0:
                raise _refusal(f"{name} has more than {MAX_PATTERNS:,} characters of regular expressions; send fewer")
            _check_pattern(name, found)


def _found(value: Any) -> Iterator[tuple[str, Any, float]]:
    """What costs, by its key, and how often the arrays around it may repeat it."""
    pending: list[tuple[Any, float]] = [(value, 1.0)]
    while pending:
        node, times = pending.pop()
        if isinstance(node, list):
            pending += [(item, times) for item in node]
        elif isinstance(node, dict):
            yield from ((key, found, times) for key, found in _costly(node))
            inside = times * max([1.0, *(float(node[key]) for key in _ITEMS if _is_number(node.get(key)))])
            pending += [(each, inside if key == "items" else times) for key, each in node.items()]
            pending += [(_parsed(node[key]), times) for key in _NESTED if isinstance(node.get(key), str)]


def _costly(node: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        is_text = isinstance(value, str)
        if (key in _COUNTS and _is_number(value)) or (is_text and (key in _PATTERNS or key == "grammar")):
            yield key, value
        elif key == "patternProperties" and isinstance(value, dict):
            yield from ((key, pattern) for pattern in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _parsed(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:  # for the engine to refuse
        return None


def _check_count(name: str, key: str, count: float, times: float) -> None:
    if count * times > MAX_COUNT:
        around = f", {times:,.0f} times by the arrays around it" if times > 1 else ""
        raise _refusal(f"{name} has a {key} of {count:,}{around}, and {MAX_COUNT:,} in all are taken; ask for less")


def _check_grammar(name: str, grammar: str) -> None:
    if len(grammar) > MAX_GRAMMAR:
        raise _refusal(f"{name} has a grammar of more than {MAX_GRAMMAR:,} characters; send a smaller one")
    digits = (number for pair in _GRAMMAR_COUNT.findall(grammar) for number in pair if number)
    if sum(min(float(number), float(MAX_COUNT)) for number in digits) > MAX_GRAMMAR_COUNTS:
        message = f"{name} has a grammar whose counts are more than {MAX_GRAMMAR_COUNTS} together"
        raise _refusal(f"{message}; write * or + in place of a large one")


def _check_pattern(name: str, pattern: str) -> None:
    what = f"the regular expression {pattern[:60]!r} in {name}"
    if len(pattern) > MAX_PATTERN:
        raise _refusal(f"{what} has more than {MAX_PATTERN:,} characters; send a shorter one")
    try:
        cost = _cost_of(pattern)
    except TooDeepError:
        raise _refusal(f"{what} has more than {MAX_DEPTH} groups in one another; send a simpler one") from None
    if cost.size > MAX_SIZE:
        message = (
            f"{what} is {cost.size:,} characters long where its counts are written out, and {MAX_SIZE:,} are taken"
        )
        raise _refusal(f"{message}; write * or smaller counts")
    if cost.width > MAX_WIDTH:
        message = f"{what} leaves some {cost.width:,.0f} ways to read a character, and {MAX_WIDTH} are taken"
        raise _refusal(f"{message}; let each repeat end with what it cannot hold, as in ([^,]{{1,40}},){{1,25}}")


@lru_cache(256)
def _cost_of(pattern: str) -> Cost:
    return cost_of(pattern)


def _refusal(message: str) -> Refusal:
    return Refusal(400, "too_complex", message)
