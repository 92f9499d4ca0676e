"""Text that others wrote, in Markdown that we write: it stays text, whatever it holds."""

from __future__ import annotations

import re

_MARKS = re.compile(r"[\\`*\[\]<>|~$&]")
UNSEEN = r"\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff"
"""Of a pattern's class: control characters, line ends, changes of direction and what has no width."""
_UNPRINTED = re.compile(rf"[\s\x00-\x1f{UNSEEN}]+")
_MAX_LENGTH = 300


def plain(value: object) -> str:
    """`value` within a line or a table's cell, rendered as it reads: no markup, HTML, control or change of direction in it.

    At most 300 characters of it are kept.
    """
    text = _UNPRINTED.sub(" ", str(value)).strip()
    text = text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]} ..."
    return _MARKS.sub(lambda mark: f"&#{ord(mark[0])};", text)
