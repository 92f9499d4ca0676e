"""The model card of what a job made: `README.md` beside an adapter or a checkpoint, which is no part of its digest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

from vcot.pipeline.markdown import plain
from vcot.training.protocol.job import MergeReport, TrainJob

CARD = "README.md"
_SHOWN = (
    "beta",
    "losses",
    "loss_weights",
    "label_smoothing",
    "corruption",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "learning_rate",
    "schedule",
    "epochs",
    "batch_size",
    "gradient_accumulation",
    "max_image_side",
    "num_processes",
    "dtype",
    "base_weights",
    "seed",
)
_LICENCE = ("license", "license_name", "license_link")
_TEXT = """---
{data}
---

# {title}

{what}

| | |
|---|---|
{rows}

## How to load it

```python
{load}
```

{names}## What is not known here

Whether it answers better than its base. That the training went well (a lower loss, a larger margin) does not say so: a
checkpoint is compared with its base on held-out questions, and the report of the run that made it has the differences with
their intervals. Limits and biases are the base's, and the judge's preferences come on top of them. The licence is the
base's{licence}.

Made by vcot.
"""
_LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{here}")"""
_NAMES = """Its tensors are named as transformers 5 names the modules. Older versions leave out what they name otherwise; for
them, `vcot merge --adapter` makes one under the names of the base's files.

"""
_LOAD_MERGED = """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{here}", dtype="auto")
processor = AutoProcessor.from_pretrained("{here}")"""
_HERE = "THIS_FOLDER"


def write_adapter_card(job: TrainJob, directory: Path) -> None:
    """Write the card of the job's trained adapter."""
    _write(job, directory, "peft", f"{job.checkpoint_name}, the adapter", {}, _LOAD_ADAPTER, _NAMES)


def write_checkpoint_card(job: TrainJob, report: MergeReport, directory: Path) -> None:
    """Write the card of the job's checkpoint, merged or an adapter alone."""
    kept = report.retention
    measured = {
        "digest": report.checkpoint.digest,
        "weights": report.dtype,
        "reward margin kept": f"{kept.kept:.1%} of {kept.before:.4f} nats, held in {report.held} (error {kept.error:.1%})",
    }
    is_merged = report.checkpoint.kind == "merged"
    kind, load = ("transformers", _LOAD_MERGED) if is_merged else ("peft", _LOAD_ADAPTER)
    _write(job, directory, kind, report.checkpoint.name, measured, load)


def find_hub_id(directory: Path) -> tuple[str, str] | None:
    """The model id and the revision of a snapshot in the hub's cache; None for any other directory."""
    folder, snapshots, revision = ("", "", *directory.parts)[-3:]
    if snapshots != "snapshots" or not folder.startswith("models--"):
        return None
    return folder.removeprefix("models--").replace("--", "/", 1), revision


def _read_card(directory: Path) -> dict[str, Any]:
    """The metadata of the card that lies there; none where it has none that can be read."""
    try:
        return dict(metadata_load(directory / CARD) or {})
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _write(
    job: TrainJob, directory: Path, library: str, title: str, measured: Mapping[str, Any], load: str, names: str = ""
) -> None:
    method = {"dpo": "DPO", "mdpo": "mDPO"}[job.train.method]
    hub = find_hub_id(Path(job.base_path))
    base, pairs = _read_card(Path(job.base_path)), _read_card(Path(job.pairs_path))
    licence = {name: base[name] for name in _LICENCE if isinstance(base.get(name), str)}
    data = ModelCardData(
        base_model=hub[0] if hub else None,
        **({"license": "unknown"} | licence),
        datasets=pairs.get("source_datasets"),
        library_name=library,
        pipeline_tag="image-text-to-text",
        tags=["vcot", "trl", job.train.method, "lora"],
    )
    used = [name for name in _SHOWN if name != "corruption" or job.train.method == "mdpo"]
    settings = {name: getattr(job.train, name) for name in used}
    facts = {
        "base": f"{hub[0]} at {hub[1]}" if hub else plain(job.base.name),
        "base's digest": job.base.digest,
        "method": f"{method} with LoRA, by TRL",
        "preference pairs": job.pairs_digest,
        **({"reference": job.reference.digest} if job.reference else {}),
        **({"round": job.round} if job.round > 1 else {}),
        **measured,
        **{
            f"train.{name}": (", ".join(map(str, value)) or "1 each") if isinstance(value, tuple) else value
            for name, value in settings.items()
        },
    }
    text = _TEXT.format(
        data=data.to_yaml(),
        title=plain(title),
        licence="" if "license" in licence else ", which its files here do not say",
        what=f"{plain(job.base.name)}, trained by {method} on preference pairs about images.",
        rows="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        names=names,
        load=load.format(base=hub[0] if hub else "BASE", here=_HERE),
    )
    ModelCard(text).save(directory / CARD)
