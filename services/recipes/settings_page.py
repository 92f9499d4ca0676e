"""What a recipe says, as a page, from the types that read one: `python -m vcot.services.recipes.settings_page FILE`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vcot.pipeline.files import replace_file
from vcot.services.recipes.recipe import Recipe

_HEAD = """# Recipe settings

A recipe is a TOML file with these sections. `vcot run --recipe NAME` takes one that comes with vcot, `--recipe FILE.toml`
one of yours, and `--set section.field=value` changes a setting for one command. A setting that does not exist is refused,
with the nearest name.

<!-- `make docs` writes this page from the types that read a recipe. -->
"""


def render_page() -> str:
    """The page, in Markdown."""
    return "\n".join([_HEAD, *_render_sections()])


def _render_sections() -> Iterator[str]:
    for section, name in _SECTIONS.items():
        yield from (f"## {name}", "", (section.__doc__ or "").strip(), "")
        yield from ("| setting | default | what it is |", "|---|---|---|")
        yield from _render_fields(section, "")
        yield ""


def _render_fields(section: type[BaseModel], prefix: str) -> Iterator[str]:
    """A row for each setting; a section inside a section has its settings after it, by its name and a dot."""
    for name, field in section.model_fields.items():
        told = (field.description or "").replace("\n", " ").replace("|", "\\|") + _show_choices(field)
        yield f"| `{prefix}{name}` | {_show_default(field)} | {told} |"
        inner = _find_section(field)
        if inner is not None and inner not in _SECTIONS and not prefix:
            yield from _render_fields(inner, f"{name}.")


def _find_section(field: FieldInfo) -> type[BaseModel] | None:
    kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if kind is not NoneType]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _show_default(field: FieldInfo) -> str:
    """What holds where a recipe does not say it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if value is None or isinstance(value, BaseModel) else f"`{json.dumps(value)}`"


def _show_choices(field: FieldInfo) -> str:
    kinds = (field.annotation, *get_args(field.annotation))
    listed = [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
    return f" One of {', '.join(f'`{value}`' for value in listed)}." if listed else ""


_SECTIONS = {section: name for name, field in Recipe.model_fields.items() if (section := _find_section(field))}
"""What has a heading of its own, in the order of a recipe."""


if __name__ == "__main__":
    replace_file(Path(sys.argv[1]), render_page())
