"""What the commands do that need no run: look at the machine, and build a nano model on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vcot.pipeline.errors import InputError
from vcot.services.cli.target import Target, run_directory
from vcot.services.cli.terminal import Terminal
from vcot.services.planning.doctor import examine
from vcot.services.recipes.recipe import load_recipe
from vcot.services.run.directory import RECIPE


def doctor(target: Target, *, as_json: bool = False) -> bool:
    """`vcot doctor`: looks at the run's recipe, or at the one named, and begins no run."""
    if target.save:
        raise InputError("vcot doctor changes no run; give --save to a command that works on one, as `vcot run`")
    directory, recipe = run_directory(target.run, target.recipe), target.recipe
    stored = directory / RECIPE
    resolved = load_recipe(str(stored) if recipe is None and stored.is_file() else recipe or "nano", target.set)
    return examine(resolved, directory, Terminal(as_json=as_json, quiet=target.quiet))


def build_nano(out: Path, architecture: str) -> None:
    """`vcot nano build`: the builder in this terminal, as a process of its own."""
    command = [sys.executable, "-P", "-m", "vcot.training.nano", "--out", str(out), "--architecture", architecture]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
