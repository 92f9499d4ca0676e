"""The sections of a recipe, a type each. Every step takes only its own.

The sentence under each field is its documentation (`vcot recipe NAME` prints them). A key is named by its environment
variable and never stored.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from pipeline.addresses import UpstreamUrl
from pipeline.data_sections import PartSection, WeightedSection
from pipeline.engine_args import check_engine_args
from pipeline.fields import Count, Fraction, Section
from pipeline.open_lists import BENCHMARK_NAMES, JUDGE_NAMES, LOSSES, PAIR_POLICY_NAMES, PROMPT_NAMES
from pipeline.records import SamplingParams, ShownImage, Split

POLICY_ALIAS = "policy"
"""What a swap moves, and no checkpoint's own name."""
Dtype = Literal["float32", "bfloat16", "float16"]
BaseWeights = Literal["full", "nf4"]


def _check_model_name(name: str) -> str:
    if name == POLICY_ALIAS:
        raise ValueError(f"{name!r} is the alias of whatever was trained last; take another name")
    return name


SearchMode = Literal["one_at_a_time", "grid"]
Corruption = Literal["crop", "blank", "noise", "other_image"]
Prompt = Annotated[str, AfterValidator(PROMPT_NAMES.check)]


class ModelSection(Section):
    """The model that is taught."""

    source: str
    """A bundled checkpoint (`nano`), a checkpoint directory, or a model id on the hub."""
    revision: str | None = None
    """The hub revision (a commit for a run that can be repeated)."""
    name: Annotated[str, AfterValidator(_check_model_name)] = "base"
    """What the untaught checkpoint is called in tables and at the gateway."""


class ServeSection(Section):
    """The vLLM server and the gateway in front of it."""

    url: str | None = None
    """A gateway that serves already, elsewhere; without it the run's own is used, and started when it is needed."""
    dtype: Dtype = "bfloat16"
    """The type that vLLM computes in; never `auto`, which turns float32 weights into bfloat16 silently."""
    max_model_len: Count = 2048
    """Longest prompt plus response, in tokens, image tokens included."""
    host: str = "127.0.0.1"
    """Where the gateway listens."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8100
    """The gateway's port; 0 takes a free one."""
    gpu_memory_utilization: Fraction = 0.9
    """Share of the GPU's memory that vLLM takes (GPU builds)."""
    kv_cache_gib: Annotated[float, Field(gt=0)] = 1.0
    """Memory for keys and values, in GiB (CPU builds)."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    """How long the server may take to load before it counts as stuck."""
    max_in_flight: Count = 256
    """Requests that the engine works on at once; more wait at the gateway."""
    max_queued: Annotated[int, Field(ge=0)] = 1024
    """Requests that may wait; beyond, the answer is 429 with `Retry-After`."""
    max_body_mb: Annotated[float, Field(gt=0)] = 32.0
    """Largest request, in MB, images included."""
    max_held_mb: Annotated[float, Field(gt=0)] = 2048.0
    """Bodies of all requests that are answered or wait, in MB; beyond, the answer is 429."""
    replicas: Count = 1
    """vLLM servers to start; requests are spread over them, and outlive the loss of all but one."""
    upstreams: tuple[UpstreamUrl, ...] = ()
    """vLLM servers that someone else runs, as `http://host:port`; each is a replica, and none is started here."""
    devices: tuple[Annotated[str, Field(pattern=r"^[^\s,]+(,[^\s,]+)*$")], ...] = ()
    """CUDA_VISIBLE_DEVICES of each server in turn, such as "0" or "0,1" (tensor parallel); without it, as it is."""
    swap: Literal["auto", "adapter", "reload", "replica"] = "auto"
    """How another checkpoint is put behind the gateway; `auto` takes the fastest way that the checkpoint allows."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """How long a server may make no token with requests in flight before it is started anew."""
    allowed_image_hosts: tuple[str, ...] = ()
    """Hosts (`name` or `name:port`) that vLLM may fetch images from; images come as data URLs from anywhere else."""
    max_image_pixels: Count = 50_000_000
    """Width times height of an image in a request; a larger one is refused by its header, before it is decoded."""
    while_training: Literal["auto", "keep", "sleep", "stop"] = "auto"
    """What vLLM does in a training: `sleep` (frees GPU memory), `stop`, `keep`; `auto`: sleep on GPUs, keep with `url`."""
    max_images: Count = 1
    """The most images of one request; `max_model_len` must have room for their tokens."""
    extra_args: tuple[str, ...] = ()
    """More options for vLLM's command line, such as ["--max-num-seqs", "64"]; none that vcot sets or depends on."""

    def devices_of(self, number: int) -> str | None:
        """CUDA_VISIBLE_DEVICES of the `number`-th server, from 0; None where it takes what it finds."""
        return self.devices[number % len(self.devices)] if self.devices else None

    @field_validator("extra_args")
    @classmethod
    def _check_extra_args(cls, arguments: tuple[str, ...]) -> tuple[str, ...]:
        check_engine_args(arguments)
        return arguments


