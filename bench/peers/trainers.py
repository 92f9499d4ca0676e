"""Four trainers of one adapter on the same pairs: how each is started, and what it leaves on disk."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq

from bench.engine import NANO
from bench.peers.ways import HERE
from vcot.training.protocol.train_sections import TrainSection

RUN = "run"
"""Of the data: vcot's run, whose pairs the others read."""
TARGETS = r".*language_model.*_proj"
"""The linear layers of nano's language model, for those that are told a pattern."""
STATE, WEIGHTS = "trainer_state.json", "adapter_model.safetensors"
_PROGRESS = f"{RUN}/training/*/progress.jsonl"
_INFO = {
    "pairs": {
        "file_name": "llamafactory.json",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {name: name for name in ("chosen", "rejected", "images")} | {"messages": "conversations"},
    }
}


@dataclass(frozen=True)
class Training:
    """What every trainer is told."""

    recipe: TrainSection
    save_steps: int
    """Of those that save by steps; vcot goes by the clock."""
    data: Path
    """What `write_pairs` wrote, beside vcot's run."""
    out: Path


@dataclass(frozen=True)
class Trainer:
    """One of them."""

    command: Callable[[Training], list[str]]
    """The same command begins and goes on, but for an option that names where."""
    log: str
    """The file in `out` that gets a line of JSON for each step."""
    read_step: Callable[[Mapping[str, Any]], int | None]
    """Of a line, None where it is of something else."""
    adapter: str
    """Its weights in `out`, once all is done."""
    read_margins: Callable[[Path], list[float]]
    """The reward margin of each step, from `out`, once all is done."""


def find_pairs(data: Path) -> Path:
    """The published pairs of vcot's run."""
    (path,) = (data / RUN / "pairs").glob("*/train.parquet")
    return path


