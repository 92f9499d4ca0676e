r"""Which option a response chose: pure rules that read what a person reads at once, and never guess.

1. What is not the answer is left out first: reasoning inside `<think>` and its like, what follows the end of the model's
   turn (pipeline/plain.py), and a further question that it invents after its answer ("1. What else?"), with whatever it
   answers to that.
2. The last statement of an answer counts, whatever stands before it, since a chain of thought holds a draft answer first:
   "The answer is", "B is the correct option", "I choose", `\boxed{B}`, `<answer>B</answer>`. If what follows the last one
   cannot be read, the response has no answer; an earlier one is never used. "Answer:" counts only where it can be read.
3. A statement names an option by its letter (`(B)`, `B.`, `option b`, `"B" - blue`; a bare letter must stand alone and be a
   capital or end its line, for "The answer is A bird" names no option) or by its text, up to the end of a clause. Upper and
   lower case matter only where options differ in nothing else. Where an option's text is itself one letter, the prompt's
   letters win.
4. Without a statement the beginning of the response counts: a letter that is all of the first line, or that its own
   option's text follows (`B. red`), "B is ...", or a first line that is an option's text.
5. A contradiction is no answer: a letter beyond the options, two letters (`(A) or (B)`, `(A)? No, (B)`), a letter with
   another option's text, a list of the options, or an explanation of another option than the one before it.
6. Nor is an answer that is taken back ("Just kidding."), shared ("since B is right, too") or conditional ("A (if red)"):
   pipeline/hedges.py.
7. A letter counts in any style, width or bracket: bold, in a circle, full-width. Statements are read in English only. A
   letter of another alphabet is none of the options' letters, however alike it looks, and words of another script right
   behind an answer leave it unread, for they may deny it.

Compare ScienceQA's own scorer, which draws a random option where it cannot read, and LLaVA's, which knows letters only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import Literal

from vcot.pipeline.hedges import is_all_right, is_taken_back, is_unsettled, list_joined, may_share, skip_aside
from vcot.pipeline.plain import plain_answer, simplify
from vcot.pipeline.records import is_same_option
from vcot.pipeline.statements import end_statements, find_headings, say_claims

Unread = Literal["none", "two", "off_list"]
"""Why a text names no option: no option is stated, several are, or one that the question does not have."""

_NEXT_QUESTION = re.compile(
    r"(?=^|[ugp])(?:^[^\w\n]*(?:(?:next|another|new)\s+)?"
    r"(?:question|problem|user|user\s+query|human|instruction|task|context|follow-?\s?up(?:\s+question)?|q)"
    r"[ \t]{0,3}\d*[ \t]{0,3}[:.]"
    r"|^[^\w\n]*(?:question|problem|exercise|example|q)[ \t]{0,3}\d*[ \t]{0,3}(?:\n|(?<=\d)[:.)])"
    r"|^[^\w\n]*input[ \t]{0,3}:|\bUSER:|\bgiven\s+the\s+question,\s+please\b"
    r"|\bplease\s+answer\s+the\s+(?:following|next)\b|\bplease\s+select\s+the\s+correct\s+answer\b)",
    re.IGNORECASE | re.MULTILINE,
)
_NUMBERED = re.compile(
    r"(?:^[^\w\n]{0,9}|(?<=[.!?)])[ \t]{1,3})\d{1,2}[.):][ \t]{1,3}(?=[A-Z])[^.?!\n]{1,200}\?", re.MULTILINE
)
"""A question with a number, which another one only is behind an answer."""
_MAX_NUMBERED = 8
"""So many of them are looked at."""
_EXPLANATION = re.compile(r"(?:(?<=[\w.!)\]\"'])[ \t]{1,3}|^)(?=Explanation[ \t]{0,3}[:.])", re.MULTILINE)
_FILLER = re.compile(
    r"(?:most\s+likely|likely|(?:most\s+)?probably|clearly|obviously|indeed|definitely|simply|actually|therefore|thus|hence"
    r"|in\s+my\s+opinion|in\s+fact|of\s+course|i\s+(?:think|believe))\b[\s,:]*",
    re.IGNORECASE,
)
_OPENING = re.compile(
    r"(?:(?:sure|okay|ok|so|well|thus|hence|therefore|i\s+(?:think|believe)(?:\s+that)?|it\s+(?:is|must\s+be)|it's|i(?:'d|\s+would)\s+say(?:\s+that)?|that\s+is|this\s+is)\b[\s,:!.]*)+",
    re.IGNORECASE,
)
"""Words before an answer that is not stated otherwise."""
_VERDICTS = ("yes", "no", "true", "false")
"""Options that a sentence may begin with, as in "No, it is not"."""
_IS_RIGHT = re.compile(r"[\"')]*\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b[^.\n]*[.!]?")

_LETTER = re.compile(
    r"""(?i:option|choice|letter|answer)\s*:?\s*[(\[{"']*([A-Za-z])(?![\w'])[)\]}"']*"""
    r"|[(\[{]\s*([A-Za-z])\s*[)\]}]"
    r"|([A-Za-z])\)"
    r"""|["']?([A-Z])["']?"""
    r"""|["']?([a-z])(?![\w'])["']?"""
)
_BARE = 4
"""The group of a capital without word or bracket."""
_SMALL = 5
"""That of a lower-case letter, which must end its line or stand before its option's text."""
_LINE_END = re.compile(r"[^\w\n?]*(?:\n|$)")
_AFTER_BARE = re.compile(
    r"[^\S\n]*\n|\s*(?:$|[.:](?!\w)|[^\w\s.:'+#%\u00b0@=<>~^*\u0300-\u036f-]|[-\u2013\u2014](?!\w)|'(?!\w))"
    r"|\s+(?:because|since|as|which|or|nor|and|but|due\s+to|based\s+on|according\s+to|rather\s+than|instead\s+of|not|so|for|here"
    r"|in\s+(?:this|the|that))\b(?!-)"
)
_NAMED = re.compile(r"(?<![\w'])([A-Z])(?![\w']|\s(?!(?:and|because|since|are)\b)[a-z]{3})")
"""A capital that stands alone, and is no article."""
_FOREIGN = re.compile(r"(?i:option\s+)?[(\[]?[A-Z](?:[)\]]|[.:,](?!\w)|\s*$)")
"""A letter as an answer gives it."""
_LETTER_IS = re.compile(
    r"([A-Z])\s+is\s+(?!(?:[\w-]+\s+){0,2}(?:not|never|incorrect|wrong|false|unlikely|no|neither|out|impossible|worst|eliminated|excluded|distractor)\b"
    r"|(?:also|possible|plausible|tempting|close|too|one\s+of|what|for|unclear|unknown)\b"
    r"|[^.\n]*(?:\?|\b(?:if|but|letter|alphabet|vowel|consonant|article)\b|\b(?:to|than|as|like|from)\s+[(\[]?[A-Z](?![\w'])))"
)
_NOT_WRONG = r"(?!\s+(?:is|are)\s+(?:also\s+)?(?:not|wrong|incorrect|false)\b)"
_OTHER_LETTER = re.compile(
    rf"(?i:option|choice|letter)\s+[(\[{{]?([A-Za-z])(?![\w']){_NOT_WRONG}|[(\[{{]([A-Za-z])[)\]}}]{_NOT_WRONG}"
    r"|(?:[^\W\d_]{1,12}\s{0,3},\s{0,3})?([A-Z])(?=\s*(?:$|[;)\n]|\.\s*(?:$|\n)))|([a-z])(?=\s*(?:$|\n))"
)
_ALTERNATIVE = re.compile(
    rf"""[\s"'()\[\]}}-]*(?:\?|(?i:or|nor|vs|versus)\b|[/|\\]|;\s*[(\[]?[A-Z][)\]]?\s*(?:$|[.;])"""
    rf"""|(?:,\s*(?i:and\b)?|&|(?i:and)\b)(?:\s+(?i:also))?\s*(?:(?i:or)\b|[(\[]\w[)\]]{_NOT_WRONG}|[A-HJ-Z](?![\w']){_NOT_WRONG}))"""
    r"""|[\s.,;:!"')-]*(?i:no|nope|wait|sorry|correction|not|or\s+rather|i\s+mean)\s*[,.:!]"""
    r"""|[\s.,;:!"')-]*(?i:or\s+is\s+it\b|(?:(?:or|hm+)[,.]?\s+)?(?:maybe|perhaps|probably)\s+not\b|not\s+really\b|well,?\s+no\b)"""
    r"""|[\s.,;:"')-]*(?i:but|however|plus|then|as\s+is|as\s+well\s+as|along\s+with|together\s+with|followed\s+by)\s+(?i:option\s+)?(?:[(\[]\w[)\]]|[A-HJ-Z](?![\w']))(?!\s+(?:is|are|was)\s+(?:not|wrong|incorrect|false)\b)"""
    r"""|[\s.,;:!"'()-]*(?i:(?:and|but|however),?\s+)?(?i:option\s+)?(?:[(\[]\w[)\]]|[A-HJ-Z](?![\w']))\s+(?:is|may\s+be|could\s+be)\s+(?:also|too|as\s+well|better|equally|possible)\b(?!\s+(?:wrong|incorrect|false|not)\b)"""
    r"""|[\s.,;:!"'()-]*(?i:actually|on\s+second\s+thoughts?|or\s+rather|i\s+mean|no|wait|hm+|oh|oops|or|alternatively|perhaps|maybe|possibly)[,:.]?\s+(?:it's\s+|it\s+is\s+)?(?:[(\[]\w[)\]]|[A-HJ-Z](?![\w']))"""
    r"""|[\s.,;:!"')-]*(?i:but\s+(?:it\s+|(?:option\s+)?[(\[]?[a-z][)\]]?\s+)?(?:could|might|may|is\s+also)|(?:this|that|it)\s+is\s+(?:wrong|incorrect|not\s+(?:right|correct)))\b"""
)
_CLAUSE_END = re.compile(
    r"""\s*(?:$|[!?;](?!\w)|[.,:](?!\w)|["')\]}](?!\w)|\(|[-\u2013\u2014=]+\s)|[^\S\n]*\n"""
    r"|\s+(?i:because|since|as|which|that|who|where|due\s+to|based\s+on|according\s+to|or|nor|and\s+not|rather\s+than|instead\s+of)\b"
    r"|\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b"
)
_ARTICLE = re.compile(r"(?:the|an|a|The|An)\s+|\$")
_OWN_ARTICLE = re.compile(r"(?:the|an|a)\s+(?=\S)", re.IGNORECASE)
_EDGE = " \t\r\n.,;:!?\"'"
_BETWEEN = _EDGE + ")]}-\u2013\u2014=>$"
"""What may stand between "The answer is", a letter, and the option's text."""
_MIN_HEDGE = len("A. jk")
_MAX_KEPT = 8192
"""Questions whose options are kept prepared: more than a benchmark asks."""


def parse_choice(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that `text` chose, A for the first of `choices`; None where it names none.

    A text that several options share names the first of them.
    """
    index, _ = _read(*_prepare(text, choices))
    return None if index is None else chr(ord("A") + index)


def parse_or_explain(text: str, choices: Sequence[str]) -> str:
    """The letter that `parse_choice` reads, or in a word of `Unread` why it reads none."""
    plain, options = _prepare(text, choices)
    index, begin = _read(plain, options)
    return _explain(plain[begin:], options) if index is None else chr(ord("A") + index)


def _explain(said: str, options: tuple[str, ...]) -> Unread:
    """Why nothing is read in the first line of what is stated last."""
    stated = said.strip().partition("\n")[0]
    named = {_index_of(letter, options) for letter in _NAMED.findall(stated)} - {None}
    named |= {index for index, option in enumerate(_patterns(options)) if option and option.search(stated)}
    if len(named) > 1:
        return "two"
    return "off_list" if not named and _FOREIGN.match(_skip(stated)) else "none"


def _prepare(text: str, choices: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The text up to where another question begins, and the options, both in plain signs."""
    options = _simplify(tuple(choices))
    plain = plain_answer(text)
    plain = _EXPLANATION.sub("\n", plain) if "Explanation" in plain else plain
    return _cut_numbered(_cut_next_question(say_claims(plain), options), options), options


@lru_cache(maxsize=_MAX_KEPT)
def _simplify(choices: tuple[str, ...]) -> tuple[str, ...]:
    """The options as answers are simplified, unless that makes two of them one."""
    simple = tuple(map(simplify, choices))
    return simple if len(set(simple)) == len(set(choices)) else choices


def _cut_next_question(plain: str, options: tuple[str, ...]) -> str:
    """The text up to the question that follows an answer. A question before any answer is the one that was asked."""
    first = _NEXT_QUESTION.search(plain, 1) if _may_ask(plain) else None
    if first is None:
        return plain
    cues = [*end_statements(plain)[:1], *(match.end() for match in find_headings(plain)[:1])]
    if min(cues, default=len(plain)) > first.start() and _read_opening(plain[: first.start()], options) is None:
        first = _NEXT_QUESTION.search(plain, min(cues)) if cues else None
    return plain[: first.start()] if first else plain


def _cut_numbered(plain: str, options: tuple[str, ...]) -> str:
    """The text up to the first question with a number that stands behind an answer."""
    numbered = islice(_NUMBERED.finditer(plain), _MAX_NUMBERED) if "?" in plain else ()
    return next(
        (plain[: match.start()] for match in numbered if _read(plain[: match.start()], options)[0] is not None), plain
    )


def _may_ask(plain: str) -> bool:
    """Whether a further question is possible at all: on a line of its own, or with one of two words."""
    lower = plain.lower()
    return "\n" in plain or "user:" in lower or "please" in lower or not plain.isascii()


def _read(plain: str, options: tuple[str, ...]) -> tuple[int | None, int]:
    """The option that is stated last, unless what follows takes it back or explains another one, and where it is stated."""
    index, begin = _read_last(plain, options)
    if index is None or _is_hedged(plain[begin:], index, options):
        return None, begin
    explained = _EXPLANATION.search(plain) if "Explanation" in plain else None
    before = None if explained is None else _read_last(plain[: explained.start()], options)[0]
    return (index if before is None or is_same_option(options, before, index) else None), begin


def _read_last(plain: str, options: tuple[str, ...]) -> tuple[int | None, int]:
    """The option that the last statement names, or else the beginning, and where in the text."""
    statements = end_statements(plain)
    begin = statements[-1] if statements else 0
    for heading in reversed(find_headings(plain, begin)):
        headed = _read_statement(plain[heading.end() :], options)
        if headed is not None:
            return headed, heading.end()
    return (_read_statement(plain[begin:], options) if statements else _read_opening(plain, options)), begin


def _is_hedged(said: str, index: int, options: tuple[str, ...]) -> bool:
    """Whether the words from an answer on take it back, or say that another option is right, too."""
    if len(said) < _MIN_HEDGE:
        return False
    if is_taken_back(said, chr(ord("A") + index)):
        return True
    if not may_share(said):
        return False
    return is_all_right(said, options[index]) or any(_shares(index, names, options) for names in list_joined(said))


def _shares(index: int, names: tuple[str, ...], options: tuple[str, ...]) -> bool:
    """Whether what is said to be right together is this option and another, or one alone that is another."""
    named = {_read_statement(name, options) for name in names}
    others = [other for other in named if other is not None and not is_same_option(options, other, index)]
    return bool(others) and (len(names) == 1 or len(others) < len(named))


def _read_statement(said: str, options: tuple[str, ...], max_depth: int = 3) -> int | None:
    """The option that the words after "The answer is" name; `max_depth` brackets around them may be opened."""
    said = _skip(said)
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
    index = _read_first(plain, options)
    lead = _OPENING.match(plain) if index is None else None
    return _read_first(plain[lead.end() :], options) if lead else index


def _read_first(said: str, options: tuple[str, ...]) -> int | None:
    """The option that the first line is, or whose letter it begins with."""
    named, rest = _find_text(said, options)
    if named is not None and len(options[named].strip()) == 1 and _find_letter(said, options)[0] is not None:
        named = None
    line = rest.partition("\n")[0]
    if named is not None and (not line.strip(_EDGE) or _IS_RIGHT.fullmatch(line)):
        return None if _turns(rest, named, options) else named
    if named is not None and options[named].strip(_EDGE).lower() in _VERDICTS and rest[0] in ",.":
        return None if _turns(rest, named, options) else named
    if match := _LETTER_IS.match(said):
        index = _index_of(match[1], options)
        return None if index is None or _turns(said[match.end() :], index, options) else index
    letter, rest = _find_letter(said, options)
    if letter is None or _turns(rest, letter, options):
        return None
    line = rest.partition("\n")[0].strip(_BETWEEN)
    own, after = _find_text(_skip(rest), options)
    if line and (own is None or not is_same_option(options, own, letter)):
        return None
    return None if own is not None and _is_list(after, letter, options) else letter


def _is_list(after: str, letter: int, options: tuple[str, ...]) -> bool:
    """Whether the next line gives another letter with its text, as a list of the options does."""
    other, rest = _find_letter(_skip(after), options)
    named, _ = _find_text(_skip(rest), options)
    return other is not None and other != letter and named == other


def _find_letter(said: str, options: tuple[str, ...]) -> tuple[int | None, str]:
    """The option whose letter `said` opens with, and what follows it."""
    match = _LETTER.match(said)
    letter = next(filter(None, match.groups()), "") if match else ""
    index = _index_of(letter, options) if letter else None
    if match is None or index is None:
        return None, said
    rest = said[match.end() :]
    if match[_BARE]:
        is_alone = _AFTER_BARE.match(rest) is not None
    elif match[_SMALL]:
        is_alone = _LINE_END.match(rest) is not None and letter not in map(str.strip, options)
    else:
        return index, rest
    if not is_alone:
        own, _ = _find_text(_skip(rest), options)
        if own is None or not is_same_option(options, own, index):
            return None, said
    return index, rest


def _index_of(letter: str, options: tuple[str, ...]) -> int | None:
    index = ord(letter.upper()) - ord("A")
    return index if index < len(options) else None


def _turns(rest: str, index: int, options: tuple[str, ...]) -> bool:
    """Whether what follows an option names another one, takes it back or is a condition; brackets may come between."""
    aside = skip_aside(rest)
    return _turns_at_once(rest, index, options) or (bool(aside) and _turns_at_once(aside, index, options))


def _turns_at_once(rest: str, index: int, options: tuple[str, ...]) -> bool:
    following = _skip(rest)
    named, after = _find_text(following.removeprefix("("), options)
    if named is not None:
        if not is_same_option(options, named, index):
            return True
        rest, following = after, _skip(after)
    letter = _OTHER_LETTER.match(following)
    other = _index_of(next(filter(None, letter.groups())), options) if letter else index
    return bool(_ALTERNATIVE.match(rest)) or other not in (None, index) or is_unsettled(rest)


def _find_text(said: str, options: tuple[str, ...], *, may_skip: bool = True) -> tuple[int | None, str]:
    """The option whose text `said` opens with, up to the end of a clause, and what follows it; the longest one.

    An article or a `$` before it is passed over where `may_skip`. Where several have that text but for upper and lower
    case, it is the one that is written in the same way.
    """
    begin = len(said) - len(said.lstrip(_EDGE))
    ends: dict[int, int] = {}
    for index, pattern in enumerate(_patterns(options)):
        match = pattern.match(said, begin) if pattern else None
        if match and _CLAUSE_END.match(said, match.end()):
            ends[index] = match.end()
    if not ends:
        passed = _ARTICLE.match(said, begin) if may_skip else None
        return _find_text(said[passed.end() :], options, may_skip=False) if passed else (None, said)
    end = max(ends.values())
    longest = [index for index in ends if ends[index] == end]
    exact = [index for index in longest if _words(options[index]) == _words(said[begin:end])]
    alike = exact or longest
    is_one = all(is_same_option(options, index, alike[0]) for index in alike)
    return (alike[0], said[end:]) if is_one else (None, said)


@lru_cache(maxsize=_MAX_KEPT)
def _patterns(options: tuple[str, ...]) -> tuple[re.Pattern[str] | None, ...]:
    """For each option a pattern of its text, in any case and spacing, the punctuation at its end being optional."""
    patterns = []
    for option in options:
        core = option.strip(_EDGE)
        tail = option.rstrip()[len(option.rstrip().rstrip(_EDGE)) :]
        article = _OWN_ARTICLE.match(core)
        words = core[article.end() :] if article else core
        text = (rf"(?:{article[0].strip()}\s+)?" if article else "") + r"\s+".join(map(re.escape, words.split()))
        patterns.append(re.compile(f"{text}(?:{re.escape(tail)})?", re.IGNORECASE) if core else None)
    return tuple(patterns)


def _words(text: str) -> str:
    return " ".join(text.split()).strip(_EDGE)


def _skip(said: str) -> str:
    """The text from its first word or bracket on; the sign of a number is the number's."""
    begin = len(said) - len(said.lstrip(_BETWEEN))
    is_signed = said[begin : begin + 1].isdigit() and said[begin - 1 : begin] in ("-", "$")
    return said[begin - is_signed :]


def _split_brackets(said: str) -> tuple[str | None, str]:
    """What stands in the brackets that `said` opens with, and what follows them; (None, said) without a whole pair."""
    depth = 0
    for position, character in enumerate(said):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return (said[1:position], said[position + 1 :]) if position else (None, said)
    return None, said
