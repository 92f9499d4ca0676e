"""A recipe: one typed tree for a whole run, read from TOML; flags override the file."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ValidationError, model_validator

from vcot.eval.eval_section import EvalSection
from vcot.pipeline.errors import RecipeError
from vcot.pipeline.fields import Count, Section
from vcot.pipeline.files import read_text
from vcot.pipeline.markdown import UNSEEN
from vcot.pipeline.public import public_name
from vcot.pipeline.records import Split
from vcot.pipeline.sections import JudgeSection, ModelSection, PairsSection, SampleSection, TasksSection
from vcot.services.engine.serve_section import ServeSection
from vcot.training.protocol.train_sections import MergeSection, SweepSection, TrainSection


class RoundsSection(Section):
    """Iterated rounds (Wu et al. 2024): each samples, judges, pairs and trains on, from the last one's policy."""

    num: Count = 1
    """How many; each takes `tasks.num_tasks` fresh tasks, about images that no earlier round saw."""
    reference: Literal["previous", "seed"] = "previous"
    """What training pulls towards: the policy that the round starts from, or the base model."""


class Recipe(Section):
    """A whole run."""

    name: str
    """What the run is called."""
    model: ModelSection
    serve: ServeSection
    tasks: TasksSection
    sample: SampleSection
    judge: JudgeSection
    pairs: PairsSection
    train: TrainSection
    sweep: SweepSection = SweepSection()
    merge: MergeSection
    rounds: RoundsSection = RoundsSection()
    eval: EvalSection

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rounds.num > 1 and self.tasks.num_tasks is None:
            raise ValueError(
                "tasks.num_tasks is not set, so the first round takes every task; set it, or rounds.num = 1"
            )
        if self.rounds.num > 1 and self.eval.split == "validation":
            raise ValueError("rounds are chosen on the validation split, so eval.split must be another")
        judges = (self.judge, *([self.eval.judge] if self.eval.judge else []))
        if any(each in ("blank", "other") for judge in judges for each in _list_images(judge)):
            raise ValueError(
                "judge.image is own or none; blank and other are controls, which `vcot judge --audit` shows"
            )
        if self.merge.serve_as == "adapter" and self.train.target_modules != "language-model":
            raise ValueError(
                f"merge.serve_as = adapter, but train.target_modules = {self.train.target_modules}: vLLM drops what an "
                "adapter changes outside the language model; set language-model there, or merged here"
            )
        return self

    @property
    def eval_splits(self) -> tuple[Split, ...]:
        """Those of the benchmark's that are asked: several rounds are chosen from on the validation split."""
        return (self.eval.split, "validation") if self.rounds.num > 1 else (self.eval.split,)


def _list_images(judge: JudgeSection) -> list[str]:
    """What the judge and its members are shown."""
    return [judge.image, *(image for member in judge.members for image in _list_images(member))]


