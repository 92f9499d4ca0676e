"""The model card of what a job made: `README.md` beside an adapter or a checkpoint, which is no part of its digest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from training.job import MergeReport, TrainJob

CARD = "README.md"
_SHOWN = (
    "beta",
    "losses",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "learning_rate",
    "epochs",
    "batch_size",
    "gradient_accumulation",
    "num_processes",
    "dtype",
    "base_weights",
    "seed",
)
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

Made by vcot. How good it is says the report of the run that made it. Licence and limits are the base's.
"""
_LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{here}")"""
_LOAD_MERGED = """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{here}", dtype="auto")
processor = AutoProcessor.from_pretrained("{here}")"""
_HERE = "THIS_FOLDER"


def write_adapter_card(job: TrainJob, directory: Path) -> None:
    """Write the card of the job's trained adapter."""
    _write(job, directory, "peft", f"{job.checkpoint_name}, the adapter", {}, _LOAD_ADAPTER)


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


def _write(job: TrainJob, directory: Path, library: str, title: str, measured: Mapping[str, Any], load: str) -> None:
    method = {"dpo": "DPO", "mdpo": "mDPO"}[job.train.method]
    hub = find_hub_id(Path(job.base_path))
    data = ModelCardData(
        base_model=hub[0] if hub else None,
        library_name=library,
        pipeline_tag="image-text-to-text",
        tags=["vcot", "trl", job.train.method, "lora"],
    )
    settings = {name: getattr(job.train, name) for name in _SHOWN}
    facts = {
        "base": f"{hub[0]} at {hub[1]}" if hub else job.base.name,
        "base's digest": job.base.digest,
        "method": f"{method} with LoRA, by TRL",
        "preference pairs": job.pairs_digest,
        **({"reference": job.reference.digest} if job.reference else {}),
        **({"round": job.round} if job.round > 1 else {}),
        **measured,
        **{
            f"train.{name}": ", ".join(value) if isinstance(value, tuple) else value for name, value in settings.items()
        },
    }
    text = _TEXT.format(
        data=data.to_yaml(),
        title=title,
        what=f"{job.base.name}, taught by {method} from preference pairs about images.",
        rows="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        load=load.format(base=hub[0] if hub else "BASE", here=_HERE),
    )
    ModelCard(text).save(directory / CARD)
