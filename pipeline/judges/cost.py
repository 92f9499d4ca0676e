"""What judging costs: an estimate before paying, a running total, and a cap. Pure but for the meter's own count.

Prices are dollars per million tokens, by model: https://platform.openai.com/docs/pricing as of June 2026. A model that is
not in the table is counted in tokens only, unless the recipe names its prices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from vcot.pipeline.errors import RecipeError, RequestError
from vcot.pipeline.records import Record, Usage
from vcot.pipeline.sections import JudgeSection

PRICES_AS_OF = "June 2026"
NUM_TEXT_TOKENS = 350
"""An allowance for the judge's prompt, a question and a response; a chain of thought may be longer."""
NUM_VERDICT_TOKENS = 60
_MILLION = 1e6
_TILE_PX = 512
_IMAGE_TOKENS = {"gpt-4o-mini": (2833, 5667), "gpt-4o": (85, 170)}
"""Tokens of an image: (the image itself, each tile of 512 px in high detail), as OpenAI's guide to vision has them."""
_BATCH_SHARE = 0.5
"""Of the price, in a batch."""
_PATCH_PX, _MAX_PATCHES, _TOKENS_PER_PATCH = 32, 1536, {"gpt-4.1-mini": 1.62}


class Prices(Record):
    """Dollars per million tokens."""

    input_usd: float
    output_usd: float


_PRICES = {
    "gpt-4o-mini": Prices(input_usd=0.15, output_usd=0.60),
    "gpt-4o": Prices(input_usd=2.50, output_usd=10.00),
    "gpt-4.1-mini": Prices(input_usd=0.40, output_usd=1.60),
}


class Cost(Record):
    """Tokens of some requests, and dollars where the prices are known."""

    num_requests: int
    usage: Usage
    usd: float | None

    @property
    def summary(self) -> str:
        """For people: `1,000 requests: 2.9 M tokens, $0.46`."""
        tokens = describe_tokens(self.usage.num_tokens)
        return f"{self.num_requests:,} request{'s' * (self.num_requests != 1)}: {tokens}{describe_usd(self.usd)}"

    def __add__(self, other: Cost) -> Cost:
        """Of both; no sum in dollars where one is not known."""
        usd = None if self.usd is None or other.usd is None else self.usd + other.usd
        return Cost(num_requests=self.num_requests + other.num_requests, usage=self.usage + other.usage, usd=usd)


def describe_tokens(num_tokens: float) -> str:
    """`812 tokens`, `3.1 k tokens` or `402.1 M tokens`."""
    if num_tokens < 1000:
        return f"{num_tokens:.0f} tokens"
    return f"{num_tokens / 1000:.1f} k tokens" if num_tokens < _MILLION else f"{num_tokens / _MILLION:,.1f} M tokens"


def describe_usd(usd: float | None) -> str:
    """`, $12.30` behind a number of tokens, to the cent or to two digits; nothing where the prices are not known."""
    if usd is None:
        return ""
    return f", ${usd:,.2f}" if usd >= 1 or not usd else f", ${usd:.2g}"


def find_prices(section: JudgeSection) -> Prices | None:
    """The recipe's prices, or else the table's, half of it for batches; None where the judge's prices are not known."""
    if section.input_usd is not None and section.output_usd is not None:
        return Prices(input_usd=section.input_usd, output_usd=section.output_usd)
    listed, share = _PRICES.get(section.model or ""), _BATCH_SHARE if section.batch else 1.0
    return listed and Prices(input_usd=listed.input_usd * share, output_usd=listed.output_usd * share)


def price(usage: Usage, prices: Prices | None) -> float | None:
    """Dollars for these tokens; None where the prices are not known."""
    if prices is None:
        return None
    return (usage.prompt_tokens * prices.input_usd + usage.completion_tokens * prices.output_usd) / _MILLION


def estimate_cost(num_requests: int, prompt_tokens: float, completion_tokens: float, prices: Prices | None) -> Cost:
    """Of so many requests that take so many tokens each."""
    usage = Usage(
        prompt_tokens=round(num_requests * prompt_tokens), completion_tokens=round(num_requests * completion_tokens)
    )
    return Cost(num_requests=num_requests, usage=usage, usd=price(usage, prices))


