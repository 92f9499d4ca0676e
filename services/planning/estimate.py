"""What a run will take, for a recipe and a kind of card: hours, tokens, dollars and disk, before anything is begun. Pure.

Model: each step is counted (requests, tokens, floating-point operations, bytes) and divided by what the hardware or the
provider gives. What is assumed stands in services/planning/assumptions.py; a `Span` carries three cases through the sums,
so that a figure never stands without its range.

    sampling      a decoding step reads the weights once and each sequence's keys and values; the prompt's part is arithmetic
    judging       calls in flight, or the provider's tokens a minute, whichever is slower
    training      6 x parameters x tokens with gradient checkpointing (forward, forward again, gradients of activations; LoRA
                  needs none of the weights'), 4 x without; the reference's log-probs and the validations are forwards, 2 x
    merging       the weights are read and written several times, and asked in float32, streamed past the GPU
    image gains   the prompt's part alone, twice for each response that may be chosen, and once for each task
    evaluation    as sampling; how likely options are is the prompt's part alone, for each option and image

Limits: an estimate. No GPU has confirmed it, how long a model's thoughts are is a guess, and prices move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vcot.eval.benchmark import find_benchmark
from vcot.eval.eval_section import EvalSection
from vcot.pipeline.judges import count_requests
from vcot.pipeline.option_scores import OPTION_PROMPT
from vcot.pipeline.pairs import needs_gains
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources.source import NO_FILTER, SOURCES, list_parts
from vcot.services.planning.assumptions import (
    CANDIDATE_SHARE,
    CHECKPOINTS_KEPT,
    DECODE_EFFICIENCY,
    DISK_BYTES_S,
    DOWNLOAD_BYTES_S,
    ENGINE_START_S,
    GATE_FORWARDS,
    JUDGMENT_BYTES,
    MAX_SEQUENCES,
    NF4_EFFICIENCY,
    OPTIONS,
    PAIR_SHARE,
    PARALLEL_EFFICIENCY,
    PREFILL_EFFICIENCY,
    RESPONSE_BYTES,
    STEP_OVERHEAD_S,
    STREAM_BYTES_S,
    THOUGHT_TOKENS,
    TRAIN_EFFICIENCY,
    WEIGHT_PASSES,
    CardKind,
    Span,
)
from vcot.services.planning.capacity import Cards, MemoryPlan, engine_state, make_plan
from vcot.services.planning.judge_estimate import (
    JudgeEstimate,
    estimate_grading,
    estimate_judge,
    estimate_requests,
    judge_hours,
)
from vcot.services.planning.workload import Workload
from vcot.services.recipes.recipe import Recipe
from vcot.training.protocol.memory import BYTES, GIB
from vcot.training.protocol.shape import Shape


@dataclass(frozen=True)
class StageEstimate:
    """One step of the run."""

    name: str
    what: str
    hours: Span


@dataclass(frozen=True)
class RunEstimate:
    """A whole run on given cards."""

    plan: MemoryPlan
    stages: tuple[StageEstimate, ...]
    tokens_per_s: float
    """That sampling is likely to draw, over all cards."""

    @property
    def hours(self) -> Span:
        """All stages."""
        total = Span(0, 0, 0)
        for stage in self.stages:
            total += stage.hours
        return total


@dataclass(frozen=True)
class Counts:
    """How much of everything the recipe asks for."""

    num_tasks: int
    num_responses: int
    num_pairs: Span
    num_eval_tasks: int
    num_validation_tasks: int
    """By which one of several rounds is chosen; 0 of one round."""
    num_asked: int
    """Questions that an evaluation asks of its checkpoints: the evaluation's of base and policy, and those of the validation
    of the base and of each round's policy.
    """
    num_answers: int
    """Responses of a checkpoint to one question of an evaluation."""
    num_option_requests: int
    """How often an evaluation asks how likely an option is."""

    @property
    def num_eval_responses(self) -> int:
        """Of all checkpoints."""
        return self.num_asked * self.num_answers

    @property
    def num_judgments(self) -> int:
        """At most: one for each response, and responses to a task that say the same are judged once."""
        return self.num_responses


def count_work(recipe: Recipe) -> Counts | None:
    """What the recipe asks for in all its rounds; None where a data set's size is not known here."""
    benchmark = find_benchmark(recipe.eval)
    rounds, section = recipe.rounds.num, recipe.eval
    num_tasks, num_eval_tasks = count_tasks(recipe.tasks), count_tasks(benchmark.tasks(section, section.split))
    num_validation_tasks = count_tasks(benchmark.tasks(section, "validation")) if rounds > 1 else 0
    if num_tasks is None or num_eval_tasks is None or num_validation_tasks is None:
        return None
    at_most = recipe.pairs.num or num_tasks
    pairs = Span(*(min(at_most, share * num_tasks) for share in (PAIR_SHARE.low, PAIR_SHARE.likely, PAIR_SHARE.high)))
    num_responses = section.num_samples * section.num_seeds
    num_settings = len(benchmark.list_prompts(section)) * len(section.temperatures)
    return Counts(
        num_tasks=rounds * num_tasks,
        num_responses=rounds * num_tasks * recipe.sample.k,
        num_pairs=pairs * rounds,
        num_eval_tasks=num_eval_tasks,
        num_validation_tasks=num_validation_tasks,
        num_asked=2 * num_eval_tasks + (1 + rounds) * num_validation_tasks,
        num_answers=num_settings * num_responses * len(section.images),
        num_option_requests=2 * count_options(section, num_eval_tasks),
    )


