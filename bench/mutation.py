"""How many small changes of the deciding code its tests notice, by mutmut: `make mutation`.

Each of the files in mutation.toml is changed in one place at a time (a comparison, a number, an argument, a condition) and
its own fast tests are run. What no test noticed is printed; the score is the share that was noticed, or that never ended.

Not counted, by rule: a mutant that changes only words, that is a text with a space in it or what an exception says; one
that assigns another empty value (None for False), which mypy refuses, and the type that `cast` names; and those that
mutation.toml lists as equivalent, with the reason. mutmut leaves functions with
decorators alone, so in the copy that it works on a property is written as `name = property(name)`. It changes nothing
outside functions: constants and patterns are left to the tests alone.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import chdir
from dataclasses import dataclass
from difflib import ndiff
from pathlib import Path
from typing import Any

from bench.mutation_run import SURVIVED, TIMEOUT

ROOT = Path(__file__).parent.parent
SPEC = ROOT / "bench" / "mutation.toml"
BESIDE = (
    *("pipeline", "eval", "services", "training", "bench", "tests", "docs"),
    *("pyproject.toml", "Makefile", "README.md", "CONTRIBUTING.md"),
)
LIFTED = {"property", "contextmanager", "lru_cache"}
_ORIGINAL = "__mutmut_orig"

Key = tuple[str, str, str]
"""File, the lines that were, and what they become."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    file: str
    name: str
    """As mutmut calls it."""
    was: str
    becomes: str
    """The lines that differ, without indentation."""

    @property
    def key(self) -> Key:
        """What mutation.toml knows it by."""
        return self.file, self.was, self.becomes


def lift_decorators(source: str) -> str:
    """The same code, with the decorators that mutmut would stop at applied after their function."""
    lines = source.split("\n")
    found = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and len(node.decorator_list) == 1
        and _called(node.decorator_list[0]) in LIFTED
    ]
    for node in sorted(found, key=lambda node: -node.lineno):
        (decorator,) = node.decorator_list
        indent = " " * node.col_offset
        lines.insert(
            node.end_lineno or 0, f"{indent}{node.name} = {ast.unparse(decorator)}({node.name})  # type: ignore"
        )
        del lines[decorator.lineno - 1 : decorator.end_lineno]
    return "\n".join(lines)


def _called(node: ast.expr) -> str:
    return ast.unparse(node.func if isinstance(node, ast.Call) else node)


class _Wordless(ast.NodeTransformer):
    """Code without what only a reader of its messages meets."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("") if isinstance(node.value, str) and " " in node.value else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        texts = [part.value for part in node.values if isinstance(part, ast.Constant)]
        return ast.Constant("") if any(" " in str(text) for text in texts) else self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        node.value = _without_kind(node.value)
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.value = node.value and _without_kind(node.value)
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            node.exc.args = []
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "cast":
            node.args = node.args[1:]
        return self.generic_visit(node)


def _without_kind(value: ast.expr) -> ast.expr:
    """One empty value for all."""
    return ast.Constant(None) if isinstance(value, ast.Constant) and value.value in (None, False, "") else value


def _without_words(source: str) -> str:
    return ast.dump(_Wordless().visit(ast.parse(source)))


def list_mutants(file: str, mutated: str, names: Sequence[str]) -> Iterator[Mutant]:
    """Those mutants of `file` that change more than words. `mutated` is mutmut's code of all of them."""
    functions = _functions(mutated)
    module = f"vcot/{file}".removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for name in names:
        original = name.partition("__mutmut_")[0] + _ORIGINAL
        before, after = functions[original].replace(original, "f"), functions[name].replace(name, "f")
        if _without_words(before) != _without_words(after):
            lines = list(ndiff(before.split("\n"), after.split("\n")))
            was, becomes = (" ".join(line[2:].strip() for line in lines if line[:2] == sign) for sign in ("- ", "+ "))
            yield Mutant(file, f"{module}.{name}", was, becomes)


def _functions(source: str) -> dict[str, str]:
    """The source of each function and method, without its place in the file."""
    lines = source.split("\n")
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "__mutmut_" in node.name:
            own = lines[node.lineno - 1 : node.end_lineno]
            found[node.name] = "\n".join(line[node.col_offset :] for line in own)
    return found


