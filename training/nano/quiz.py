"""How well a nano model answers: samples through its own processor and chat template, as TRL and vLLM do."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from vcot.pipeline.prompts import render_prompt
from vcot.pipeline.records import ImageRef, PromptName, Split, Task
from vcot.pipeline.sources.nano.questions import FAMILIES, build_task, make_question
from vcot.pipeline.sources.nano.scene import IMAGE_SIZE, draw_scene
from vcot.training.model.loading import Model
from vcot.training.model.template import Processor

_ANSWER = re.compile(r"The answer is \(?([A-Z])\)?")


@dataclass(frozen=True)
class Example:
    """A nano task with its drawing in memory."""

    task: Task
    image: Image.Image


def draw_examples(split: Split, num_examples: int, seed: int) -> list[Example]:
    """Families in turn, all from one split."""
    rng = random.Random(f"examples/{split}/{seed}")
    examples = []
    for i in range(num_examples):
        question = make_question(rng, FAMILIES[i % len(FAMILIES)], split)
        ref = ImageRef(sha256=f"{split}/{seed}/{i}", path="", width=IMAGE_SIZE, height=IMAGE_SIZE)
        examples.append(Example(build_task(question, ref, split), draw_scene(question.scene, rng)))
    return examples


@torch.no_grad()
def sample_responses(
    model: Model,
    processor: Processor,
    examples: Sequence[Example],
    prompt: PromptName,
    *,
    temperature: float,
    n: int = 1,
    max_tokens: int = 64,
    batch_size: int = 64,
) -> list[list[str]]:
    """`n` response texts per example, drawn with torch's global generator; greedy at temperature 0 (then n is 1)."""
    texts: list[list[str]] = []
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    for start in range(0, len(examples), batch_size):
        chunk = examples[start : start + batch_size]
        turns = [
            processor.apply_chat_template(_user_message(render_prompt(prompt, e.task)), add_generation_prompt=True)
            for e in chunk
        ]
        images = [[e.image] for e in chunk]
        inputs = processor(text=turns, images=images, padding=True, return_tensors="pt", add_special_tokens=False)
        output = model.generate(**inputs, **sampling, max_new_tokens=max_tokens, num_return_sequences=n)
        decoded = processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        texts += [decoded[i * n : (i + 1) * n] for i in range(len(chunk))]
    return texts


def _user_message(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def measure_accuracy(examples: Sequence[Example], texts: Sequence[Sequence[str]]) -> dict[str, float]:
    """Share of right answers by family, and under `all`; and `format`: the share with an answer that can be parsed."""
    values: dict[str, list[bool]] = {}
    for example, group in zip(examples, texts, strict=True):
        for text in group:
            right = _is_right(text, example.task)
            values.setdefault(example.task.family, []).append(right)
            values.setdefault("all", []).append(right)
            values.setdefault("format", []).append(_ANSWER.search(text) is not None)
    return {name: sum(shares) / len(shares) for name, shares in values.items()}


@dataclass(frozen=True)
class Measurement:
    """What the card reports: accuracy by prompt and family, and how the k responses to one task differ."""

    num_tasks: int
    temperature: float
    accuracy: dict[PromptName, dict[str, float]]
    group_temperature: float
    group_size: int
    num_groups: int
    mixed_answers: float
    """Share of groups with right and wrong answers."""
    mixed_statements: float
    """Share of groups whose responses differ in how many of their statements are true."""
    true_statements: float
    """Share of all statements in the groups' thoughts that are true."""


def share_of_true_statements(thought: str, task: Task) -> float:
    """Of the sentences of `thought`, those that stand in the task's facts; 0 for an empty thought."""
    sentences = [f"{sentence.strip()}." for sentence in thought.split(".") if sentence.strip()]
    return sum(sentence in task.facts for sentence in sentences) / len(sentences) if sentences else 0.0


def measure_nano(model: Model, processor: Processor, num_tasks: int) -> Measurement:
    """On held-out (validation) tasks: one response at 0.4 under three prompts, groups of 8 at 0.5 with a thought."""
    torch.manual_seed(0)
    examples = draw_examples("validation", num_tasks, seed=0)
    accuracy: dict[PromptName, dict[str, float]] = {}
    prompts: tuple[PromptName, ...] = ("zero_shot", "cot", "thought_specific")
    for prompt in prompts:
        texts = sample_responses(model, processor, examples, prompt, temperature=0.4)
        accuracy[prompt] = measure_accuracy(examples, texts)
    grouped = examples[: max(1, num_tasks // 3)]
    groups = sample_responses(model, processor, grouped, "thought_specific", temperature=0.5, n=8, batch_size=16)
    right = [[_is_right(text, e.task) for text in group] for e, group in zip(grouped, groups, strict=True)]
    true = [
        [share_of_true_statements(text.partition("<R>")[0], e.task) for text in group]
        for e, group in zip(grouped, groups, strict=True)
    ]
    return Measurement(
        num_tasks=num_tasks,
        temperature=0.4,
        accuracy=accuracy,
        group_temperature=0.5,
        group_size=8,
        num_groups=len(groups),
        mixed_answers=sum(len(set(group)) > 1 for group in right) / len(right),
        mixed_statements=sum(len(set(group)) > 1 for group in true) / len(true),
        true_statements=sum(map(sum, true)) / sum(map(len, true)),
    )


def _is_right(text: str, task: Task) -> bool:
    match = _ANSWER.search(text)
    return match is not None and match.group(1) == task.answer_letter