def count_options(section: EvalSection, num_tasks: int) -> int:
    """How often one checkpoint is asked how likely an option is, before the questions' options are counted."""
    return num_tasks * OPTIONS * len(section.images) if section.margins else 0


def count_tasks(section: TasksSection) -> int | None:
    """How many questions the section asks for; None where the data set's size is not known here."""
    each = [SOURCES.resolve(part.source).num_questions.get(part.split) for part in list_parts(section)]
    known = None if None in each or section.filter != NO_FILTER else sum(filter(None, each))
    if section.num_tasks is None or known is None:
        return section.num_tasks or known
    return min(section.num_tasks, known)


def _image_bytes(section: TasksSection) -> float:
    """Of a usual image: the mean over a mixture's parts."""
    each = [SOURCES.resolve(part.source).image_bytes for part in list_parts(section)]
    return sum(each) / len(each)


def estimate_run(recipe: Recipe, shape: Shape, kind: CardKind, num_cards: int) -> RunEstimate | None:
    """The hours on `num_cards` of a kind, with the least change that fits there; None where `count_work` is."""
    counts = count_work(recipe)
    if counts is None:
        return None
    plan = make_plan(recipe, shape, Cards(num_cards, kind.usable_gib, kind.usable_gib))
    machine, section = _Machine(plan, shape, kind, num_cards), recipe.eval
    times = len(section.temperatures) * section.num_seeds * len(section.images)
    work = list_evaluation(recipe, counts.num_asked * times, counts.num_option_requests)
    judge = estimate_run_judge(recipe, counts)
    gains = [StageEstimate("gain", "what images add to responses", machine.gain(counts))]
    stages = (
        StageEstimate("prepare", "model and data fetched, base's canary", machine.prepare(counts)),
        StageEstimate("sample", f"{counts.num_responses:,} responses", machine.sample(counts)),
        StageEstimate("judge", f"{counts.num_judgments:,} judgments", judge_hours(recipe.judge, judge)),
        *(gains if needs_gains(recipe.pairs) else ()),
        StageEstimate(
            "train", f"{counts.num_pairs.likely:,.0f} pairs, {recipe.train.epochs:g} epochs", machine.train(counts)
        ),
        StageEstimate("merge", "adapter into weights, gate, parity", machine.merge()),
        StageEstimate(
            "evaluate",
            f"{counts.num_eval_responses:,} responses",
            machine.evaluate(work) + grading_hours(recipe, estimate_run_grading(recipe, counts)),
        ),
    )
    return RunEstimate(
        plan, stages, machine.tokens_per_s(_sampling(recipe), DECODE_EFFICIENCY.likely, THOUGHT_TOKENS.likely)
    )


