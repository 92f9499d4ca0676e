"""What `make docs` does beside MkDocs: the pages that lie outside docs/ are pages of the site, too."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?!https?:|#)[^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie beside docs/."""
    for name, page in OUTSIDE.items():
        text = (ROOT / name).read_text("utf-8")
        files.append(File.generated(config, page, content=re.sub(r"\]\(docs/", "](", text)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the site's pages; one to a file of the repository becomes its words, one to nothing stays and fails."""

    def relink(found: re.Match[str]) -> str:
        words, target = found.groups()
        path, sign, anchor = target.partition("#")
        path = OUTSIDE.get(path.removeprefix("../"), path)
        is_elsewhere = files.get_file_from_path(path) is None and any(
            (ROOT / base / path).exists() for base in ("", "docs")
        )
        return words if is_elsewhere else f"[{words}]({path}{sign}{anchor})"

    return _LINK.sub(relink, markdown)
