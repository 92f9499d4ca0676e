"""Where a text states its answer: "The answer is", "B is correct", "Answer:". Pure.

What nobody states is left out: "I doubt that the answer is", "Some say the answer is", "The second best answer is".
"""

from __future__ import annotations

import re

_KIND = (
    r"(?:final|correct|right|best|only|chosen|selected"
    r"|(?:most\s+)?(?:likely|accurate|appropriate|suitable|reasonable|plausible))"
)
_BEGIN = r"(?:^|[.!?:,\n]\s{0,3}|\b(?:so|thus|hence|therefore|then|and|but|is\s+that)\s+)"
_ASIDE = r"(?:\s+to\s+(?:the|this|your)\s+(?:\w+\s+)?question|\s*,[\w\s]{1,30},)?"
_IS = (
    r"\s+(?:is|will\s+be|(?:would|should|must)\s+(?:(?:most\s+)?(?:likely|probably|then|therefore)\s+)?be"
    r"|has\s+to\s+be|can\s+only\s+be|(?:seems|appears)\s+to\s+be)\b"
)
_STATEMENT = re.compile(
    r"(?:\b(?=[a-z])|(?=[.!?:,\n]))(?:(?:(?<! )|(?<!\bif )(?<!\bwhether )(?<!\bunless )(?<!\bwhen ))"
    rf"(?:\b(?:(?:the|my)\s+(?:{_KIND}\s+)*(?:answer|option|choice)|{_KIND}\s+(?:answer|option|choice)|(?:correct|right)\s+one)|{_BEGIN}answer){_ASIDE}{_IS}"
    rf"|{_BEGIN}I(?:'d|'ll|\s+would|\s+will)?\s+(?:choose|pick|select|go\s+with|answer(?:\s+with)?)\b)",
    re.IGNORECASE,
)
_STATED = re.compile(rf"(?:answer|option|choice|one){_ASIDE}{_IS}")
_CHOSEN = re.compile(r"i(?<!\wi)(?:'d|'ll|\s+would|\s+will)?\s+(?:choose|pick|select|go\s+with|answer(?:\s+with)?)\b")
"""What every statement holds one of, in lower case: found ten times as fast, and missing in most sentences."""
_MAX_LEAD = 40
"""More characters than a statement needs before that, not counting the space in front of it."""
_NOT_MADE = re.compile(
    r"(?:\b(?:doubt|deny|denies|(?:false|untrue|impossible|unlikely)(?= +that))"
    r"|(?:\b(?:not|never|cannot)|n't) +(?:true|certain|sure|think|believe|say|mean)"
    r"|\b(?:some|many|most|others|people|you|one|they|he|she|students?)(?: +(?:may|might|could|would))?"
    r" +(?:say|think|believe|claim|guess|assume|suppose|argue)(?:s|d|ed)?"
    r"|\b(?:said|thought|claimed|guessed|assumed))(?: +that)? +$"
    r"|\bif\b[^.!?\n]{1,60} (?:were|had)\b[^.!?\n]{0,60}, *$|\b(?:second|third|next|least)[ -]+$",
    re.IGNORECASE,
)
"""What stands before a statement that nobody makes, or that is of another option than the chosen one."""
_MAX_BEFORE = 140
"""Characters that this takes at most."""
_CLAIM = re.compile(
    r"(?:^|[.!?:\n]\s{0,3}|\b(?:[Ss]o|[Tt]hus|[Hh]ence|[Tt]herefore)\b,?\s+|\b(?:[Bb]ased\s+on|[Aa]ccording\s+to)[\w\s]{1,40},\s+)"
    r"""(?:[Oo]nly\s+)?(?:[Tt]he\s+(?=\w+\s+[A-Z]\b))?(?:(?i:option|choice|letter)\s+)?[(\["']*([A-Z])[)\]"']*"""
    r"\s+is\s+(?:therefore\s+|thus\s+|clearly\s+)?(?:the\s+)?(?:most\s+)?(?:correct|right|best|final)\b(?:\s+(?:answer|option|choice|one)\b|(?!\s+(?:answer|option|choice|one)\b))"
    r"(?!\s+(?:if|too|also|as\s+well)\b|[^.\n]{0,40}\?)"
)
"""An option that is said to be right, by its letter."""
_CLAIMED = re.compile(r"[A-Z][)\]\"']*\s+is\b")
"""What every such claim has, and few other texts."""
_HEADING = re.compile(
    rf"^[^\w\n]*(?:(?:the|my|your)\s+)?(?:{_KIND}\s+)*(?:answer|ans|option|choice|solution)[^\w\n]*?(?::|=|\n|\s-\s)"
    r"|(?<=[.!?])\s+(?:(?:final|correct|right|best)\s+)?answer\s*:",
    re.IGNORECASE | re.MULTILINE,
)


def say_claims(plain: str) -> str:
    """The text with "B is the correct answer" as a statement that names its option behind it."""
    return _CLAIM.sub(r". The answer is (\1)", plain) if _CLAIMED.search(plain) else plain


def end_statements(plain: str) -> list[int]:
    """Where each "The answer is" ends that the text itself says."""
    return [match.end() for match in _find_statements(plain) if not _is_anothers(plain, match)]


def _find_statements(plain: str) -> list[re.Match[str]]:
    if not plain.isascii():  # whose lower case may have another length
        return list(_STATEMENT.finditer(plain))
    found: list[re.Match[str]] = []
    lower = plain.lower()
    held = [*_STATED.finditer(lower), *_CHOSEN.finditer(lower)]
    for stated in sorted(held, key=re.Match.start):
        at = found[-1].end() if found else 0
        lead = len(plain[: stated.start()].rstrip()) - _MAX_LEAD
        match = _STATEMENT.search(plain, max(at, lead), stated.end())
        found += [match] if match else []
    return found


def _is_anothers(plain: str, statement: re.Match[str]) -> bool:
    before = plain[max(0, statement.start() - _MAX_BEFORE) : statement.start()]
    last = before.rstrip()[-1:]
    return (last.isalpha() or last in (",", "-")) and _NOT_MADE.search(before) is not None


def find_headings(plain: str, begin: int = 0) -> list[re.Match[str]]:
    """Each "Answer:" from there on; without one of these signs there is none."""
    is_possible = any(map(plain.__contains__, ":=\n-"))
    return list(_HEADING.finditer(plain, begin)) if is_possible else []