def write_pairs(data: Path) -> None:
    """The published pairs in the words of ms-swift and LLaMA-Factory.

    Both tokenize a response apart from its prompt, so that it begins with the space that nano's words have.
    """
    images = data / "images"
    images.mkdir()
    swift, factory = [], []
    for row in pq.read_table(find_pairs(data)).to_pylist():
        (image,) = row["images"]
        path = images / image["path"]
        path.write_bytes(image["bytes"])
        prompt, chosen, rejected = (row[name][0]["content"][-1]["text"] for name in ("prompt", "chosen", "rejected"))
        turns = [{"role": "user", "content": f"<image>{prompt}"}, {"role": "assistant", "content": f" {chosen}"}]
        swift.append({"messages": turns, "rejected_response": f" {rejected}", "images": [str(path)]})
        answers = {"chosen": chosen, "rejected": rejected}
        told = {name: {"from": "gpt", "value": f" {text}"} for name, text in answers.items()}
        question = {"from": "human", "value": f"<image>\n{prompt}"}
        factory.append({"conversations": [question], "images": [str(path)]} | told)
    (data / "swift.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in swift))
    (data / "llamafactory.json").write_bytes(orjson.dumps(factory))
    (data / "dataset_info.json").write_bytes(orjson.dumps(_INFO))


def train_vcot(training: Training) -> list[str]:
    """`vcot train` in a copy of the run, whose recipe is kept in it."""
    if not (training.out / RUN).exists():
        shutil.copytree(training.data / RUN, training.out / RUN)
    return [str(Path(sys.executable).parent / "vcot"), "train", "--run", str(training.out / RUN)]


def train_trl(training: Training) -> list[str]:
    """train_trl.py, by our own environment."""
    given, lora = training.out / "settings.json", _lora(training.recipe)
    asked = {"beta": training.recipe.beta, "max_length": None, "disable_dropout": False, "bf16": False}
    settings = {
        "out": str(training.out),
        "model": str(NANO),
        "pairs": str(find_pairs(training.data)),
        "arguments": _arguments(training) | asked,
        "lora": {"r": lora.pop("lora_rank"), "target_modules": TARGETS} | lora,
    }
    given.write_text(json.dumps(settings))
    return [sys.executable, str(HERE / "train_trl.py"), str(given)]


def train_swift(training: Training) -> list[str]:
    """`swift rlhf`; without `check_model` it would ask its hub about the model, five times."""
    asked = _arguments(training) | _lora(training.recipe)
    asked |= {"beta": training.recipe.beta, "target_modules": "all-linear", "tuner_type": "lora", "add_version": False}
    asked |= {"torch_dtype": "float32", "adam_beta2": 0.999, "warmup_ratio": 0, "check_model": False}
    asked |= {"model": NANO, "model_type": "llava1_5_hf", "template": "nano", "split_dataset_ratio": 0}
    asked |= {"custom_register_path": HERE / "template_swift.py", "dataset": training.data / "swift.jsonl"}
    asked |= {"max_length": training.recipe.max_length, "output_dir": training.out}
    if saved := find_checkpoints(training.out):
        asked |= {"resume_from_checkpoint": saved[-1]}
    return [str(HERE / ".venv-swift/bin/swift"), "rlhf", "--rlhf_type", "dpo", *_flags(asked)]


def train_llamafactory(training: Training) -> list[str]:
    """`llamafactory-cli train`, which goes on by itself where its folder holds a checkpoint."""
    asked = _arguments(training) | _lora(training.recipe)
    asked |= {
        "pref_beta": training.recipe.beta,
        "pref_loss": "sigmoid",
        "lora_target": "all",
        "finetuning_type": "lora",
    }
    asked |= {"disable_gradient_checkpointing": True, "bf16": False, "cutoff_len": training.recipe.max_length}
    asked |= {"model_name_or_path": NANO, "template": "llava", "default_system": "<s>"}  # it writes no BOS of its own
    asked |= {"dataset_dir": training.data, "dataset": "pairs", "output_dir": training.out}
    del asked["gradient_checkpointing"]
    command = [str(HERE / ".venv-llamafactory/bin/llamafactory-cli"), "train", "--stage", "dpo", "--do_train"]
    return [*command, *_flags(asked)]


def _arguments(training: Training) -> dict[str, Any]:
    """What the transformers library calls the recipe's settings."""
    recipe = training.recipe
    return {
        "num_train_epochs": recipe.epochs,
        "per_device_train_batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.schedule,
        "weight_decay": 0.0,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "gradient_accumulation_steps": recipe.gradient_accumulation,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "eval_strategy": "no",
        "save_steps": training.save_steps,
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": "none",
    }


def _lora(recipe: TrainSection) -> dict[str, Any]:
    return {"lora_rank": recipe.lora_r, "lora_alpha": recipe.lora_alpha, "lora_dropout": recipe.lora_dropout}


def _flags(asked: Mapping[str, object]) -> list[str]:
    return [word for name, value in asked.items() for word in (f"--{name}", str(value))]


def find_checkpoints(out: Path) -> list[Path]:
    """What the transformers library has saved whole, by step; it writes the state last."""
    found = [path.parent for path in out.rglob(f"checkpoint-*/{STATE}")]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """After which it was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def _read_vcot(line: Mapping[str, Any]) -> int | None:
    return line["step"] if line["kind"] == "train" else None


def _read_swift(line: Mapping[str, Any]) -> int | None:
    return int(line["global_step/max_steps"].partition("/")[0]) if "loss" in line else None


def _margins_of_vcot(out: Path) -> list[float]:
    (path,) = out.glob(_PROGRESS)
    lines = map(orjson.loads, path.read_bytes().splitlines())
    return [line["reward_margin"] for line in lines if line["kind"] == "train"]


def _margins_of_state(out: Path) -> list[float]:
    lines = orjson.loads((find_checkpoints(out)[-1] / STATE).read_bytes())["log_history"]
    return [line["rewards/margins"] for line in lines if "rewards/margins" in line]


TRAINERS = {
    "vcot": Trainer(
        train_vcot,
        log=_PROGRESS,
        read_step=_read_vcot,
        adapter=f"{RUN}/training/*/adapter/{WEIGHTS}",
        read_margins=_margins_of_vcot,
    ),
    "trl": Trainer(
        train_trl,
        log="log.jsonl",
        read_step=lambda line: line["step"] if "loss" in line else None,
        adapter=WEIGHTS,
        read_margins=_margins_of_state,
    ),
    "swift": Trainer(
        train_swift,
        log="logging.jsonl",
        read_step=_read_swift,
        adapter=f"last-checkpoint/{WEIGHTS}",
        read_margins=_margins_of_state,
    ),
    "llamafactory": Trainer(
        train_llamafactory,
        log="trainer_log.jsonl",
        read_step=lambda line: line["current_steps"] if "loss" in line else None,
        adapter=WEIGHTS,
        read_margins=_margins_of_state,
    ),
}
