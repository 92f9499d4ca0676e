r"""What stands around an answer, taken away: reasoning, markup, a model's own tokens, other alphabets' signs. Pure.

What is left says in words what the notations say: `\boxed{B}`, `<answer>B</answer>` and `{"answer": "B"}` become "The answer
is (B)". Several of them with nothing between become one statement of several options, which contradicts itself.
"""

from __future__ import annotations

import json
import re
import unicodedata

_REASONING = r"think(?:ing)?|thoughts?|reasoning|analysis|rationale|scratchpad"
_FINAL = r"<\|channel\|>final<\|message\|>"
_THOUGHT = re.compile(
    rf"[<\[]\|?(?:{_REASONING})\|?[>\]].*?(?:[<\[]\|?/(?:{_REASONING})\|?[>\]]|\Z)|<\|channel\|>(?!final).*",
    re.DOTALL | re.IGNORECASE,
)
_THOUGHT_END = re.compile(rf"[<\[]\|?/(?:{_REASONING})\|?[>\]]|{_FINAL}", re.IGNORECASE)
_END = re.compile(
    r"</s>|<\|(?:im_end|endoftext|end|eot_id|eom_id|im_start|start_header_id|user|return)\|>|<(?:end_of_turn|eos)>|\[/?INST\]",
    re.IGNORECASE,
)
"""What ends a model's turn; what follows is another's."""
_LEAD = re.compile(
    r"(?:\s|<s>|<bos>|<\|(?:im_start|start_header_id|end_header_id|begin_of_text)\|>|\[/INST\])*(?:(?:assistant|gpt|model)\s*[:\n]\s*)?",
    re.IGNORECASE,
)
_TAGS = r"answer|final[_ ]answer|choice|option|conclusion"
_VALUE = r"""(?:"((?:[^"\\\n]|\\.)*)"|'([^'\n]*)'|([^\s"',{}\[\]]+))"""
_NOTATION = re.compile(
    rf"<(?:{_TAGS})>([^<]*)(?:</(?:{_TAGS})>|\Z)"
    r"|\[answer\]([^\[]*)\[/answer\]|<\|begin_of_box\|>([^<]*)<\|end_of_box\|>"
    r"|\\(?:boxed|fbox)\s*\{((?:[^{}\n]|\{[^{}\n]*\})*)\}"
    rf"""|["'](?:(?:final|correct|selected)[_ ]?)?(?:answer|choice|option|letter)["']\s*:\s*{_VALUE}""",
    re.IGNORECASE,
)
_FIELD = re.compile(r"(?:(?:final|correct|selected)[_ ]?)?(?:answer|choice|option|letter)", re.IGNORECASE)
_JOINT = re.compile(r"(?:[\s,;/&${}]|and\b|or\b)*", re.IGNORECASE)
_MACRO = re.compile(r"\\(?:text|math)(?:bf|it|rm|tt|sf)?\s*\{([^{}\n]*)\}")
_MATHS = re.compile(r"\\[()\[\]]|\${1,2}([^$\n]*\\[^$\n]*|\s{0,2}\(?[A-Za-z]\)?\s{0,2})\${1,2}")
_BREAK = re.compile(r"<br ?/?>", re.IGNORECASE)
_HTML = re.compile(r"</?(?:b|i|u|p|em|strong|code|span|div|h[1-6])>", re.IGNORECASE)
_MARKUP = re.compile(r"(?<!\w)[*_]++|(?<![*_])[*_]++(?!\w)|`|^#+ +|^(?:[-\u2022>] +)+", re.MULTILINE)
_NOTED = re.compile(r"""[<\[\\"']""")
_MARK = re.compile("[-*_`#>\u2022]")
"""A sign of a notation, and one of markup, which are found fast."""
_SIGNS = {ord(sign): "'" for sign in "\u2018\u2019\u201a\u2032"} | {
    ord(sign): '"' for sign in "\u201c\u201d\u201e\u00ab\u00bb\u300c\u300d\u300e\u300f\u300a\u300b\u3008\u3009"
}
_SPACES = {ord(space): " " for space in "\u00a0\u2002\u2003\u2007\u2009\u202f\u3000"}
_NOTHING = dict.fromkeys(
    map(
        ord,
        "\u00ad\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufe0e\ufe0f\ufeff",
    )
)
"""What is not seen: joiners, directions of writing, variants."""
_FULL_WIDTH = {0xFEE0 + code: chr(code) for code in range(0x21, 0x7F)}
_STYLED = {
    code: unicodedata.normalize("NFKC", chr(code))
    for code in (*range(0x1D400, 0x1D6A4), *range(0x249C, 0x24EA), *range(0x1F110, 0x1F12A))
    if unicodedata.normalize("NFKC", chr(code)).isascii()
}
"""Letters in bold, in a circle or in brackets."""
_BRACKETS = dict.fromkeys(map(ord, "\u3010\u3014\u3016\ufe59\ufe5d"), "(") | dict.fromkeys(
    map(ord, "\u3011\u3015\u3017\ufe5a\ufe5e"), ")"
)
_STOPS = {ord(other): stop for other, stop in zip("\u3002\uff61\u3001\u060c\u061b\u061f\ufe56", "..,,;??", strict=True)}
_OTHERS = {
    ord("\u2192"): "=",
    ord("\u2212"): "-",
    ord("\u25c1"): "<",
    ord("\u25b7"): ">",
    ord("\u2026"): "...",
    ord("\r"): "\n",
    ord("\u2028"): "\n",
}
_TRANSLATION = _SIGNS | _SPACES | _NOTHING | _FULL_WIDTH | _STYLED | _BRACKETS | _STOPS | _OTHERS


