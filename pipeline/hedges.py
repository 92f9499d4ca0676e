"""What takes an answer back, shares it with another option, or puts it under a condition. Pure.

"The answer is A. Just kidding." has no answer, nor has "A, because both A and B are right" or "A (if red) or B". Only what
the writer says of this very answer counts: "He was just kidding" and "Is it green? Not really." say nothing about it.
"""

from __future__ import annotations

import re

_TAKEN_BACK = re.compile(
    r"(?:^|[.!?,;:\n(]|\s[-\u2013\u2014])\s{0,3}(?:(?:oh|oops|well|but|sorry|no|wait|actually)[,!.]?\s{1,3})?"
    r"(?:(?:i(?:'m|\s+am|\s+was)\s+)?(?:(?:just|only)\s+(?:kidding|joking)|(?:kidding|joking)(?=\s*[.!)\n]|\s*$)|just\s+a\s+joke)"
    r"|jk\b|(?:scratch|strike)\s+that\b|april\s+fools?\b|(?:my\s+(?:mistake|bad)|never\s?mind(?:\s+that)?|that\s+was\s+a\s+(?:joke|lie|mistake)"
    r"|i\s+(?:was\s+(?:wrong|mistaken|lying)|lied|made\s+a\s+mistake)|(?:ignore|disregard|forget)\s+(?:that|this|it|what\s+i\s+said))(?=\s*[.!,;)\n]|\s*$)"
    r"|(?:ignore|disregard|forget)\s+my\s+(?:\w+\s+)?answer\b|i\s+(?:take|took)\s+(?:that|it|this|my\s+answer)\s+back\b"
    r"|i(?:'ve|\s+have)?\s+changed?\s+my\s+mind\b)",
    re.IGNORECASE,
)
_TELLS = (
    "kidding", "jok", "jk", "scratch", "strike", "mistake", "my ", "mind", "wrong", "incorrect", "lying", "lied", "ignore",
    "disregard", "forget", "back", "fool", "not the ", "not a",
)  # fmt: skip
"""Whatever takes an answer back has one of these, in lower case."""
_WRONG = re.compile(
    r"(?:^|[.!?:\n]\s{0,3})(?:(?i:option|choice|answer)\s+)?[(\[]?([A-Z])[)\]]?\s+is\s+"
    r"(?:wrong\b|(?:the\s+wrong|an?\s+(?:wrong|incorrect)|not\s+(?:the|a)(?:\s+(?:right|correct|best))?)\s+(?:answer|option|choice)\b)"
)
_NAME = r"(?:(?i:option|answer|choice)\s+)?[(\[\"']?([A-Z])[)\]\"']?"
_RIGHT = r"(?:right|correct|valid|acceptable|possible|plausible|fine|ok(?:ay)?)\b"
_BE = r"(?:are|is|would\s+be|could\s+be|can\s+be|may\s+be|might\s+be)\s+"
_JOINED = re.compile(
    rf"\b(?i:both|either)\s+([^.,;!?\n]{{1,40}}?)\s+(?:and|or)\s+([^.,;!?\n]{{1,40}}?)\s+(?:{_BE}(?:both\s+|all\s+)?(?:{_RIGHT}|true\b)|works?\b)"
)
_AND = re.compile(rf" and {_NAME}\s+are\s+(?:both\s+|all\s+)?(?:{_RIGHT}|true\b)")
_LAST_NAME = re.compile(rf"(?:^|[^\w'])(?<!\b[Bb]oth ){_NAME}$")
_MAX_NAME = 20
_ALSO = re.compile(
    rf"(?<![\w']){_NAME}\s+(?:{_BE}(?:(?:also|just\s+as|equally)\s+{_RIGHT}|{_RIGHT}\s+(?:too|also|as\s+well)\b)"
    r"|(?:works|(?:would|could|might|may)\s+work)\s+(?:too|also|as\s+well)\b|(?:also|(?:would|could|might|may)\s+also)\s+work)"
)
_ALL = re.compile(
    r"(?:^|[.!?:,;\n]\s{0,3}|\b(?:because|since|as|and|but|though)\s+)(?i:both|all|either|any)(?:\s+of)?(?:\s+(?:the|these|them))?"
    rf"(?:\s+(?:two|three|four|five))?(?:\s+(?:options|answers|choices))?\s+{_BE}(?:all\s+|both\s+|equally\s+)?{_RIGHT}"
)
_RIGHTS = ("right", "correct", "valid", "acceptable", "possible", "plausible", "fine", "ok", "true", "work")
_SHARERS = ("both", "Both", "ither ", "and ", "also", " too", "as well", "ll ", "ny ")
"""Whatever shares an answer has one of each."""
_SEVERAL = re.compile(r"\b(?:both|all|every|either|any|and)\b", re.IGNORECASE)
"""A word of an option that stands for several."""
_UNSETTLED = re.compile(
    r"[\s,;]*[(\[]?\s*(?i:(?:only\s+)?if|unless|assuming|supposing|provided|depending\s+on)\b(?!\s+(?i:i|we|you|one|any|anything)\b)"
    r"|[ \t]*(?:(?![\x00-\u024f])[^\W\d_]"
    r"|(?:oder|ou|o|u|y|e|et|und|och|og|i|lub|of|en|ve|veya|atau|eller)[ \t]+[(\[][A-Z][)\]])"
)
"""A condition, or words that nobody reads here: they may say anything, and "or" as likely as "is wrong"."""
_ASIDE = re.compile(r"\s*(?:\([^()\n]{2,80}\)|\[[^\[\]\n]{2,80}\])")


def is_taken_back(said: str, letter: str) -> bool:
    """Whether the words after an answer take it back, or call its `letter` wrong."""
    if not any(map(said.lower().__contains__, _TELLS)):
        return False
    return _TAKEN_BACK.search(said) is not None or any(match[1] == letter for match in _WRONG.finditer(said))


def may_share(said: str) -> bool:
    """Whether the words after an answer can say at all that another option is right, too."""
    return any(map(said.__contains__, _RIGHTS)) and any(map(said.__contains__, _SHARERS))


def list_joined(said: str) -> list[tuple[str, ...]]:
    """The options, in the text's own words, that are said to be right together; one alone is right besides the answer."""
    both = _JOINED.findall(said) if any(map(said.__contains__, ("oth ", "ither "))) else []
    also = _ALSO.findall(said) if any(map(said.__contains__, ("also", " too", "as well"))) else []
    pairs = [
        (_LAST_NAME.search(said[max(0, match.start() - _MAX_NAME) : match.start()]), match[1])
        for match in _AND.finditer(said)
    ]
    return [*both, *((first[1], second) for first, second in pairs if first), *((name,) for name in also)]


def is_all_right(said: str, option: str) -> bool:
    """Whether all options are said to be right, and `option` is not the one that says so."""
    return _ALL.search(said) is not None and not _SEVERAL.search(option)


def is_unsettled(rest: str) -> bool:
    """Whether what directly follows an option is a condition, or words of another script."""
    return _UNSETTLED.match(rest) is not None


def skip_aside(rest: str) -> str:
    """What follows an option and the brackets after it; nothing without brackets."""
    aside = _ASIDE.match(rest)
    return rest[aside.end() :] if aside else ""
