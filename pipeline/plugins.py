"""Open lists: an object that a recipe names is a built-in's name, `package.module:object`, or an entry point of a package.

Built-ins are found the same way: their names stand for a `package.module:object` of this repository, imported at first
use. Whether a name can be meant is said when a recipe is read; the object is imported when a step needs it.

Limits: a module of one's own must be importable: installed, or in a folder of PYTHONPATH.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from vcot.pipeline.errors import RecipeError

T = TypeVar("T")
_REMEDY = "install it, or put its folder into PYTHONPATH"
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
    is_one: Callable[[object], bool] = lambda _: True
    """Whether an object can be one of them; by default, any can."""
    must_be: str = ""
    """What it must be, for messages: `a subclass of vcot.Judge`."""

    def of_kind(self, is_one: Callable[[object], bool], must_be: str) -> Plugins[Any]:
        """The same list, by those who know what its objects are."""
        return replace(self, is_one=is_one, must_be=must_be)

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
        path = self._find_path(name)
        found = _load(self.what, path)
        if not self.is_one(found):
            raise RecipeError(f"{self.what} {path} is {_describe(found)}, and must be {self.must_be}")
        return found  # type: ignore[return-value]  # as `is_one` says

    def digest_source(self, name: str) -> str:
        """The SHA-256 of the file that defines the object with this name; the object is not imported.

        Raises RecipeError where the file is not found, or defines no such object.
        """
        path = self._find_path(name)
        return f"sha256:{hashlib.sha256(_find_source(self.what, path).read_bytes()).hexdigest()}"

    def digest_own(self, name: str) -> dict[str, str]:
        """`{"code": its digest_source}` of one that is not built in, for the keys of what it decides; empty of built-ins.

        So a change of its file never meets what its former version left. Raises RecipeError as `digest_source` does.
        """
        return {} if name in self.built_ins else {"code": self.digest_source(name)}

    def _find_path(self, name: str) -> str:
        try:
            return self.built_ins.get(name) or _list_entry_points(self.group).get(self.check(name), name)
        except ValueError as error:
            raise RecipeError(str(error)) from None


def _load(what: str, path: str) -> object:
    module, _, attribute = path.partition(":")
    try:
        found: object = importlib.import_module(module)
    except Exception as error:  # whatever a stranger's module raises
        raise RecipeError(
            f"{what} {path}: importing {module} failed ({type(error).__name__}: {error}); {_REMEDY}"
        ) from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise RecipeError(f"{what} {path}: {module} has no {attribute}; see how it is spelt there") from None
    return found


def _find_source(what: str, path: str) -> Path:
    """The file of the module in `path`. One that only passes on what another file defines would hide a change there."""
    module, _, attribute = path.partition(":")
    name = attribute.partition(".")[0]
    try:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"No module named {module!r}")
        source = Path(spec.origin)
        defined = _list_defined(source) if source.suffix == ".py" else {name}
    except Exception as error:  # a package around the module is imported, and may raise anything
        raise RecipeError(
            f"{what} {path}: {module} cannot be read ({type(error).__name__}: {error}); {_REMEDY}"
        ) from error
    if name not in defined:
        raise RecipeError(f"{what} {path}: {source.name} does not define {name}; name the module that does")
    return source


def _list_defined(source: Path) -> set[str]:
    """The names of functions, classes and variables that a file defines, not of what it imports."""
    nodes = list(ast.walk(ast.parse(source.read_bytes())))
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in nodes if isinstance(node, definitions)} | {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def _describe(found: object) -> str:
    return f"the class {found.__name__}" if isinstance(found, type) else f"an object of type {type(found).__name__}"


@cache
def _list_entry_points(group: str) -> Mapping[str, str]:
    """Name -> `package.module:object`."""
    return {point.name: point.value for point in entry_points(group=group)}
