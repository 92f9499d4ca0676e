"""What judging costs: the estimate, the running total and the cap."""

import pytest

from pipeline.errors import RecipeError, RequestError
from pipeline.judges.cost import Prices, estimate_cost, find_prices, guess_prompt_tokens, open_meter
from pipeline.recipe import JudgeSection, load_recipe
from pipeline.records import Usage

ONE_CENT = Prices(input_usd=10.0, output_usd=0.0)
NOTHING = Usage(prompt_tokens=0, completion_tokens=0)


def make_section(**fields):
    return JudgeSection(kind="pointwise", model="gpt-4o-mini", **fields)


def make_usage(prompt_tokens=1000, completion_tokens=0):
    return Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)


def test_the_papers_run_is_estimated():
    cost = estimate_cost(136_488, 3200, 60, find_prices(make_section()))
    assert cost.usd == pytest.approx(136_488 * (3200 * 0.15 + 60 * 0.60) / 1e6)
    assert cost.summary == "136,488 judgments: 445.0 M tokens, $70.43"


def test_an_unknown_model_is_counted_in_tokens_and_a_recipes_prices_win():
    unknown = JudgeSection(kind="pointwise", model="mine")
    assert find_prices(unknown) is None
    assert estimate_cost(2, 500, 5, None).summary == "2 judgments: 1.0 k tokens"
    assert find_prices(make_section(input_usd=1.0, output_usd=2.0)) == Prices(input_usd=1.0, output_usd=2.0)
    with pytest.raises(RecipeError, match="belong together"):
        load_recipe("paper", ["judge.input_usd=1.0"])


@pytest.mark.parametrize(
    ("model", "detail", "size", "tokens"),
    [
        ("gpt-4o-mini", "low", (640, 480), 2833),
        ("gpt-4o-mini", "high", (300, 300), 8500),
        ("gpt-4o-mini", "high", (640, 480), 2833 + 2 * 5667),
        ("gpt-4o", "high", (4096, 2048), 85 + 170 * 6),
        ("gpt-4.1-mini", "high", (640, 480), 486),
    ],
)
def test_an_image_is_counted_as_openai_bills_it(model, detail, size, tokens):
    width, height = size
    assert guess_prompt_tokens(model, detail, width=width, height=height, num_text_tokens=0) == tokens


def test_an_estimate_goes_by_what_was_paid_and_before_that_by_the_test():
    meter = open_meter(make_section(), 0, NOTHING, make_usage(3000, 50))
    assert meter.estimate(10).usage == make_usage(30_000, 500)
    meter.begin()
    meter.end(make_usage(2000, 10))
    assert meter.estimate(10).usage == make_usage(20_000, 100)
    assert meter.summary.startswith("2.0 k tokens, $0.0003")


def test_the_cap_counts_what_runs_and_what_earlier_commands_paid():
    meter = open_meter(make_section(max_cost_usd=0.05, input_usd=10.0, output_usd=0.0), 2, make_usage(2000))
    meter.begin()
    meter.begin()
    meter.begin()
    with pytest.raises(RequestError, match=r"one more judgment could exceed judge\.max_cost_usd = 0\.05") as caught:
        meter.begin()
    assert (caught.value.scope, caught.value.reason) == ("account", "budget")
    meter.end(None)  # it was not billed, so there is room again
    meter.begin()


def test_a_dearer_judgment_makes_the_cap_more_careful():
    meter = open_meter(make_section(max_cost_usd=0.05, input_usd=10.0, output_usd=0.0), 0, NOTHING, make_usage(1000))
    meter.begin()
    meter.end(make_usage(2600))
    with pytest.raises(RequestError):
        meter.begin()


def test_a_cap_needs_prices():
    with pytest.raises(RecipeError, match=r"prices of mine are not known; set judge\.input_usd"):
        open_meter(JudgeSection(kind="pointwise", model="mine", max_cost_usd=1.0), 0, NOTHING)