def list_recipes() -> list[str]:
    """Names of the recipes that come with vcot."""
    folder = resources.files("vcot.services").joinpath("recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A bundled recipe by name, or one from a `.toml` path, with `section.field=value` overrides applied.

    Raises RecipeError, naming the field and the nearest valid one.
    """
    path = Path(name)
    if name in list_recipes():
        text = resources.files("vcot.services").joinpath("recipes", f"{name}.toml").read_text("utf-8")
    elif path.suffix == ".toml" and path.is_file():
        text = read_text(path)
    elif path.suffix == ".toml":
        raise RecipeError(f"recipe file {name} does not exist")
    else:
        raise RecipeError(f"no recipe {name!r}{_nearest(name, list_recipes())}; or give the path of a .toml file")
    return parse_recipe(text, overrides, where=name)


def parse_recipe(text: str, overrides: Sequence[str] = (), *, where: str = "recipe") -> Recipe:
    """A recipe from TOML text. Raises RecipeError with every wrong field in one sentence."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where} is not TOML: {error}") from None
    _read_old_names(tree)
    for override in overrides:
        _apply(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        faults = "; ".join(_explain(fault) for fault in error.errors())
        raise RecipeError(f"{where}: {faults}") from None


_RENAMED = {"eval.source": "benchmark"}
"""Fields of older recipes."""


def _read_old_names(tree: dict[str, Any]) -> None:
    """Call a field of an older recipe what it is called today."""
    for dotted, new in _RENAMED.items():
        parent, _, old = dotted.rpartition(".")
        section = tree.get(parent)
        if isinstance(section, dict) and old in section and new not in section:
            section[new] = section.pop(old)


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set `section.field=value` in `tree`; the value is TOML, or else a plain string; none goes back to the default."""
    dotted, separator, text = override.partition("=")
    if not separator:
        raise RecipeError(f"--set {override!r} has no '='; write it as section.field=value")
    try:
        read = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        read = {}
    value = read["value"] if len(read) == 1 else text
    *parents, field = dotted.strip().replace("-", "_").split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise RecipeError(f"--set {override!r}: {parent} is a field, not a section")
    if text.strip():
        node[field] = value
    else:
        node.pop(field, None)


def _explain(fault: Mapping[str, Any]) -> str:
    """One pydantic error as a clause that names the field, the value and the remedy."""
    location = [str(part) for part in fault["loc"]]
    dotted = ".".join(location)
    if fault["type"] == "extra_forbidden" and dotted in _RENAMED:
        return f"{dotted} is called {'.'.join([*location[:-1], _RENAMED[dotted]])} now"
    if fault["type"] == "extra_forbidden":
        return f"unknown field {dotted}{_nearest(location[-1], _fields_at(location[:-1]))}"
    if fault["type"] == "missing":
        return f"{dotted} is missing"
    if fault["type"] == "value_error":
        return f"{dotted}: {fault['ctx']['error']}" if dotted else str(fault["ctx"]["error"])
    if fault["type"] == "string_type":
        return f"{dotted} = {fault['input']}: it takes a text; put it in double quotes, as '{dotted}=\"TEXT\"'"
    if fault["type"] == "tuple_type":
        return f"{dotted} = {fault['input']!r}: it takes a list; write {dotted}=[{render_value(fault['input'])}]"
    return f"{dotted} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _fields_at(location: Sequence[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for name in location:
        if not name.isdigit():  # a place in a list of sections
            section = _find_section(section.model_fields[name].annotation)
    return list(section.model_fields)


def _find_section(annotation: Any) -> type[BaseModel]:
    """The section that a field holds, alone, in a tuple, or if any."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(_find_section(inner) for inner in get_args(annotation) if inner not in (..., type(None)))


def _nearest(name: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else f" (valid: {', '.join(valid)})"


_UNPRINTED = re.compile(f"[{UNSEEN}]")
"""What a JSON string may hold as it is, and nobody can see."""
_PRIVATE = ("serve", "judge.base_url", "judge.api_key_env", "tasks.path", "eval.path")
"""Sections and fields that say where and how a machine was used, and nothing of what came out."""


def render_recipe(recipe: Recipe, *, public: bool = False) -> str:
    """The recipe as TOML with each field's documentation above it; parses back to an equal recipe.

    With `public`, without what is about the machine: addresses, and of a path all but the last name.
    """
    lines = [f"name = {render_value(public_name(recipe.name) if public else recipe.name)}"]
    for section_name in type(recipe).model_fields:
        section = getattr(recipe, section_name)
        if not isinstance(section, Section) or (public and section_name in _PRIVATE):
            continue
        lines += ["", f"[{section_name}]"]
        for name, field in type(section).model_fields.items():
            if public and f"{section_name}.{name}" in _PRIVATE:
                continue
            value = getattr(section, name)
            if public:
                value = _publish(value, section_name)
            comment = f"# {field.description}"
            lines += [comment, f"# {name} =" if value is None else f"{name} = {render_value(value)}"]
    return "\n".join(lines) + "\n"


def _publish(value: object, section_name: str) -> object:
    """A field's value as others may know it, also where it holds sections of its own, private as the one around them."""
    match value:
        case str():
            return public_name(value)
        case tuple():
            return tuple(_publish(item, section_name) for item in value)
        case BaseModel():
            own = "judge" if isinstance(value, JudgeSection) else section_name
            private = {name for name in type(value).model_fields if f"{own}.{name}" in _PRIVATE}
            fields = value.model_dump(exclude=private, exclude_defaults=True)
            return {name: _publish(getattr(value, name), section_name) for name in fields}
        case _:
            return value


def render_value(value: object) -> str:
    """A scalar, a tuple, or a section (its fields other than the defaults) as TOML on one line."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():  # JSON's escapes are TOML's, but for DEL; what ends a line elsewhere than in TOML is escaped, too
            written = json.dumps(value, ensure_ascii=False)
            return _UNPRINTED.sub(lambda found: f"\\u{ord(found[0]):04x}", written)
        case tuple():
            return f"[{', '.join(render_value(item) for item in value)}]"
        case BaseModel():
            return render_value({name: getattr(value, name) for name in value.model_dump(exclude_defaults=True)})
        case dict():
            return f"{{{', '.join(f'{json.dumps(name)} = {render_value(item)}' for name, item in value.items())}}}"
        case _:
            return repr(value)
