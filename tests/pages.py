"""The code blocks of docs/extending.md, which tests save outside the repository and use word for word."""

import re
from pathlib import Path

_PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def list_blocks(heading: str, language: str) -> list[str]:
    """The section's blocks in a language, in order."""
    _, *sections = re.split(r"^## ", _PAGE.read_text("utf-8"), flags=re.MULTILINE)
    [section] = [text for text in sections if text.startswith(f"{heading}\n")]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


def read_block(heading: str, language: str) -> str:
    """The section's only block in a language."""
    [block] = list_blocks(heading, language)
    return block
