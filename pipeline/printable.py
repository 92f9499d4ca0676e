"""Text that others may have written (models, servers, files' names), as a terminal or a log may show it."""

import re

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a cursor, colours, renames a window, or turns the direction of reading; and what no encoding can say."""


def printable(text: str) -> str:
    """The text with all of that written out, as an escape."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