def simplify(text: str) -> str:
    """The text in plain quotes, spaces, brackets and letters; options and answers alike."""
    signs = unicodedata.normalize("NFC", text.replace("\r\n", "\n")).translate(_TRANSLATION)
    if "\\" not in signs and "$" not in signs:
        return signs
    return _MATHS.sub(r"\1", _MACRO.sub(r"\1", _MACRO.sub(r"\1", signs)))  # one macro within another at most


def plain_answer(text: str) -> str:
    """The text without reasoning and markup, up to the end of the model's turn, and with each notation in words."""
    said = simplify(text)
    has_tags = "<" in said or "[" in said
    said = _drop_reasoning(said) if has_tags else said
    said = said[_LEAD.match(said).end() :]  # type: ignore[union-attr]
    if has_tags:
        end = _END.search(said)
        said = _HTML.sub("", _BREAK.sub("\n", said[: end.start()] if end else said))
    said = _read_field(said) or said
    noted = _say(said) if _NOTED.search(said) else said
    return (_MARKUP.sub("", noted) if _MARK.search(noted) else noted).strip()


def after_reasoning(text: str) -> str:
    """What follows the last end of a thought; all of a text that has none."""
    ends = list(_THOUGHT_END.finditer(text))
    return text[ends[-1].end() :] if ends else text


def _drop_reasoning(text: str) -> str:
    said = after_reasoning(text)
    return _THOUGHT.sub("", text) if said is text else said


def _read_field(text: str) -> str | None:
    """What a text that is one JSON object with one answer states, whatever its other fields say."""
    said = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    if not (said.startswith("{") and said.endswith("}")):
        return None
    try:
        fields = json.loads(said, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return None
    named = [value for name, value in fields if _FIELD.fullmatch(name)]
    return f"The answer is {named[0]}" if len(named) == 1 and isinstance(named[0], str) else None


def _say(text: str) -> str:
    """The text with its notations as statements; what is noted twice in a row is said once."""
    parts: list[str] = []
    named: list[str] = []
    at = 0
    for found in _NOTATION.finditer(text):
        between = text[at : found.start()]
        if named and not _JOINT.fullmatch(between):
            parts.append(_state(named))
            named = []
        if not named:
            parts.append(between)
        named.append(next((group for group in found.groups() if group is not None), "").strip())
        at = found.end()
    return "".join([*parts, _state(named) if named else "", text[at:]])


def _state(named: list[str]) -> str:
    options = list(dict.fromkeys(named))
    return (
        f" The answer is {options[0]} \n"
        if len(options) == 1
        else f" The answer is {' or '.join(f'({o})' for o in options)} \n"
    )
