"""What a recipe says of evaluation: `[eval]`."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from vcot.pipeline.data_sections import ColumnsSection
from vcot.pipeline.fields import Count, Section, Seed
from vcot.pipeline.open_lists import BENCHMARK_NAMES
from vcot.pipeline.records import SamplingParams, ShownImage, Split
from vcot.pipeline.sections import JudgeSection, PromptName


class EvalSection(Section):
    """The benchmark: each prompt at each temperature, for base and policy."""

    benchmark: Annotated[str, AfterValidator(BENCHMARK_NAMES.check)]
    """One of vcot's own (docs/evaluation.md), such as scienceqa, or yours as package.module:object (docs/extending.md)."""
    path: str | None = None
    """The official on-disk layout of its data set; without it, the hub's copy is read."""
    columns: ColumnsSection | None = None
    """For `table`: which column of your files holds what."""
    revision: str | None = None
    """The revision of the hub's copy (a commit for a run that can be repeated)."""
    split: Split = "test"
    """The data set's split."""
    num_tasks: Count | None = None
    """How many questions; without it, all."""
    prompts: tuple[PromptName, ...] = ()
    """Prompts to compare; without it, the benchmark's own."""
    temperatures: tuple[Annotated[float, Field(ge=0)], ...] = (0.4, 0.8)
    """Sampling temperatures."""
    num_samples: Count = 1
    """Responses per question and seed."""
    num_seeds: Count = 1
    """Seeds to ask under, `seed` and those after it: more responses later, without asking again for those that are there."""
    images: tuple[ShownImage, ...] = ("true",)
    """What is shown: true; and blank, other, cropped, question_only, options_only to say what the image is worth."""
    margins: bool = False
    """Whether the server is asked how likely each option is, with each of `images` (docs/evaluation.md)."""
    max_tokens: Count = 512
    """Longest response, in tokens."""
    seed: Seed = 0
    """Of the drawn questions and of the sampling."""
    judge: JudgeSection | None = None
    """Scores each answer in place of the benchmark's rule: {kind = "pointwise", model = "gpt-4o-mini", gold = true}, say."""
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