def estimate_run_judge(recipe: Recipe, counts: Counts) -> JudgeEstimate:
    """What the judge of the sampled responses will be asked, and its members; the report card that judge.min_auc asks for is
    made in the first round.
    """
    section = recipe.judge
    num_audited = 0 if section.min_auc is None else min(section.num_audited, counts.num_tasks // recipe.rounds.num)
    return estimate_judge(section, counts.num_tasks, recipe.sample.k, recipe.sample.max_tokens, num_audited)


def estimate_run_grading(recipe: Recipe, counts: Counts) -> JudgeEstimate | None:
    """What the judge of the evaluation's answers will be asked; None without one."""
    judge, section = recipe.eval.judge, recipe.eval
    found = estimate_grading(section, counts.num_eval_tasks, 2 * counts.num_answers)
    if judge is None or found is None:
        return None
    of_each = count_requests(judge, (1 + recipe.rounds.num) * counts.num_answers)
    return found + estimate_requests(judge, counts.num_validation_tasks * of_each, section.max_tokens)


def grading_hours(recipe: Recipe, judge: JudgeEstimate | None) -> Span:
    """Of the judge that scores an evaluation's answers."""
    section = recipe.eval.judge
    return Span(0, 0, 0) if section is None or judge is None else judge_hours(section, judge)


def estimate_disk(recipe: Recipe, shape: Shape, counts: Counts) -> dict[str, float]:
    """GiB by what takes them, at the end of the run."""
    weights = shape.num_parameters * 2 / GIB  # hub checkpoints come in 16 bits
    all_linear = recipe.train.target_modules == "all-linear"
    trained = shape.num_adapter_parameters(recipe.train.lora_r, all_linear=all_linear)
    sampled = counts.num_tasks * _image_bytes(recipe.tasks) / GIB
    num_evaluated = counts.num_eval_tasks + counts.num_validation_tasks
    evaluated = num_evaluated * SOURCES.resolve(find_benchmark(recipe.eval).source).image_bytes / GIB
    held = shape.num_parameters * (2 if recipe.merge.dtype == "auto" else BYTES[recipe.merge.dtype]) / GIB
    num_responses = counts.num_responses + counts.num_eval_responses
    records = num_responses * RESPONSE_BYTES + counts.num_judgments * JUDGMENT_BYTES
    return {
        "model, in the hub's cache": weights,
        "data sets, in the hub's cache": sampled + evaluated,
        "images of the run": sampled + evaluated,
        "ledger": records / GIB,
        "pairs with their images": counts.num_pairs.likely * _image_bytes(recipe.tasks) / GIB,
        "training's checkpoints and adapter": recipe.rounds.num * trained * (12 * CHECKPOINTS_KEPT + 4) / GIB,
        "policy": recipe.rounds.num * (held if recipe.merge.serve_as == "merged" else 4 * trained / GIB),
    }


def list_evaluation(recipe: Recipe, num_requests: int, num_option_requests: int) -> list[tuple[Workload, int]]:
    """By prompt: what a request of the evaluation is, and how many there are where each prompt has `num_requests`; last, the
    requests that ask how likely an option is.
    """
    section = recipe.eval
    prompts = find_benchmark(section).list_prompts(section)
    asked = [
        (Workload(prompt, section.num_samples, section.max_concurrency, section.max_tokens), num_requests)
        for prompt in prompts
    ]
    return [*asked, (Workload(OPTION_PROMPT, 1, section.max_concurrency, 1), num_option_requests)]


def evaluation_hours(
    recipe: Recipe, shape: Shape, kind: CardKind, num_cards: int, work: Sequence[tuple[Workload, int]]
) -> Span | None:
    """Hours of an evaluation alone on `num_cards` of a kind, the engine's start included; None where it does not fit."""
    plan = make_plan(recipe, shape, Cards(num_cards, kind.usable_gib, kind.usable_gib))
    return None if plan.fit.serving_fault else _Machine(plan, shape, kind, num_cards).evaluate(work)


def _sampling(recipe: Recipe) -> Workload:
    section = recipe.sample
    return Workload(section.prompt, section.k, section.max_concurrency, section.max_tokens)


@dataclass(frozen=True)
class _Machine:
    """The cards, and how the plan uses them."""

    plan: MemoryPlan
    shape: Shape
    kind: CardKind
    num_cards: int

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    def prepare(self, counts: Counts) -> Span:
        """Fetching, and the base's canary."""
        disk = estimate_disk(self.recipe, self.shape, counts)
        fetched = (disk["model, in the hub's cache"] + disk["data sets, in the hub's cache"]) * GIB
        return Span(*(fetched / rate / 3600 for rate in _three(DOWNLOAD_BYTES_S))) + self._passes(2) + self._gate(20)

    def sample(self, counts: Counts) -> Span:
        """The engine's start, and k responses to each task."""
        return ENGINE_START_S * (1 / 3600) + self._answer(_sampling(self.recipe), counts.num_tasks)

    def gain(self, counts: Counts) -> Span:
        """Both conversations of each response that may be chosen, and each task's prompt."""
        section = self.recipe.sample
        prompt = Workload(section.prompt, 1, section.max_concurrency, 1)
        said = round(min(THOUGHT_TOKENS.likely, section.max_tokens))
        both = self._answer(replace(prompt, said_tokens=said), 2 * counts.num_responses).times(CANDIDATE_SHARE)
        return both + self._answer(prompt, counts.num_tasks)

    def evaluate(self, work: Sequence[tuple[Workload, int]]) -> Span:
        """So many requests of each kind."""
        restarts = 2 if engine_state(self.recipe.serve) == "stopped" else 1
        hours = ENGINE_START_S * (restarts / 3600)
        for requests, num_requests in work:
            hours += self._answer(requests, num_requests)
        return hours

    def _answer(self, requests: Workload, num_prompts: int) -> Span:
        """Hours until `num_prompts` are answered: their own part, and the responses'."""
        cases = zip(
            _three(requests.response_tokens), _three(DECODE_EFFICIENCY), _three(PREFILL_EFFICIENCY), strict=True
        )
        prompt_flops = requests.num_prompts_read * self._forward_flops(self._prompt_tokens(requests))
        power = self.kind.flops * self.num_cards * self._parallel_efficiency
        return Span(
            *(
                num_prompts
                * (requests.n * tokens / self.tokens_per_s(requests, decoding, tokens) + prompt_flops / power / prefill)
                / 3600
                for tokens, decoding, prefill in cases
            )
        )

    def tokens_per_s(self, requests: Workload, efficiency: float, response_tokens: float) -> float:
        """Tokens a second over all servers, with as many sequences at once as there are, or as their keys and values fit."""
        serving = self.plan.fit.serving
        servers = max(1, self.num_cards // serving.tensor_parallel)
        context = self._prompt_tokens(requests) + response_tokens / 2
        held = self._prompt_tokens(requests) / requests.n + response_tokens / 2  # the n share their prompt
        asked = requests.n * requests.max_concurrency / servers
        sequences = max(1.0, min(asked, MAX_SEQUENCES, serving.kv_tokens / held))
        read = serving.weights * GIB + sequences * context * serving.kv_bytes_per_token
        step = read / (self.kind.bandwidth * efficiency * self._parallel_efficiency) + STEP_OVERHEAD_S
        return servers * sequences / step

    @property
    def _parallel_efficiency(self) -> float:
        return PARALLEL_EFFICIENCY if self.plan.fit.serving.tensor_parallel > 1 else 1.0

    def train(self, counts: Counts) -> Span:
        """The reference's log-probs once, the epochs, and the validations."""
        train, section = self.recipe.train, self.recipe.pairs
        held_out = section.validation_fraction
        per_step = 3 if train.gradient_checkpointing else 2
        passes = 1 + (1 - held_out) * train.epochs * per_step + held_out * train.num_evaluations
        power = self.kind.flops * train.num_processes
        power *= PARALLEL_EFFICIENCY if train.accelerate_config != "ddp" else 1.0
        power *= NF4_EFFICIENCY if train.base_weights == "nf4" else 1.0
        cases = zip(
            _three(counts.num_pairs), _three(THOUGHT_TOKENS), _three(TRAIN_EFFICIENCY), (True, True, False), strict=True
        )
        return Span(
            *(
                pairs * passes * self._pair_flops(tokens, shared=shared) / (power * efficiency) / 3600
                for pairs, tokens, efficiency, shared in cases
            )
        )

    def _pair_flops(self, response_tokens: float, *, shared: bool) -> float:
        """One forward of a pair: its prompt once where the model allows that (not a Qwen-VL), or with each response."""
        prompt, rows = self._prompt_tokens(_sampling(self.recipe)), 3 if self.recipe.train.method == "mdpo" else 2
        num_prompts = rows - 1 if shared and self.shape.image_side is not None else rows
        tokens = num_prompts * prompt + rows * min(response_tokens, self.recipe.sample.max_tokens)
        return self._forward_flops(tokens, num_images=num_prompts)

    def merge(self) -> Span:
        """Reading and writing, and the float32 models' passes."""
        return (self._passes(WEIGHT_PASSES) + self._gate(GATE_FORWARDS)) * self.recipe.rounds.num

    def _passes(self, num: int) -> Span:
        size = 2 * self.shape.num_parameters * num
        return Span(*(size / rate / 3600 for rate in _three(DISK_BYTES_S)))

    def _gate(self, num_forwards: int) -> Span:
        """What does not fit on the card is streamed to it in each pass."""
        outside = max(0.0, 4 * self.shape.num_parameters - self.kind.usable_gib * self.num_cards * GIB)
        computed = (
            num_forwards * self._forward_flops(1000) / (self.kind.flops / 8) / 3600
        )  # float32, without tensor cores
        return Span(*(num_forwards * outside / rate / 3600 + computed for rate in _three(STREAM_BYTES_S)))

    def _prompt_tokens(self, requests: Workload) -> float:
        return self.shape.num_image_tokens(self.recipe.train.max_image_side) + requests.text_tokens

    def _forward_flops(self, tokens: float, num_images: int = 1) -> float:
        """2 x parameters x tokens, of the decoder and of the tower."""
        shape = self.shape
        decoder = shape.decoder.num_layers * shape.decoder.layer_parameters + shape.vocabulary * shape.decoder.hidden
        tower = shape.tower.num_layers * shape.tower.layer_parameters
        patches = num_images * shape.num_patches(self.recipe.train.max_image_side)
        return 2.0 * (decoder * tokens + tower * patches)


def _three(span: Span) -> tuple[float, float, float]:
    return span.low, span.likely, span.high
