"""What a recipe says of making preference data: `[model]`, `[tasks]`, `[sample]`, `[judge]` and `[pairs]`, a type each.

Every step takes only its own. The other sections lie beside what they are about; `services/recipes/recipe.py` lists all.
The sentence under each field is its documentation (`vcot recipe NAME` prints them). A key is named by its environment
variable and never stored.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from vcot.pipeline.data_sections import PartSection, WeightedSection
from vcot.pipeline.fields import Count, Fraction, Section, Seed
from vcot.pipeline.open_lists import JUDGE_NAMES, PAIR_POLICY_NAMES, PROMPT_NAMES
from vcot.pipeline.records import SamplingParams

POLICY_ALIAS = "policy"
"""What a swap moves, and no checkpoint's own name."""


def _check_model_name(name: str) -> str:
    if name == POLICY_ALIAS:
        raise ValueError(f"{name!r} is the alias of whatever was trained last; take another name")
    return name


PromptName = Annotated[str, AfterValidator(PROMPT_NAMES.check)]


class ModelSection(Section):
    """The model that is trained."""

    source: str
    """A bundled checkpoint (`nano`), a checkpoint directory, or a model id on the hub."""
    revision: str | None = None
    """The hub revision (a commit for a run that can be repeated)."""
    name: Annotated[str, AfterValidator(_check_model_name)] = "base"
    """What the base checkpoint is called in tables and at the gateway."""


class TasksSection(PartSection):
    """Where questions come from."""

    parts: tuple[WeightedSection, ...] = ()
    """For `mix`: the data sets that are mixed."""
    num_tasks: Count | None = None
    """How many, in each round; without it, all."""
    seed: Seed = 0
    """Which tasks are drawn when there are more than `num_tasks`."""
    allow_overlap: bool = False
    """Whether to go on where questions or pictures are in the evaluation set, too (docs/contamination.md)."""


class SampleSection(Section):
    """The responses that are drawn for each task."""

    prompt: PromptName = "thought_specific"
    """Asks for a thought first, as thought_generic, two_stage, caption_first, or your own (package.module:object) do."""
    k: Annotated[int, Field(ge=2)] = 8
    """Responses per task."""
    temperature: Annotated[float, Field(gt=0)] = 0.5
    """Sampling temperature; above 0, or all k responses are the same."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus mass."""
    max_tokens: Count = 512
    """Longest response, in tokens."""
    seed: Seed = 0
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
    seed: Seed = 0
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
    image_margin: Annotated[float, Field(ge=0)] = 1.0
    """By more than this, in nats, the image makes the chosen response likelier than a blank one does (`image_driven`)."""
    rho: Annotated[float, Field(ge=0, le=0.5)] = 0.25
    """What length costs, in standard deviations of the score for one of the length (`length_penalised`)."""
    choose_cut: bool = False
    """Whether a response that was cut off at `sample.max_tokens` may be the chosen one."""
    num: Count | None = None
    """At most so many pairs, drawn by image; the others are left out and counted. Without it, all."""
    validation_fraction: Fraction = 0.1
    """Share of the pairs held out for validation, split by image."""
    seed: Seed = 0
    """Which pairs are drawn, and which images are held out."""
