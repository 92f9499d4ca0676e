"""What fits on the cards: vLLM while it serves, the training beside it, and the least change that makes both fit. Pure.

Model: on each card vLLM takes the share that serve.gpu_memory_utilization gives it: its part of the weights, what a step
computes with, CUDA graphs, and keys and values in all that is left; it starts only if those hold one request of
serve.max_model_len. A training gets what is free, less what the engine keeps meanwhile (serve.while_training). The gate and
the canary are not counted: they go to the machine's memory where a GPU has too little.

Changes are tried in this order, and those that turn out not to be needed are taken back, the last first:

    serving    a larger share; a shorter context, as long as every request still fits; one model over several cards
    training   the engine sleeps; fewer pairs at a time and more steps an update, so that an update sees as many; the engine
               stops; gradient checkpointing; weights spread over the cards (FSDP)
               -- up to here the result stays what it was, but for rounding; from here on it does not --
               shorter rows, so that pairs with long responses are left out; a base in 4 bits

Images are not made smaller: rows whose image would have fewer tokens than it was sampled with are refused.

Limits: all cards alike. Buffers of adapters that vLLM serves are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Literal

from vcot.services.engine.serve_section import ServeSection
from vcot.services.recipes.recipe import Recipe
from vcot.training.protocol.memory import BYTES, GIB, MemoryEstimate, estimate_memory
from vcot.training.protocol.shape import Shape

EngineState = Literal["kept", "asleep", "stopped"]
ASLEEP_GIB = 2.0
"""What a sleeping engine holds on each card: CUDA context, graphs and libraries (1 to 2 GiB in vLLM's own reports)."""
NON_TORCH_GIB = 1.3
"""Context and libraries of a serving engine, as vLLM's log had it for a 7B model on 80 GB (vllm #11743: 1.27)."""
ACTIVATION_GIB = 2.0
"""Peak of a step at a width of 4,096; the same log had 2.95 with larger steps. It grows with the width."""
GRAPHS_GIB = 0.7
"""CUDA graphs of a 7B model; vLLM logs what they took."""
MOST = 0.9
"""Largest share that is proposed: what is left is for the driver and for the allocator's blocks."""
PROMPT_TOKENS = 256
"""An allowance for question and instruction; the longest of 1,145 A-OKVQA prompts has 115 tokens, with template 130."""
_LENGTHS = (1536, 1280, 1024)
_MIN_RESPONSE = 256


@dataclass(frozen=True)
class Cards:
    """The GPUs of a machine, all alike."""

    num: int
    total_gib: float
    """Of one, as CUDA counts it."""
    free_gib: float
    """Of one, without an engine of the run's own."""
    serves: bool = True
    """Whether the run's servers are on them; those on a Ray cluster's nodes may be on other machines."""


@dataclass(frozen=True)
class ServingEstimate:
    """What vLLM has on one of its cards, in GiB."""

    share: float
    weights: float
    overhead: float
    kv_bytes_per_token: float
    max_model_len: int
    tensor_parallel: int

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values it can hold at once."""
        return max(0, int((self.share - self.weights - self.overhead) * GIB / self.kv_bytes_per_token))

    @property
    def summary(self) -> str:
        """For a person."""
        return (
            f"{self.share:.1f} GiB for vLLM (weights {self.weights:.1f}, its own {self.overhead:.1f}): "
            f"{self.kv_tokens:,} tokens at once"
        )


def longest_row(shape: Shape, recipe: Recipe) -> int:
    """Tokens of the longest row that can come up, image tokens included."""
    return min(recipe.train.max_length, _prompt_tokens(shape, recipe) + recipe.sample.max_tokens)


def _prompt_tokens(shape: Shape, recipe: Recipe) -> int:
    """Of the longest prompt, with as many images as a question may have."""
    return recipe.serve.max_images * shape.num_image_tokens(recipe.train.max_image_side) + PROMPT_TOKENS


def estimate_serving(shape: Shape, serve: ServeSection, total_gib: float) -> ServingEstimate:
    """What vLLM has on each of its cards of `total_gib`."""
    parallel, width = tensor_parallel(serve), BYTES[serve.dtype]
    return ServingEstimate(
        share=total_gib * serve.gpu_memory_utilization,
        weights=shape.num_parameters * width / parallel / GIB,
        overhead=NON_TORCH_GIB + GRAPHS_GIB + ACTIVATION_GIB * shape.decoder.hidden / 4096,
        kv_bytes_per_token=shape.kv_bytes_per_token(width) / parallel,
        max_model_len=serve.max_model_len,
        tensor_parallel=parallel,
    )


def tensor_parallel(serve: ServeSection) -> int:
    """Cards of one server; of the smallest, where they differ."""
    if serve.ray_address is not None:
        return max(1, serve.gpus_per_replica)
    return min((devices.count(",") + 1 for devices in serve.devices), default=1)


@dataclass(frozen=True)
class Fit:
    """One recipe on given cards."""

    serving: ServingEstimate
    training: MemoryEstimate
    left_gib: float
    """Of a card, for the training."""
    serving_fault: str
    """Why vLLM would not start; empty where it would."""

    @property
    def fits(self) -> bool:
        """Whether all of it surely fits."""
        return not self.serving_fault and self.training.judge(self.left_gib) == "fits"

    def is_as_good_as(self, other: Fit) -> bool:
        """Whether it serves and trains where the other does."""
        serves = not self.serving_fault or bool(other.serving_fault)
        return serves and (not self.training_fault or bool(other.training_fault))

    @property
    def training_fault(self) -> str:
        """Why the training may not fit, or does not; empty where it does."""
        match self.training.judge(self.left_gib):
            case "fits":
                return ""
            case "close":
                return f"the training may need {self.training.total:.1f} GiB, and {self.left_gib:.1f} GiB are left"
            case "too_large":
                return (
                    f"the training needs at least {self.training.least:.1f} GiB, and {self.left_gib:.1f} GiB are left"
                )


def engine_state(serve: ServeSection) -> EngineState:
    """What the run's engine does while it trains; one that is not the run's own is let be."""
    if serve.while_training == "auto":
        return "kept" if is_elsewhere(serve) else "asleep"
    states: dict[str, EngineState] = {"keep": "kept", "sleep": "asleep", "stop": "stopped"}
    return states[serve.while_training]


def is_elsewhere(serve: ServeSection) -> bool:
    """Whether others run the engine, so that nothing is known of its GPU."""
    return bool(serve.url or serve.upstreams)


def serves_here(serve: ServeSection) -> bool:
    """Whether this machine runs the engine."""
    return not is_elsewhere(serve) and serve.ray_address is None


def find_fit(recipe: Recipe, shape: Shape, cards: Cards) -> Fit:
    """How the recipe fits on the cards."""
    serving = estimate_serving(shape, recipe.serve, cards.total_gib)
    kept = {"kept": serving.share, "asleep": ASLEEP_GIB, "stopped": 0.0}[engine_state(recipe.serve)]
    is_served = _is_served_by(recipe.serve, cards)
    return Fit(
        serving=serving,
        training=estimate_memory(shape, recipe.train, longest_row(shape, recipe)),
        left_gib=cards.free_gib - (kept if is_served else 0.0),
        serving_fault=_serving_fault(recipe, serving, cards) if is_served else "",
    )


def _is_served_by(serve: ServeSection, cards: Cards) -> bool:
    return cards.serves and not is_elsewhere(serve)


def _serving_fault(recipe: Recipe, serving: ServingEstimate, cards: Cards) -> str:
    needed = max(recipe.serve.replicas, len(recipe.serve.devices)) * serving.tensor_parallel
    if recipe.serve.devices and needed > cards.num:
        return f"serve.devices names {needed} cards, and there are {cards.num}"
    if recipe.serve.ray_address is not None and needed > cards.num:
        return f"serve.replicas and serve.gpus_per_replica ask for {needed} cards, and there are {cards.num}"
    if serving.share > cards.free_gib:
        return (
            f"vLLM takes {serving.share:.1f} GiB (serve.gpu_memory_utilization = "
            f"{recipe.serve.gpu_memory_utilization:g}), and {cards.free_gib:.1f} GiB are free"
        )
    if serving.kv_tokens < serving.max_model_len:
        return (
            f"vLLM has {serving.share:.1f} GiB and needs {serving.weights + serving.overhead:.1f} besides keys and "
            f"values, so it holds {serving.kv_tokens:,} tokens, not serve.max_model_len = {serving.max_model_len:,}"
        )
    return ""


@dataclass(frozen=True)
class MemoryPlan:
    """A recipe for given cards, and how it fits."""

    recipe: Recipe
    flags: str
    """The changes, as `--set` takes them; empty where there are none."""
    fit: Fit

    @property
    def fault(self) -> str:
        """Why it does not fit; empty where it does."""
        return "; ".join(filter(None, (self.fit.serving_fault, self.fit.training_fault)))


Step = Callable[[Recipe], Recipe]
"""A change of the recipe; the same recipe where it changes nothing."""


def make_plan(recipe: Recipe, shape: Shape, cards: Cards) -> MemoryPlan:
    """The least change of `recipe`, in the order above, with which it fits on the cards, all of which it then uses."""
    start = _spread(recipe, cards)
    steps: list[Step] = []

    def result(chosen: Sequence[Step]) -> Recipe:
        return reduce(lambda changed, step: step(changed), chosen, start)

    def fit(chosen: Sequence[Step]) -> Fit:
        return find_fit(result(chosen), shape, cards)

    for step in _serving_steps(shape, cards):
        if fit(steps).serving_fault:
            steps.append(step)
    for step in _training_steps(shape, cards.num):
        if fit(steps).training_fault:
            steps.append(step)
    for place in reversed(range(len(steps))):
        without = steps[:place] + steps[place + 1 :]
        steps = without if fit(without).is_as_good_as(fit(steps)) else steps
    changed = _use_freed(result(steps), cards)
    return MemoryPlan(changed, render_flags(recipe, changed), find_fit(changed, shape, cards))


def _set(recipe: Recipe, section: Literal["serve", "train"], **changes: object) -> Recipe:
    """The recipe with some fields of one section changed, and checked anew."""
    tree = recipe.model_dump()
    return Recipe.model_validate(tree | {section: tree[section] | changes})


def _spread(recipe: Recipe, cards: Cards) -> Recipe:
    """Served and trained on all cards; an update sees as many pairs as before. What the recipe spreads itself stays so."""
    num_cards, train = cards.num, recipe.train
    if num_cards > 1 and _is_served_by(recipe.serve, cards) and not _is_placed(recipe.serve):
        recipe = _place(recipe, 1, num_cards)
    pairs = train.batch_size * train.gradient_accumulation
    if num_cards > 1 and train.num_processes == 1 and pairs % num_cards == 0:
        each = pairs // num_cards
        batch = max(size for size in range(1, train.batch_size + 1) if each % size == 0)
        recipe = _set(recipe, "train", num_processes=num_cards, batch_size=batch, gradient_accumulation=each // batch)
    return recipe


def _is_placed(serve: ServeSection) -> bool:
    """Whether the recipe says itself on how many cards its servers are."""
    on_nodes = serve.ray_address is not None
    return bool(serve.devices) or (on_nodes and (serve.replicas, serve.gpus_per_replica) != (1, 1))


def _place(recipe: Recipe, parallel: int, num_cards: int) -> Recipe:
    """Each server over `parallel` cards, and as many servers as there are cards for; what is left of them serves nothing."""
    if recipe.serve.ray_address is not None:
        return _set(recipe, "serve", replicas=num_cards // parallel, gpus_per_replica=parallel)
    groups = tuple(
        ",".join(str(card) for card in range(first, first + parallel))
        for first in range(0, num_cards - parallel + 1, parallel)
    )
    return _set(recipe, "serve", devices=groups, replicas=len(groups))


def _serving_steps(shape: Shape, cards: Cards) -> Iterator[Step]:
    yield lambda recipe: _set(recipe, "serve", gpu_memory_utilization=_share(cards))
    yield lambda recipe: _set(recipe, "serve", max_model_len=_context(recipe, shape))
    parallel = 2
    while parallel <= cards.num:
        yield partial(_place, parallel=parallel, num_cards=cards.num)
        parallel *= 2


def _share(cards: Cards) -> float:
    return min(MOST, int(100 * cards.free_gib / cards.total_gib) / 100)


def _context(recipe: Recipe, shape: Shape) -> int:
    """The shortest context, in steps of 256, that every request of the recipe fits."""
    longest = _prompt_tokens(shape, recipe) + max(recipe.sample.max_tokens, recipe.eval.max_tokens)
    return min(recipe.serve.max_model_len, -(-longest // 256) * 256)


def _training_steps(shape: Shape, num_cards: int) -> Iterator[Step]:
    yield lambda recipe: _set(recipe, "serve", while_training="sleep")
    for _ in range(8):
        yield _divide_batch
    yield lambda recipe: _set(recipe, "serve", while_training="stop")
    yield lambda recipe: _set(recipe, "train", gradient_checkpointing=True)
    if num_cards > 1:
        yield _shard
    yield from (_limit_rows(length, shape) for length in _LENGTHS)
    yield _quantize


def _divide_batch(recipe: Recipe) -> Recipe:
    """Fewer pairs at a time, by the smallest factor, and as many in an update."""
    train = recipe.train
    factor = next((factor for factor in range(2, train.batch_size + 1) if train.batch_size % factor == 0), 1)
    return _set(
        recipe,
        "train",
        batch_size=train.batch_size // factor,
        gradient_accumulation=train.gradient_accumulation * factor,
    )


def _shard(recipe: Recipe) -> Recipe:
    """Weights spread over the cards, but for a base in 4 bits, which cannot be."""
    return recipe if recipe.train.base_weights == "nf4" else _set(recipe, "train", accelerate_config="fsdp")


def _limit_rows(length: int, shape: Shape) -> Step:
    """Rows of at most `length` tokens, where a response of some length still has room."""

    def limit(recipe: Recipe) -> Recipe:
        least = _prompt_tokens(shape, recipe) + _MIN_RESPONSE
        return _set(recipe, "train", max_length=min(recipe.train.max_length, max(length, least)))

    return limit


def _quantize(recipe: Recipe) -> Recipe:
    """The base in 4 bits, on each card whole: such weights cannot be spread."""
    spread = recipe.train.accelerate_config in ("fsdp", "zero3")
    return _set(
        recipe, "train", base_weights="nf4", accelerate_config="ddp" if spread else recipe.train.accelerate_config
    )


def _use_freed(recipe: Recipe, cards: Cards) -> Recipe:
    """The engine's share raised where it gives all of it back for the training: more requests at once, at no cost."""
    is_kept = engine_state(recipe.serve) == "kept" or not _is_served_by(recipe.serve, cards)
    if is_kept or recipe.serve.gpu_memory_utilization >= _share(cards):
        return recipe
    return _set(recipe, "serve", gpu_memory_utilization=_share(cards))


def render_flags(before: Recipe, after: Recipe) -> str:
    """`after`'s differences from `before`, as `--set` takes them; empty where there are none."""
    words = [
        f"{section}.{name}={_word(value)}"
        for section in ("serve", "train")
        for name, value in getattr(after, section)
        if value != getattr(getattr(before, section), name)
    ]
    return " ".join(["--set", *words]) if words else ""


def _word(value: object) -> str:
    """As a shell takes it."""
    if isinstance(value, tuple):
        return "'[" + ", ".join(f'"{item}"' for item in value) + "]'"
    return str(value).lower() if isinstance(value, bool) else str(value)
