r"""Which option a response chose: pure rules that read what a person reads at once, and never guess.

1. What is not the answer is left out first: reasoning inside `<think>`, and a further question that the model invents
   after its answer, with whatever it answers to that.
2. The last statement of an answer counts, whatever stands before it, since a chain of thought holds a draft answer first:
   "The answer is", "The correct option is", `\boxed{B}`, `<answer>B</answer>`. If what follows the last one cannot be
   read, the response has no answer; an earlier one is never used. "Answer:" alone counts only where it can be read.
3. A statement names an option by its letter (`(B)`, `B.`, `option b`, `"B" - blue`; a bare letter must be a capital and
   stand alone, for "The answer is A bird" names no option) or by its text, up to the end of a clause. Upper and lower case
   matter only where options differ in nothing else. Where an option's text is itself one letter, the prompt's letters win.
4. Without a statement the beginning of the response counts: a letter that is all of the first line, or that its own
   option's text follows (`B. red`), "B is ...", or a first line that is an option's text.
5. A contradiction is no answer: a letter beyond the options, two letters (`(A) or (B)`, `(A)? No, (B)`), or a letter with
   another option's text.

Compare ScienceQA's own scorer, which draws a random option where it cannot read, and LLaVA's, which knows letters only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from pipeline.records import is_same_option

_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
_THOUGHT_END = re.compile(r".*</think>", re.DOTALL | re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text(?:bf)?\{)?([^{}\n]*)\}+\$*")
_TAGGED = re.compile(r"<answer>\s*([^<]*?)\s*(?:</answer>|\Z)", re.IGNORECASE)
_MARKUP = re.compile(r"(?<!\w)[*_]+|[*_]+(?!\w)|`|^#+ +", re.MULTILINE)
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")

_STATEMENT = re.compile(
    r"\b(?:(?:the|my)\s+(?:(?:final|correct|right|best|most\s+likely|only)\s+)*(?:answer|option|choice)"
    r"|(?:final|correct)\s+answer)\s+(?:is|would\s+be|should\s+be|must\s+be|has\s+to\s+be)\b",
    re.IGNORECASE,
)
_HEADING = re.compile(
    r"^[^\w\n]*(?:the\s+)?(?:(?:final|correct)\s+)?answer[^\w\n]*(?::|\n)"
    r"|(?<=[.!?])\s+(?:(?:final|correct)\s+)?answer\s*:",
    re.IGNORECASE | re.MULTILINE,
)
_NEXT_QUESTION = re.compile(
    r"^[^\w\n]*(?:(?:next|another|new)\s+)?(?:question|problem|user|user\s+query|human|instruction|q)\s*\d*\s*[:.]",
    re.IGNORECASE | re.MULTILINE,
)
_FILLER = re.compile(
    r"(?:most\s+likely|likely|probably|clearly|indeed|definitely|simply|actually|therefore|thus)\b[\s,:]*",
    re.IGNORECASE,
)

_LETTER = re.compile(
    r"""(?i:option|choice|letter)\s*:?\s*[(\[{"']*([A-Za-z])(?![\w'])[)\]}"']*"""
    r"|[(\[{]\s*([A-Za-z])\s*[)\]}]"
    r"|([A-Za-z])\)"
    r'|"?([A-Z])"?'
)
_BARE = 4
"""The group of a letter without word or bracket."""
_AFTER_BARE = re.compile(
    r"\s*(?:$|[.:](?!\w)|[,;!?)\]}\"\n/&(]|[-\u2013\u2014](?!\w)|'(?!\w))|\s+(?:because|since|as|which|or|nor|and)\b"
)
_LETTER_IS = re.compile(r"([A-Z])\s+is\s+(?!not\b|never\b|incorrect|wrong|false|unlikely|also\b)")
_BRACKETED_LETTER = re.compile(r"[(\[]([A-Za-z])[)\]]")
_ALTERNATIVE = re.compile(
    r"""[\s"')\]}]*(?:\?|(?i:or|nor)\b|/|(?:,|&|(?i:and)\b)\s*(?:(?i:or)\b|[(\[]\w[)\]]|[A-Z](?![\w'])))"""
    r"""|[\s.,;:!"'-]*(?i:no|nope|wait|sorry|correction|not)\s*[,.:!]"""
)
_CLAUSE_END = re.compile(
    r"""\s*(?:$|[!?;](?!\w)|[.,:](?!\w)|["')\]}](?!\w)|\(|[-\u2013\u2014]+\s)|[^\S\n]*\n"""
    r"|\s+(?i:because|since|as|which|that|who|where|due\s+to|based\s+on|according\s+to)\b"
)
_ARTICLE = re.compile(r"(?:the|an|a)\s+")
_EDGE = " \t\r\n.,;:!?\"'"
_BETWEEN = _EDGE + ")]}-\u2013\u2014=>$"
"""What may stand between "The answer is", a letter, and the option's text."""


def parse_choice(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that `text` chose, A for the first of `choices`; None where it names none.

    A text that several options share names the first of them.
    """
    options = tuple(choice.translate(_QUOTES) for choice in choices)
    index = _read(_cut_next_question(_plain(text), options), options)
    return None if index is None else chr(ord("A") + index)


def _plain(text: str) -> str:
    """The text without reasoning and markup, and with each notation of a statement in words."""
    said = _THOUGHT_END.sub("", text, count=1) if "</think>" in text.lower() else _THOUGHT.sub("", text)
    said = _TAGGED.sub(r" The answer is \1 \n", _BOXED.sub(r" The answer is (\1)", said))
    return _MARKUP.sub("", said).translate(_QUOTES).strip()


def _cut_next_question(plain: str, options: tuple[str, ...]) -> str:
    """The text up to the question that follows an answer. A question before any answer is the one that was asked."""
    begin = re.compile(r"\S").search(plain)
    first = _NEXT_QUESTION.search(plain, begin.end() if begin else 0)
    cues = [match.end() for cue in (_STATEMENT, _HEADING) if (match := cue.search(plain))]
    if (
        first
        and min(cues, default=len(plain)) > first.start()
        and _read_opening(plain[: first.start()], options) is None
    ):
        first = _NEXT_QUESTION.search(plain, min(cues)) if cues else None
    return plain[: first.start()] if first else plain


def _read(plain: str, options: tuple[str, ...]) -> int | None:
    """The option that the last statement names, or else the beginning."""
    statements = [match.end() for match in _STATEMENT.finditer(plain)]
    begin = statements[-1] if statements else 0
    readings = [_read_statement(plain[match.end() :], options) for match in _HEADING.finditer(plain, begin)]
    headed = next((index for index in reversed(readings) if index is not None), None)
    if headed is not None:
        return headed
    return _read_statement(plain[begin:], options) if statements else _read_opening(plain, options)


def _read_statement(said: str, options: tuple[str, ...], max_depth: int = 3) -> int | None:
    """The option that the words after "The answer is" name; `max_depth` brackets around them may be opened."""
    said = said.lstrip(_BETWEEN)
    while filler := _FILLER.match(said):
        said = said[filler.end() :]
    named, after_text = _find_text(said, options)
    letter, after_letter = _find_letter(said, options)
    if named is not None and (len(options[named].strip()) > 1 or letter is None):
        return None if _turns(after_text, named, options) else named
    if letter is not None:
        return None if _turns(after_letter, letter, options) else letter
    inner, rest = _split_brackets(said) if max_depth else (None, said)
    index = None if inner is None else _read_statement(inner, options, max_depth - 1)
    return None if index is None or _turns(rest, index, options) else index


def _read_opening(plain: str, options: tuple[str, ...]) -> int | None:
    """The option that a response begins with, where it states no answer."""
    named, rest = _find_text(plain, options)
    if named is not None and not rest.partition("\n")[0].strip(_EDGE):
        return named
    if match := _LETTER_IS.match(plain):
        return _index_of(match[1], options)
    letter, rest = _find_letter(plain, options)
    if letter is None:
        return None
    line = rest.partition("\n")[0].strip(_BETWEEN)
    own, after = _find_text(rest.lstrip(_BETWEEN), options)
    if line and (own is None or not is_same_option(options, own, letter)):
        return None
    return None if own is not None and _turns(after, letter, options) else letter


def _find_letter(said: str, options: tuple[str, ...]) -> tuple[int | None, str]:
    """The option whose letter `said` opens with, and what follows it."""
    match = _LETTER.match(said)
    letter = next(filter(None, match.groups()), "") if match else ""
    index = _index_of(letter, options) if letter else None
    if match is None or index is None:
        return None, said
    rest = said[match.end() :]
    if match[_BARE] and not _AFTER_BARE.match(rest):
        own, _ = _find_text(rest.lstrip(), options)
        if own is None or not is_same_option(options, own, index):
            return None, said
    return index, rest


def _index_of(letter: str, options: tuple[str, ...]) -> int | None:
    index = ord(letter.upper()) - ord("A")
    return index if index < len(options) else None


def _turns(rest: str, index: int, options: tuple[str, ...]) -> bool:
    """Whether what follows an option names another one, or takes it back."""
    following = rest.lstrip(_BETWEEN)
    named, after = _find_text(following.removeprefix("("), options)
    if named is not None:
        return not is_same_option(options, named, index) or bool(_ALTERNATIVE.match(after))
    letter = _BRACKETED_LETTER.match(following)
    other = _index_of(letter[1], options) if letter else index
    return bool(_ALTERNATIVE.match(rest)) or other not in (None, index)


def _find_text(said: str, options: tuple[str, ...]) -> tuple[int | None, str]:
    """The option whose text `said` opens with, up to the end of a clause, and what follows it; the longest one.

    Where several have that text but for upper and lower case, the one that is written in the same way.
    """
    begin = len(said) - len(said.lstrip(_EDGE))
    ends: dict[int, int] = {}
    for index, pattern in enumerate(_patterns(options)):
        match = pattern.match(said, begin) if pattern else None
        if match and _CLAUSE_END.match(said, match.end()):
            ends[index] = match.end()
    if not ends:
        article = _ARTICLE.match(said, begin)
        return _find_text(said[article.end() :], options) if article else (None, said)
    end = max(ends.values())
    longest = [index for index in ends if ends[index] == end]
    exact = [index for index in longest if _words(options[index]) == _words(said[begin:end])]
    alike = exact or longest
    is_one = all(is_same_option(options, index, alike[0]) for index in alike)
    return (alike[0], said[end:]) if is_one else (None, said)


@lru_cache(maxsize=1024)
def _patterns(options: tuple[str, ...]) -> tuple[re.Pattern[str] | None, ...]:
    """For each option a pattern of its text, in any case and spacing, the punctuation at its end being optional."""
    patterns = []
    for option in options:
        core = option.strip(_EDGE)
        tail = option.rstrip()[len(option.rstrip().rstrip(_EDGE)) :]
        text = r"\s+".join(map(re.escape, core.split()))
        patterns.append(re.compile(f"{text}(?:{re.escape(tail)})?", re.IGNORECASE) if core else None)
    return tuple(patterns)


def _words(text: str) -> str:
    return " ".join(text.split()).strip(_EDGE)


def _split_brackets(said: str) -> tuple[str | None, str]:
    """What stands in the brackets that `said` opens with, and what follows them; (None, said) without a whole pair."""
    depth = 0
    for position, character in enumerate(said):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return (said[1:position], said[position + 1 :]) if position else (None, said)
    return None, said
