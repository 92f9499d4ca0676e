"""Which option a response chose: pure rules that never guess.

1. The last "The answer is" (in upper or lower case) counts, whatever stands before it: a chain of thought holds a draft
   answer first. If what follows the last one cannot be read, the response has no answer; an earlier one is never used.
2. What follows is an option's text, in brackets or up to the end of its sentence (the paper's format is `The answer is
   (answer)`). It must equal exactly one option; upper and lower case matter only where options differ in nothing else.
3. Or it is an option's letter: `(B)`, `(b)`, or a capital that stands alone (`B`, `B.`, `B because ...`; "The answer is
   A bird" names no option), with or without the option's own text. Where an option's text is itself one letter, the
   prompt's letters win.
4. Without "The answer is", a response that is nothing but a letter, or a letter and its own option's text (`B`, `(B)`,
   `B. red`), counts, as in LLaVA's scorer.
5. A letter beyond the options, two letters (`(A) or (B)`), or a letter with another option's text is no answer.

Compare ScienceQA's own scorer, which draws a random option where it cannot read, and LLaVA's, which knows letters only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_STATEMENT = re.compile(r"\bthe answer is\b", re.IGNORECASE)
_LETTER = re.compile(r"\(([A-Za-z])\)|([A-Z])(?=$|[\s\"'\u2019\u201d]*(?:$|[.,;:!)\n])|\s+(?:because|since|as)\b)")
_LETTER_AND_TEXT = re.compile(r"(?:\(([A-Z])\)|([A-Z]))[.:)]*(?:\s+(.+))?", re.DOTALL)
_ALTERNATIVE = re.compile(r"\s*(?:or\b|nor\b|/|(?:,|&|and\b)\s*(?:or\b|\(\w|[A-Z](?![\w'\u2019])))")
_SENTENCE_END = re.compile(r"[.!;](?=\s)|\n|$")
_MARKUP = re.compile(r"\*\*|__|`")
_EDGE = " \t\r\n.,;:!?\"'\u2018\u2019\u201c\u201d"


def parse_choice(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that `text` chose, A for the first of `choices`; None where it names none."""
    plain = _MARKUP.sub("", text).strip()
    statements = list(_STATEMENT.finditer(plain))
    if statements:
        index = _read_statement(plain[statements[-1].end() :].lstrip(_EDGE), choices)
    else:
        index = _read_letter_and_text(plain, choices)
    return None if index is None else chr(ord("A") + index)


def _read_statement(said: str, choices: Sequence[str]) -> int | None:
    """The option that the words after "The answer is" name."""
    named = _find_text(said, choices)
    if named is not None and len(choices[named].strip()) > 1:
        return named
    letter = _LETTER.match(said)
    if letter and (index := _index_of(letter, choices)) is not None:
        rest = said[letter.end() :]
        other = _find_text(rest.lstrip(_EDGE), choices)
        return None if _ALTERNATIVE.match(rest) or other not in (None, index) else index
    inner, rest = _split_brackets(said)
    if inner is None:
        return named
    if _ALTERNATIVE.match(rest):
        return None
    matched = _match_text(inner, choices)
    return _read_letter_and_text(inner.strip(), choices) if matched is None else matched


def _read_letter_and_text(said: str, choices: Sequence[str]) -> int | None:
    """The option whose letter is all of `said`, its own text aside."""
    match = _LETTER_AND_TEXT.fullmatch(said)
    index = _index_of(match, choices) if match else None
    if match is None or index is None or match[3] is None:
        return index
    return index if _match_text(match[3], choices) == index else None


def _index_of(letter: re.Match[str], choices: Sequence[str]) -> int | None:
    index = ord((letter[1] or letter[2]).upper()) - ord("A")
    return index if index < len(choices) else None


def _split_brackets(said: str) -> tuple[str | None, str]:
    """What stands in the brackets that `said` opens with, and what follows them; (None, said) without a whole pair."""
    depth = 0
    for position, character in enumerate(said):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return (said[1:position], said[position + 1 :]) if position else (None, said)
    return None, said


def _find_text(said: str, choices: Sequence[str]) -> int | None:
    """The option whose text `said` opens with, up to the end of a sentence; the longest one."""
    for end in reversed([match.start() for match in _SENTENCE_END.finditer(said)]):
        if (index := _match_text(said[:end], choices)) is not None:
            return index
    return None


def _match_text(said: str, choices: Sequence[str]) -> int | None:
    """The one option that equals `said`: to the letter, or but for punctuation around it, or but for case as well."""
    for form in (str.strip, _trim, _fold):
        if not (wanted := form(said)):
            return None
        matches = [index for index, choice in enumerate(choices) if form(choice) == wanted]
        if matches:
            return matches[0] if len(matches) == 1 else None
    return None


def _trim(text: str) -> str:
    return " ".join(text.split()).strip(_EDGE)


def _fold(text: str) -> str:
    return _trim(text).casefold()