def guess_prompt_tokens(
    model: str,
    detail: Literal["low", "high", "auto"],
    *,
    width: int = 640,
    height: int = 480,
    num_text_tokens: int = NUM_TEXT_TOKENS,
) -> int:
    """Prompt tokens of one request, before one was made: an image of this size in pixels, and the text.

    An unknown model's image is counted as gpt-4o's. `auto` is `high`.
    """
    if model in _TOKENS_PER_PATCH:
        num_patches = min(_MAX_PATCHES, math.ceil(width / _PATCH_PX) * math.ceil(height / _PATCH_PX))
        return round(num_patches * _TOKENS_PER_PATCH[model]) + num_text_tokens
    base, tile = _IMAGE_TOKENS.get(model, _IMAGE_TOKENS["gpt-4o"])
    if detail == "low":
        return base + num_text_tokens
    shrink = min(1.0, 2048 / max(width, height))
    shrink = min(shrink, 768 / min(width, height))
    num_tiles = math.ceil(width * shrink / _TILE_PX) * math.ceil(height * shrink / _TILE_PX)
    return base + tile * num_tiles + num_text_tokens


class _Cap(NamedTuple):
    """What bounds a run's bill, in dollars."""

    paid: float
    each: float
    """The most that one more request is expected to cost."""
    limit: float

    def is_exceeded_by(self, num_requests: int) -> bool:
        """Whether so many more could cost too much."""
        return self.paid + num_requests * self.each > self.limit


@dataclass
class Meter:
    """What was paid for a run's judging so far. Mutated by the stage that pays."""

    prices: Prices | None
    typical: Usage
    """What a request is expected to take as long as none was paid for."""
    max_usd: float | None = None
    num_requests: int = 0
    """Paid for, by this command and earlier ones."""
    usage: Usage = field(default_factory=lambda: Usage(prompt_tokens=0, completion_tokens=0))
    _num_running: int = 0
    _largest_usd: float = 0.0

    @property
    def cost(self) -> Cost:
        """All that was paid."""
        return Cost(num_requests=self.num_requests, usage=self.usage, usd=price(self.usage, self.prices))

    @property
    def summary(self) -> str:
        """The running total, in a few words; empty before anything was paid."""
        return f"{describe_tokens(self.usage.num_tokens)}{describe_usd(self.cost.usd)}" if self.num_requests else ""

    def estimate(self, num_requests: int) -> Cost:
        """What so many more would cost, at the mean of those that were paid for."""
        usage, paid = (self.usage, self.num_requests) if self.num_requests else (self.typical, 1)
        return estimate_cost(num_requests, usage.prompt_tokens / paid, usage.completion_tokens / paid, self.prices)

    def count_affordable(self) -> int | None:
        """How many more requests the cap allows; None where there is no cap."""
        if (cap := self._find_cap()) is None:
            return None
        most = max(0, round((cap.limit - cap.paid) / cap.each))
        return most - 1 if most and cap.is_exceeded_by(most) else most

    def _find_cap(self) -> _Cap | None:
        usd, expected = self.cost.usd, self.estimate(1).usd
        if self.max_usd is None or usd is None or not expected:
            return None
        return _Cap(usd, max(expected, self._largest_usd), self.max_usd)

    def begin(self) -> None:
        """Count a request that is about to be made. Raises RequestError where it could exceed the cap."""
        if (cap := self._find_cap()) is not None and cap.is_exceeded_by(self._num_running + 1):
            message = f"${cap.paid:,.4g} is paid, and one more request could exceed judge.max_cost_usd = {cap.limit:g}"
            raise RequestError(message, scope="account", reason="budget")
        self._num_running += 1

    def end(self, usage: Usage | None) -> None:
        """Count what it took; None where it was not billed."""
        self._num_running -= 1
        if usage is not None:
            self.num_requests += 1
            self.usage += usage
            self._largest_usd = max(self._largest_usd, price(usage, self.prices) or 0.0)


def open_meter(section: JudgeSection, num_requests: int, usage: Usage, typical: Usage | None = None) -> Meter:
    """The meter of a run that has paid for `num_requests` so far. `typical` is a test's, where one was made.

    Raises RecipeError where there is a cap, and nothing to count it in.
    """
    prices = find_prices(section)
    if section.max_cost_usd is not None and prices is None:
        raise RecipeError(
            f"judge.max_cost_usd = {section.max_cost_usd:g}, but the prices of {section.model} are not known; set "
            "judge.input_usd and judge.output_usd, in dollars per million tokens"
        )
    return Meter(prices, typical or _guess_usage(section), section.max_cost_usd, num_requests, usage)


def _guess_usage(section: JudgeSection) -> Usage:
    """Of one request, before one was made."""
    is_blind = section.image == "none"
    read = NUM_TEXT_TOKENS if is_blind else guess_prompt_tokens(section.model or "", section.image_detail)
    return Usage(prompt_tokens=read, completion_tokens=section.num_samples * NUM_VERDICT_TOKENS)