class TasksSection(PartSection):
    """Where questions come from."""

    parts: tuple[WeightedSection, ...] = ()
    """For `mix`: the data sets that are mixed."""
    num_tasks: Count | None = None
    """How many, in each round; without it, all."""
    seed: int = 0
    """Which tasks are drawn when there are more than `num_tasks`."""
    allow_overlap: bool = False
    """Whether to go on where questions or pictures are in the evaluation set, too (docs/contamination.md)."""


class SampleSection(Section):
    """The responses that are drawn for each task."""

    prompt: Prompt = "thought_specific"
    """Asks for a thought first, as thought_generic, two_stage, caption_first, or your own (package.module:object) do."""
    k: Annotated[int, Field(ge=2)] = 8
    """Responses per task."""
    temperature: Annotated[float, Field(gt=0)] = 0.5
    """Sampling temperature; above 0, or all k responses are the same."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus mass."""
    max_tokens: Count = 512
    """Longest response, in tokens."""
    seed: int = 0
    """Every request's own seed is derived from it."""
    max_concurrency: Count = 8
    """Requests in flight, at most: as many as keep the server busy are found by measuring (docs/sampling.md)."""

    def params(self) -> SamplingParams:
        """The settings that enter the keys."""
        return SamplingParams(
            temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens, n=self.k, seed=self.seed
        )


