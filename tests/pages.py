"""The code blocks of pages in docs/, which tests save outside the repository and use word for word."""

import re
from pathlib import Path

_DOCS = Path(__file__).parents[1] / "docs"


def list_blocks(heading: str, language: str, page: str = "extending.md") -> list[str]:
    """The section's blocks in a language, in order."""
    _, *sections = re.split(r"^## ", (_DOCS / page).read_text("utf-8"), flags=re.MULTILINE)
    [section] = [text for text in sections if text.startswith(f"{heading}\n")]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


def read_block(heading: str, language: str, page: str = "extending.md") -> str:
    """The section's only block in a language."""
    [block] = list_blocks(heading, language, page)
    return block