def lay_out(directory: Path, file: str) -> None:
    """A copy to work in, with the settings that mutmut asks for."""
    for name in ("vcot", *BESIDE):
        here, there = ROOT / name, directory / name
        if here.is_dir():
            shutil.copytree(here, there, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(here, there)
    (directory / "vcot" / file).write_text(lift_decorators((ROOT / file).read_text("utf-8")), "utf-8")
    (directory / "setup.cfg").write_text("[mutmut]\nsource_paths=vcot\n", "utf-8")


def find_mutants(directory: Path, file: str) -> list[Mutant]:
    """Write mutmut's code of all mutants of the file, and list them without mere words."""
    from mutmut.configuration import reset_config
    from mutmut.mutation.file_mutation import mutate_file_contents

    path = directory / "vcot" / file
    with chdir(directory):
        reset_config()
        mutated = mutate_file_contents(f"vcot/{file}", path.read_text("utf-8"))
    path.write_text(mutated.code, "utf-8")
    return list(list_mutants(file, mutated.code, mutated.mutant_names))


def run_mutants(directory: Path, file: str, tests: Sequence[str], mutants: Sequence[Mutant]) -> dict[str, str]:
    """Run the tests on each (bench/mutation_run.py); what came of it by name."""
    order, fates = directory / "order.json", directory / "fates.json"
    order.write_text(json.dumps([mutant.name for mutant in mutants]), "utf-8")
    command = [sys.executable, "-m", "bench.mutation_run", str(order), str(fates)]
    done = subprocess.run(
        [*command, *tests, "-m", "not e2e and not compose and not rehearsal"],
        cwd=directory, env=os.environ | {"PYTHONPATH": str(directory)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the tests of {file} could not be run:\n{done.stdout}{done.stderr}")
    found: dict[str, str] = json.loads(fates.read_text("utf-8"))
    return found


def measure(file: str, tests: Sequence[str], equivalent: set[Key], draw: Draw) -> Result:
    """Try the mutants of one file."""
    with tempfile.TemporaryDirectory(prefix="vcot-mutation-") as name:
        directory = Path(name)
        lay_out(directory, file)
        found = find_mutants(directory, file)
        counted = draw.some([mutant for mutant in found if mutant.key not in equivalent])
        fates = run_mutants(directory, file, tests, counted) if counted else {}
    survivors = [mutant for mutant in counted if fates[mutant.name] == SURVIVED]
    return Result(file, len(counted), list(fates.values()).count(TIMEOUT), survivors)


@dataclass(frozen=True)
class Draw:
    """Which of a file's mutants are tried."""

    share: float
    seed: int

    def some(self, mutants: Sequence[Mutant]) -> list[Mutant]:
        """A seeded share of them, in their order."""
        rng = random.Random(self.seed)
        return [mutant for mutant in mutants if rng.random() < self.share]


@dataclass(frozen=True)
class Result:
    """What came of one file."""

    file: str
    num_mutants: int
    num_endless: int
    """Noticed because the tests did not end; on a busy machine some of these only took long."""
    survivors: list[Mutant]

    @property
    def score(self) -> float:
        """The share of mutants that a test noticed."""
        return 1 - len(self.survivors) / self.num_mutants if self.num_mutants else 1.0

    @property
    def summary(self) -> str:
        """The score in a line."""
        endless = f", {self.num_endless} of them by a timeout" if self.num_endless else ""
        return f"{self.file}: {self.score:.1%} of {self.num_mutants} mutants noticed{endless}"


def read_spec() -> tuple[dict[str, list[str]], set[Key]]:
    """What pytest is told for each file, and the mutants that are equivalent."""
    spec: dict[str, Any] = tomllib.loads(SPEC.read_text("utf-8"))
    left_out = [f"--deselect={test}" for test in spec["slow"]]
    known = {(each["file"], each["was"], each["becomes"]) for each in spec["equivalent"]}
    return {file: [*tests, *left_out] for file, tests in spec["tests"].items()}, known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", help="some of the files in mutation.toml; all by default")
    parser.add_argument("--share", type=float, default=1.0, help="of each file's mutants, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-least", type=float, default=0.9, help="the score of each file, or the command fails")
    options = parser.parse_args()
    tests, equivalent = read_spec()
    results = []
    for file in options.files or tests:
        began = time.monotonic()
        result = measure(file, tests[file], equivalent, Draw(options.share, options.seed))
        print(f"{result.summary}; {time.monotonic() - began:.0f} s", flush=True)
        for mutant in result.survivors:
            print(f"  {mutant.name.rpartition('.')[2]}\n    - {mutant.was}\n    + {mutant.becomes}")
        results.append(result)
    survivors = [mutant for result in results for mutant in result.survivors]
    total = Result("all", sum(r.num_mutants for r in results), sum(r.num_endless for r in results), survivors)
    print(total.summary)
    print(json.dumps({r.file: round(r.score, 4) for r in [*results, total]}))
    low = [result.file for result in results if result.score < options.at_least]
    if low:
        raise SystemExit(f"below {options.at_least:.0%}: {', '.join(low)}")


if __name__ == "__main__":
    main()