class JudgeSection(Section):
    """Who scores the responses."""

    kind: Annotated[str, AfterValidator(JUDGE_NAMES.check)] = "verifier"
    """verifier, pointwise, expected, claims, pairwise, gated, ensemble, or one of your own (docs/judges.md)."""
    model: str | None = None
    """The judge model's name, for a judge that is a model."""
    members: tuple[JudgeSection, ...] = ()
    """The judges, each as [judge] is written, that gated (one) and ensemble (several) go by."""
    image: Literal["own", "none", "blank", "other"] = "own"
    """Whether a model judge is shown the image; `none` judges the words alone (`blank` and `other` are for the audit)."""
    sees: Literal["whole", "answer"] = "whole"
    """Whether a model judge reads the whole response, or only what follows the thought (Wu et al. 2024)."""
    gold: bool = False
    """Whether a model judge is told the right answer."""
    num_samples: Count = 1
    """Verdicts of pointwise for each response, whose mean is the score; more than 1 needs a temperature."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """The temperature that a model judge is asked at."""
    schedule: Literal["round_robin", "swiss"] = "round_robin"
    """Which responses pairwise compares: each with each, or in rounds each with one that won as often."""
    max_meta: Annotated[int, Field(ge=0)] = 0
    """How many of a task's comparisons that hang on the order are put before the meta-judge (pairwise)."""
    seed: int = 0
    """Of a model judge's sampling."""
    batch: bool = False
    """Whether a model judge is asked through the API's batches: half the price at OpenAI, answered within a day."""
    min_auc: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Stops before judging unless the judge's report card, which is made first, shows at least this AUC."""
    num_audited: Count = 200
    """Tasks that the report card is made of, each with a right and a wrong response."""
    base_url: str | None = None
    """An OpenAI-compatible API; without it, OpenAI's."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; with `base_url`, it may be empty."""
    image_detail: Literal["low", "high", "auto"] = "low"
    """How closely an OpenAI judge looks at the image; it sets the price."""
    max_tokens: Count = 512
    """Longest verdict, in tokens."""
    max_concurrency: Count = 16
    """Requests in flight."""
    max_unjudged: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of the responses that may stay without a verdict (refused, filtered, unreadable); more stop the run."""
    max_asks: Count = 1
    """How often a response without a verdict is asked about in all, by later commands and while there are too many."""
    max_cost_usd: Annotated[float, Field(gt=0)] | None = None
    """Judging stops before it costs the run more dollars than this."""
    input_usd: Annotated[float, Field(ge=0)] | None = None
    """Dollars per million prompt tokens; known for OpenAI's gpt-4o-mini, gpt-4o and gpt-4.1-mini."""
    output_usd: Annotated[float, Field(ge=0)] | None = None
    """Dollars per million tokens of verdicts."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.input_usd is None) != (self.output_usd is None):
            raise ValueError("input_usd and output_usd belong together; set both, or neither")
        if self.num_samples > 1 and not self.temperature:
            raise ValueError("num_samples at temperature 0 are all the same; set temperature, for example to 0.7")
        return self


class PairsSection(Section):
    """How judgments become preference pairs."""

    policy: Annotated[str, AfterValidator(PAIR_POLICY_NAMES.check)] = "best_worst"
    """`best_worst` (the paper's), or another of docs/pairs.md; one of your own is package.module:function."""
    max_per_task: Count = 1
    """At most so many pairs of a task, from a policy that finds several."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """By more than this the chosen response scores higher (`margin`)."""
    max_length_ratio: Annotated[float, Field(ge=1)] = 1.25
    """The longer of two responses over the shorter, in words, at most (`length_matched`)."""
    rho: Annotated[float, Field(ge=0, le=0.5)] = 0.25
    """What length costs, in standard deviations of the score for one of the length (`length_penalised`)."""
    choose_cut: bool = False
    """Whether a response that was cut off at `sample.max_tokens` may be the chosen one."""
    num: Count | None = None
    """At most so many pairs, drawn by image; the others are left out and counted. Without it, all."""
    validation_fraction: Fraction = 0.1
    """Share of the pairs held out for validation, split by image."""
    seed: int = 0
    """Which pairs are drawn, and which images are held out."""


class TrainSection(Section):
    """The trainer's job."""

    method: Literal["dpo", "mdpo"] = "dpo"
    """`dpo` (Rafailov et al. 2023), or `mdpo` (Wang et al. 2024): with preference of the true image, and an anchor."""
    losses: Annotated[tuple[Annotated[str, AfterValidator(LOSSES.check)], ...], Field(min_length=1)] = ("sigmoid",)
    """Losses, added up: TRL's (`sigmoid` is DPO's, `sft` the chosen response's), or one's own as `package.module:name`."""
    loss_weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """A weight for each of `losses`; without it, 1."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """How often a preference is the wrong way round; `robust`, `aot` and `exo_pair` use it, the last needs it."""
    corruption: Corruption = "crop"
    """What mDPO corrupts an image by: a random `crop` that keeps 1 to 20 %, `blank`, `noise`, or `other_image`."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the pull towards the reference."""
    lora_r: Count = 64
    """Rank of the adapter."""
    lora_alpha: Count = 128
    """Scale of the adapter: updates are multiplied by alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout on the adapter's input."""
    target_modules: Literal["all-linear", "language-model"] = "all-linear"
    """`all-linear` adapts tower, projector and language model; `language-model` leaves the first two as they are."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate."""
    schedule: Literal["linear", "constant"] = "linear"
    """How the learning rate goes on from its peak: `linear` falls to 0 at the last step, `constant` stays."""
    epochs: Annotated[float, Field(gt=0)] = 2
    """Passes over the pairs."""
    batch_size: Count = 8
    """Pairs per device and step."""
    gradient_accumulation: Count = 1
    """Steps that are added up before an update."""
    max_image_side: Annotated[int, Field(ge=14)] = 336
    """Longer images are scaled down to this side, in pixels, to bound memory."""
    max_length: Count = 2048
    """Longest row in tokens, image tokens included; longer rows are refused before training, never cut."""
    dtype: Dtype = "bfloat16"
    """The type that training computes in."""
    base_weights: BaseWeights = "full"
    """What the frozen base is held in: `full` is `dtype`; `nf4` is 4 bits a weight (QLoRA), for GPUs of 24 GB."""
    gradient_checkpointing: bool = True
    """Recompute activations to save memory."""
    num_evaluations: Count = 10
    """How often the validation loss is measured over the whole training."""
    seed: int = 0
    """Of the adapter's start, the order of pairs, and dropout."""
    report_to: tuple[Literal["wandb", "trackio"], ...] = ()
    """Trackers besides the run's own files."""
    worker: Literal["local", "remote"] = "local"
    """Who trains: `local` is a process of the command's own, `remote` a `vcot worker` that sees the run's directory."""
    num_processes: Count = 1
    """Processes on this machine, one per GPU; `batch_size` is each one's."""
    accelerate_config: str = "ddp"
    """How they share the work: `ddp`, `fsdp`, `zero2`, `zero3` (DeepSpeed), or the path of an accelerate config file."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.loss_weights and len(self.loss_weights) != len(self.losses):
            raise ValueError(f"{len(self.loss_weights)} loss_weights for {len(self.losses)} losses; give each its own")
        if self.base_weights == "nf4" and self.accelerate_config in ("fsdp", "zero3"):
            raise ValueError(f"base_weights = nf4 cannot be spread by {self.accelerate_config}; take ddp or zero2")
        if len(set(self.losses)) != len(self.losses):
            raise ValueError("a loss is named twice in losses; give it a weight instead")
        if "exo_pair" in self.losses and not self.label_smoothing:
            raise ValueError("exo_pair is infinite without label_smoothing; its authors take 1e-3")
        return self


class SweepSection(Section):
    """The search for training settings, around those of `train`."""

    mode: SearchMode = "one_at_a_time"
    """`one_at_a_time` varies each setting while the others are as in `train`; `grid` trains the product of the lists."""
    num_pairs: Count = 2000
    """Pairs that the search is done on, drawn by image; 0.9 of them train where `pairs.validation_fraction` is 0.1."""
    epochs: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1, 2, 3, 4, 5)
    """Passes over the pairs; one at a time, all are read off one training of the most."""
    learning_rate: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1e-6, 5e-6, 1e-5, 5e-5)
    """Peak learning rates."""
    lora_dropout: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=1)] = (0.1, 0.5, 0.8)
    """Dropouts on the adapter's input."""
    lora_alpha: Annotated[tuple[Count, ...], Field(min_length=1)] = (64, 128, 256)
    """Scales of the adapter."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Validation losses within this share of the lowest count as equal; the smallest gap then decides."""
    seed: int = 0
    """Which pairs are drawn."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        odd = next((num for num in self.epochs if num != int(num)), None)
        if self.mode == "one_at_a_time" and odd is not None:
            raise ValueError(
                f'epochs holds {odd:g}, but they are read at the ends of epochs; give whole numbers, or mode = "grid"'
            )
        return self


class MergeSection(Section):
    """How the adapter becomes a servable checkpoint."""

    serve_as: Literal["merged", "adapter"] = "merged"
    """`merged` adds the adapter to the base's weights; `adapter` serves it beside them (target_modules = language-model)."""
    dtype: Literal["auto"] | Dtype = "auto"
    """The type of the merged weights; `auto` is the base's own, or float32 where that would round the update away."""


class RoundsSection(Section):
    """Iterated rounds (Wu et al. 2024): each samples, judges, pairs and trains on, from the last one's policy."""

    num: Count = 1
    """How many; each takes `tasks.num_tasks` fresh tasks, about images that no earlier round saw."""
    reference: Literal["previous", "seed"] = "previous"
    """What training pulls towards: the policy that the round starts from, or the untaught model."""


class EvalSection(Section):
    """The benchmark: each prompt at each temperature, for base and policy."""

    benchmark: Annotated[str, AfterValidator(BENCHMARK_NAMES.check)]
    """One of vcot's own (docs/evaluation.md), such as scienceqa, or yours as package.module:object (docs/extending.md)."""
    path: str | None = None
    """The official on-disk layout of its data set; without it, the hub's copy is read."""
    revision: str | None = None
    """The revision of the hub's copy (a commit for a run that can be repeated)."""
    split: Split = "test"
    """The data set's split."""
    num_tasks: Count | None = None
    """How many questions; without it, all."""
    prompts: tuple[Prompt, ...] = ()
    """Prompts to compare; without it, the benchmark's own."""
    temperatures: tuple[Annotated[float, Field(ge=0)], ...] = (0.4, 0.8)
    """Sampling temperatures."""
    num_samples: Count = 1
    """Responses per question and seed."""
    num_seeds: Count = 1
    """Seeds to ask under, `seed` and those after it: more responses later, without asking again for those that are there."""
    images: tuple[ShownImage, ...] = ("true",)
    """What is shown: true; and blank, other, cropped, question_only, options_only to say what the image is worth."""
    max_tokens: Count = 512
    """Longest response, in tokens."""
    seed: int = 0
    """Of the drawn questions and of the sampling."""
    hint: bool = False
    """Whether ScienceQA's hint stands before a question that has one; the paper's figures have none."""
    max_concurrency: Count = 128
    """Requests in flight, at most, as in sample; of one response each, so a server takes more of them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_samples * self.num_seeds > 1 and 0 in self.temperatures:
            raise ValueError(
                "at temperature 0 all responses are the same; set num_samples, num_seeds to 1, or leave 0 out"
            )
        if "true" not in self.images:
            raise ValueError('images leaves out the questions\' own; add "true"')
        return self

    def params(self, temperature: float, turn: int = 0) -> SamplingParams:
        """The settings that enter the keys; `turn` counts the seeds from 0."""
        seed = self.seed + turn
        return SamplingParams(temperature=temperature, max_tokens=self.max_tokens, n=self.num_samples, seed=seed)
