"""Open lists: an object that a recipe names is a built-in's name, `package.module:object`, or an entry point of a package.

Built-ins are found the same way: their names stand for a `package.module:object` of this repository, imported at first
use. Whether a name can be meant is said when a recipe is read; the object is imported when a step needs it.

Limits: a module of one's own must be importable: installed, or in a folder of PYTHONPATH.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from pipeline.errors import RecipeError

T = TypeVar("T")
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class Plugins(Generic[T]):
    """One open list, such as the judges."""

    what: str
    """What one of them is, for messages: `judge`."""
    group: str
    """The entry points of other packages that belong to it: `vcot.judges`."""
    built_ins: Mapping[str, str]
    """Name -> `package.module:object`."""
    is_one: Callable[[object], bool]
    """Whether an object can be one of them."""
    must_be: str
    """What it must be, for messages: `a subclass of pipeline.judges.Judge`."""

    def check(self, name: str) -> str:
        """`name` itself, for a field of a recipe; nothing is imported. Raises ValueError for one that cannot be meant."""
        if name in self.built_ins or _PATH.fullmatch(name) or name in _list_entry_points(self.group):
            return name
        near = difflib.get_close_matches(name, self.built_ins, n=1)
        raise ValueError(
            f"there is no {self.what} {name!r}{f'; do you mean {near[0]}?' if near else ''}; built in are "
            f"{', '.join(self.built_ins)}, and one of your own is named as package.module:object"
        )

    def resolve(self, name: str) -> T:
        """The object with this name. Raises RecipeError where it is not found, or is something else."""
        try:
            path = self.built_ins.get(name) or _list_entry_points(self.group).get(self.check(name), name)
        except ValueError as error:
            raise RecipeError(str(error)) from None
        found = _load(self.what, path)
        if not self.is_one(found):
            raise RecipeError(f"{self.what} {path} is {_describe(found)}, and must be {self.must_be}")
        return found  # type: ignore[return-value]  # as `is_one` says


def _load(what: str, path: str) -> object:
    module, _, attribute = path.partition(":")
    try:
        found: object = importlib.import_module(module)
    except Exception as error:  # whatever a stranger's module raises
        raise RecipeError(
            f"{what} {path}: importing {module} failed ({type(error).__name__}: {error}); install it, or put its folder "
            "into PYTHONPATH"
        ) from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise RecipeError(f"{what} {path}: {module} has no {attribute}; see how it is spelt there") from None
    return found


def _describe(found: object) -> str:
    return f"the class {found.__name__}" if isinstance(found, type) else f"an object of type {type(found).__name__}"


@cache
def _list_entry_points(group: str) -> Mapping[str, str]:
    """Name -> `package.module:object`."""
    return {point.name: point.value for point in entry_points(group=group)}
