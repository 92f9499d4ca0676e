"""Whether this machine can do a recipe, asked before anything is begun or paid: its GPUs, its driver, and what fits on them.

`vcot doctor` shows all of it; `vcot run` stops at what surely does not fit. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import util
from pathlib import Path

from vcot.pipeline.errors import CheckpointError, MachineError
from vcot.pipeline.sections import ModelSection
from vcot.services.checkpoints.model_source import find_model, is_bundled, is_hub_id
from vcot.services.engine.serve_section import ServeSection
from vcot.services.planning.capacity import Cards, find_fit, make_plan, serves_here
from vcot.services.recipes.recipe import Recipe
from vcot.training.protocol.gpus import Gpus, list_gpus
from vcot.training.protocol.shape import Shape, find_shape, read_shape

MINIMUM_DRIVERS: Mapping[int, int] = {11: 450, 12: 525, 13: 580}
"""The oldest Linux driver for each major version of CUDA (NVIDIA, CUDA Compatibility, minor version compatibility)."""
_CUDA = re.compile(r"^cuda\b.*= '(\d+)\.(\d+)'", re.MULTILINE)


def find_config(model: ModelSection) -> Path | None:
    """The model's config.json, or as much of it as comes with vcot; a model that is not here yet has none."""
    from huggingface_hub import try_to_load_from_cache  # half a second, and for models of the hub only

    try:
        if not is_hub_id(model):
            return find_model(model) / "config.json"
    except CheckpointError:
        return None
    cached = try_to_load_from_cache(model.source, "config.json", revision=model.revision)
    return Path(cached) if isinstance(cached, str) else find_shape(model.source)


def find_recipe_shape(model: ModelSection) -> Shape | None:
    """The shape of the recipe's model, where its config.json is here and describes one."""
    config = find_config(model)
    return read_shape(config) if config is not None else None


def cuda_of_torch() -> str | None:
    """The CUDA version that the installed torch was built for, such as 13.0, without importing it."""
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version = Path(spec.origin).with_name("version.py")
    found = _CUDA.search(version.read_text("utf-8")) if version.is_file() else None
    return f"{found[1]}.{found[2]}" if found else None


def driver_fault(driver: str | None, cuda: str | None) -> str:
    """Why the driver is too old for torch's CUDA; empty where it is not, or where nothing is known."""
    if driver is None or cuda is None:
        return ""
    least = MINIMUM_DRIVERS.get(int(cuda.split(".")[0]))
    if least is None or int(driver.split(".")[0]) >= least:
        return ""
    return f"driver {driver} is too old for CUDA {cuda}, which torch is built for; install driver {least} or newer"


def cards_of(gpus: Gpus, serve: ServeSection, *, is_served: bool = False) -> Cards:
    """The machine's GPUs as cards; what the run's own engine holds, while it `is_served`, counts as free."""
    own_gib = gpus.total_gib * serve.gpu_memory_utilization if is_served else 0.0
    free_gib = min(gpus.total_gib, gpus.free_gib + own_gib)
    return Cards(len(gpus.seen), gpus.total_gib, free_gib, serves=serves_here(serve))


def check_machine(recipe: Recipe, *, is_served: bool, gpus: Gpus | None = None) -> str:
    """See that serving and training can fit on this machine's GPUs; returns a warning where that is not sure, or nothing.

    Raises MachineError for what surely does not. Nothing is said without GPUs, where the model's shape is not known, or of
    what another machine does.
    """
    if is_bundled(recipe.model) or (shape := find_recipe_shape(recipe.model)) is None:
        return ""
    gpus = list_gpus() if gpus is None else gpus
    if not gpus.seen:
        return ""
    if fault := driver_fault(gpus.driver, cuda_of_torch()):
        raise MachineError(fault)
    cards = cards_of(gpus, recipe.serve, is_served=is_served)
    fit = find_fit(recipe, shape, cards)
    trains_here = recipe.train.worker == "local"
    is_too_large = trains_here and fit.training.judge(fit.left_gib) == "too_large"
    faults = [fit.serving_fault, fit.training_fault if trains_here else ""]
    message = "; ".join(filter(None, faults))
    if not message:
        return ""
    plan = make_plan(recipe, shape, cards)
    remedy = (
        f"it fits with {plan.flags}" if plan.fit.fits else f"`vcot doctor --recipe {recipe.name}` says what would fit"
    )
    if fit.serving_fault or is_too_large:
        raise MachineError(f"{message}; {remedy}")
    return f"{message}; {remedy}"
