"""What a regular expression costs the engine for each token, estimated without running it. Pure.

vLLM follows a regular expression in its scheduler, between one token of everybody and the next: with `(.{0,40}){25}` that
takes seconds, since each character may belong to any of the 25 repeats at any of its 40 places. What counts is the number
of places where a matcher can be at once. An expression whose next part begins with what its last part cannot hold is in
one place only, however long it is: `([a-z]{1,40},){0,100}` costs little.

So each part is read as

    first, more    the characters that it begins with, and those that it may go on with where it may as well end
    spread         its places once its counts are written out; one for a few characters only counts less, as few tokens fit
    width          the places in it that may be possible at once

and where `more` of one part meets `first` of the next, all places of the next are possible at once.

Limits: an estimate, not a bound. Measured with xgrammar 0.2.8 and 32,000 tokens, in CPU time for a token: `.{0,400}` 18 ms,
`.{0,50}.{0,50}` (width 56) 31, `.{0,200}.{0,200}` (208, refused) 261, `(.{0,10}){10}` (100, refused) 2,700; but
`(.{5}){0,400}`, which is in one place only, takes 150. What is no regular expression is for the engine to refuse.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import reduce
from math import log2

MAX_DEPTH = 50
"""Of groups in one another."""
_OTHER = 1 << 128
"""Any character beyond ASCII."""
_ANY = _OTHER * 2 - 1
_BROAD = 26
"""So many characters, and most tokens fit."""
_MAX_COUNT = 10**6


def _mask(characters: str) -> int:
    return reduce(lambda mask, c: mask | (1 << ord(c) if ord(c) < 128 else _OTHER), characters, 0)


_DIGITS = _mask("0123456789")
_SPACES = _mask(" \t\n\r\f\v")
_WORD = _mask("_0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") | _OTHER
_CLASSES = {"d": _DIGITS, "s": _SPACES, "w": _WORD, "D": _ANY & ~_DIGITS, "S": _ANY & ~_SPACES}
_CLASSES |= {"W": _ANY & ~_WORD | _OTHER, "p": _ANY, "P": _ANY}
_NAMED = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
_QUANTIFIER = re.compile(r"([*+?]|\{(\d*)(,?)(\d*)\})[?+]?")
_OPENING = re.compile(r"\((\?(P?<\w+>|<?[=!]|[a-zA-Z-]*:|[a-zA-Z-]+(?=\))|>))?")
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]+\}|[pP]\{[^}]*\}|.)", re.DOTALL)


class TooDeepError(ValueError):
    """Groups in groups, beyond MAX_DEPTH."""


@dataclass(frozen=True)
class Cost:
    """Of an expression, or a part of one."""

    first: int = 0
    more: int = 0
    every: int = 0
    """All characters that it may hold."""
    is_nullable: bool = True
    size: int = 0
    """Its places, each counted as one."""
    spread: float = 0.0
    width: float = 0.0


def cost_of(pattern: str) -> Cost:
    """Of a whole expression. Raises TooDeepError."""
    reader = _Reader(pattern)
    cost = reader.either()
    while not reader.is_at_end:  # a bracket too many
        reader.at += 1
        cost = _then(cost, reader.either())
    return cost


def _characters(mask: int) -> Cost:
    is_broad = bool(mask & _OTHER)
    return Cost(mask, 0, mask, False, 1, 1.0 if is_broad else min(1.0, mask.bit_count() / _BROAD))


def _literal(character: str) -> Cost:
    return replace(_characters(_mask(character)), spread=1 / _BROAD)


def _open_to(cost: Cost) -> int:
    """The characters that may be the next of this part, where it may as well be over."""
    return cost.more | (cost.first if cost.is_nullable else 0)


def _then(one: Cost, other: Cost) -> Cost:
    meets = _open_to(one) & other.first
    return Cost(
        first=one.first | (other.first if one.is_nullable else 0),
        more=other.more | (one.more | other.first if other.is_nullable else 0),
        every=one.every | other.every,
        is_nullable=one.is_nullable and other.is_nullable,
        size=one.size + other.size,
        spread=one.spread + other.spread,
        width=one.width + max(other.width, other.spread) if meets else max(one.width, other.width),
    )


def _or(one: Cost, other: Cost) -> Cost:
    meets = one.first & other.first
    return Cost(
        first=one.first | other.first,
        more=one.every | other.every if meets else one.more | other.more,
        every=one.every | other.every,
        is_nullable=one.is_nullable or other.is_nullable,
        size=one.size + other.size,
        spread=one.spread + other.spread,
        width=one.width + other.width if meets else max(one.width, other.width),
    )


def _repeated(part: Cost, least: int, most: int | None) -> Cost:
    times = max(1, most if most is not None else least + 1 if least else 1)
    is_open = most is None or most > least
    places = log2(2 + most - least) if most is not None and is_open else 1.0
    own = min(1.0, part.spread) * places if is_open else 0.0
    meets = _open_to(part) & part.first
    spread = part.spread * times
    return Cost(
        first=part.first,
        more=part.more | (part.first if is_open or part.is_nullable else 0),
        every=part.every,
        is_nullable=part.is_nullable or least == 0,
        size=part.size * times,
        spread=spread,
        width=max(part.width + own, spread if meets else 0.0),
    )


class _Reader:
    """Reads one expression from its start to its end."""

    def __init__(self, pattern: str) -> None:
        self.at = 0
        self._pattern = pattern
        self._depth = 0

    @property
    def is_at_end(self) -> bool:
        return self.at >= len(self._pattern)

    def _sees(self, characters: str) -> bool:
        return not self.is_at_end and self._pattern[self.at] in characters

    def _take(self) -> str:
        self.at += 1
        return self._pattern[self.at - 1]

    def either(self) -> Cost:
        """Alternatives, up to a closing bracket or the end."""
        cost = self._sequence()
        while self._sees("|"):
            self.at += 1
            cost = _or(cost, self._sequence())
        return cost

    def _sequence(self) -> Cost:
        parts = []
        while not self.is_at_end and not self._sees("|)"):
            parts.append(self._quantified())
        return reduce(lambda later, part: _then(part, later), reversed(parts), Cost())

    def _quantified(self) -> Cost:
        cost = self._atom()
        while (found := _QUANTIFIER.match(self._pattern, self.at)) and found[1] not in ("{}", "{,}"):
            self.at = found.end()
            cost = _repeated(cost, *_counts(found))
        return cost

    def _atom(self) -> Cost:
        if self._sees("("):
            return self._group()
        if self._sees("["):
            return self._class()
        if self._sees("\\"):
            return self._escape()
        character = self._take()
        if character == ".":
            return _characters(_ANY & ~_mask("\n"))
        return Cost() if character in "^$" else _literal(character)

    def _group(self) -> Cost:
        opening = _OPENING.match(self._pattern, self.at)
        assert opening is not None
        self.at = opening.end()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise TooDeepError
        cost = self.either()
        self._depth -= 1
        self.at += 1
        return cost

    def _escape(self) -> Cost:
        mask, character = self._escaped()
        return _characters(mask) if character is None else _literal(character) if character else Cost()

    def _escaped(self) -> tuple[int, str | None]:
        """The characters of an escape, and which one it is if it is one; an empty one for what matches none."""
        found = _ESCAPE.match(self._pattern, self.at)
        if found is None:  # a backslash at the end
            self.at += 1
            return 0, ""
        self.at = found.end()
        kind, digits = found[1][0], found[1][1:].strip("{}")
        if kind in _CLASSES:
            return _CLASSES[kind], None
        if kind in "bBAZz" and not digits:
            return 0, ""
        character = chr(min(int(digits, 16), 0x10FFFF)) if digits else _NAMED.get(kind, kind)
        return _mask(character), character

    def _class(self) -> Cost:
        self.at += 1
        is_negated = self._sees("^")
        self.at += is_negated
        mask = self._entry()
        while not self.is_at_end and not self._sees("]"):
            mask |= self._entry()
        self.at += 1
        return _characters(_ANY & ~(mask & ~_OTHER) if is_negated else mask)

    def _entry(self) -> int:
        """One character, range or class in brackets."""
        mask, low = self._one()
        if low is None or not self._sees("-") or self._pattern[self.at + 1 : self.at + 2] in ("]", ""):
            return mask
        self.at += 1
        other, high = self._one()
        return mask | other if high is None else _range(low, high)

    def _one(self) -> tuple[int, str | None]:
        if self._sees("\\"):
            mask, character = self._escaped()
            return mask, character or None
        character = "" if self.is_at_end else self._take()
        return _mask(character), character or None


def _range(low: str, high: str) -> int:
    below = range(ord(low), min(ord(high), 127) + 1)
    return sum(1 << number for number in below) | (_OTHER if ord(high) > 127 else 0)


def _counts(found: re.Match[str]) -> tuple[int, int | None]:
    """How often at least and at most; None for no end."""
    known: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
    if found[1] in known:
        return known[found[1]]
    least = _count(found[2] or "0")
    most = (_count(found[4]) if found[4] else None) if found[3] else least
    return least, most


def _count(digits: str) -> int:
    return int(digits) if len(digits) < 7 else _MAX_COUNT
