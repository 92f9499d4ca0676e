"""A small LLaVA and a small Qwen3-VL with random weights in the hubs' layout, and nano pairs as the pipeline writes them."""

from __future__ import annotations

import asyncio
import importlib.abc
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.hurried import HurriedLoop
from vcot.pipeline.files import write_record
from vcot.pipeline.identity import compute_digest
from vcot.pipeline.images import ImageStore
from vcot.pipeline.pairs import PreferencePair
from vcot.pipeline.prompts import render_prompt
from vcot.pipeline.publish import pairs_digest, publish_pairs
from vcot.pipeline.records import CheckpointRef
from vcot.pipeline.sources.nano.questions import generate_nano, render_target
from vcot.services.recipes.recipe import load_recipe
from vcot.training.protocol.job import JOB, TrainJob, digest_losses

CORPUS = ("The circle is red. The square is blue. So the answer is (A) red.", "USER: ASSISTANT:", "user\nassistant\n")


class _NotInstalled(importlib.abc.MetaPathFinder):
    """Hides the repository's folders, which are packages of their own here and nowhere else: a wheel has `vcot` alone."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname in ("eval", "pipeline", "services", "training"):
            raise ModuleNotFoundError(f"where vcot is installed there is no {fullname}; it is vcot.{fullname}")


sys.meta_path.insert(0, _NotInstalled())
settings.register_profile("vcot", deadline=None)  # on a busy machine any example may take long
settings.load_profile("vcot")


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Which event loop an asynchronous test runs on."""
    return {"loop": HurriedLoop if item.get_closest_marker("hurried") else asyncio.new_event_loop}


def save_tiny(architecture: Any, directory: Path) -> Path:
    import torch

    from vcot.training.nano.architecture import build_tokenizer

    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = build_tokenizer(CORPUS, architecture.tokens)
    model = architecture.build_model(tokenizer, width=32, num_layers=2)
    architecture.save(model, architecture.build_processor(tokenizer), directory)
    return directory


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vcot.training.nano.llava import Llava

    return save_tiny(Llava(), tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def qwen_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vcot.training.nano.qwen import Qwen

    return save_tiny(Qwen(), tmp_path_factory.mktemp("checkpoint") / "tiny-qwen")


@pytest.fixture
def stock_template() -> str:
    """What llava-hf/llava-1.5-7b-hf ships: neither BOS nor EOS."""
    return (
        "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )


@pytest.fixture
def processor(checkpoint: Path):
    """The small checkpoint's, loaded anew: a test may change it."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def pairs_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], tuple[Path, str]]:
    """Makes `num_train` and `num_validation` pairs; returns their directory and digest."""

    def make(num_train: int, num_validation: int) -> tuple[Path, str]:
        root = tmp_path_factory.mktemp("run")
        store = ImageStore(root)
        train, validation = make_pairs(store, num_train, 0), make_pairs(store, num_validation, 1)
        publish_pairs(train, validation, store, root / "pairs", card=lambda _: "")
        return root / "pairs", pairs_digest(train, validation)

    return make


def make_pairs(store: ImageStore, count: int, seed: int) -> list[PreferencePair]:
    tasks = list(generate_nano("train", count + 1, seed, store))
    return [
        PreferencePair(
            task=task.id,
            images=task.images,
            prompt=render_prompt("thought_specific", task),
            chosen=render_target(task, "thought_specific"),
            rejected=render_target(other, "thought_specific") + " no",
            chosen_key=f"{task.id}/0",
            rejected_key=f"{task.id}/1",
            chosen_score=1.0,
            rejected_score=0.0,
            judge="verifier/1",
            policy="sha256:0",
        )
        for task, other in itertools.pairwise(tasks)
    ]


@pytest.fixture(scope="session")
def pairs_in() -> Callable[[ImageStore, int, int], list[PreferencePair]]:
    """Makes pairs whose images are in a store, by number and seed."""
    return make_pairs


@pytest.fixture(scope="session")
def make_job(
    checkpoint: Path, pairs_of: Callable[[int, int], tuple[Path, str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Submits a job for a tiny checkpoint (the LLaVA, unless `base` is another); returns its directory."""
    made: dict[tuple[int, int], tuple[Path, str]] = {}

    def make(*overrides: str, num_train: int = 10, num_validation: int = 4, base: Path = checkpoint) -> Path:
        size = (num_train, num_validation)
        made[size] = made.get(size) or pairs_of(*size)
        recipe = load_recipe("nano", ["train.num_evaluations=2", "train.batch_size=4", *overrides])
        job = TrainJob(
            base=CheckpointRef(name="base", digest=compute_digest(base), kind="base"),
            base_path=str(base),
            pairs_path=str(made[size][0]),
            pairs_digest=made[size][1],
            train=recipe.train,
            loss_sources=digest_losses(recipe.train),
            merge=recipe.merge,
        )
        directory = tmp_path_factory.mktemp("job")
        write_record(directory / JOB, job)
        return directory

    return make
