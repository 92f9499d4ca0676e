"""What judging costs: the estimate, the running total and the cap."""

import pytest

from vcot.pipeline.errors import RecipeError, RequestError
from vcot.pipeline.judges.cost import (
    Cost,
    Prices,
    describe_tokens,
    describe_usd,
    estimate_cost,
    find_prices,
    guess_prompt_tokens,
    open_meter,
)
from vcot.pipeline.records import Usage
from vcot.pipeline.sections import JudgeSection
from vcot.services.recipes.recipe import load_recipe

ONE_CENT = Prices(input_usd=10.0, output_usd=0.0)
NOTHING = Usage(prompt_tokens=0, completion_tokens=0)


def make_section(**fields):
    return JudgeSection(kind="pointwise", model="gpt-4o-mini", **fields)


def make_usage(prompt_tokens=1000, completion_tokens=0):
    return Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)


def test_the_papers_run_is_estimated():
    cost = estimate_cost(136_488, 3200, 60, find_prices(make_section()))
    assert cost.usd == pytest.approx(136_488 * (3200 * 0.15 + 60 * 0.60) / 1e6)
    assert cost.summary == "136,488 requests: 445.0 M tokens, $70.43"


def test_an_unknown_model_is_counted_in_tokens_and_a_recipes_prices_win():
    unknown = JudgeSection(kind="pointwise", model="mine")
    assert find_prices(unknown) is None
    assert estimate_cost(2, 500, 5, None).summary == "2 requests: 1.0 k tokens"
    assert find_prices(make_section(input_usd=1.0, output_usd=2.0)) == Prices(input_usd=1.0, output_usd=2.0)
    with pytest.raises(RecipeError, match="belong together"):
        load_recipe("paper", ["judge.input_usd=1.0"])


def test_a_batch_costs_half_of_what_the_table_says_and_what_the_recipe_says():
    whole, half = find_prices(make_section()), find_prices(make_section(batch=True))
    assert (half.input_usd, half.output_usd) == (whole.input_usd / 2, whole.output_usd / 2)
    assert find_prices(make_section(batch=True, input_usd=1.0, output_usd=2.0)) == Prices(input_usd=1.0, output_usd=2.0)


def test_costs_add_up_and_have_no_sum_in_dollars_where_one_is_not_known():
    one = Cost(num_requests=1, usage=make_usage(5, 2), usd=0.25)
    assert one.summary == "1 request: 7 tokens, $0.25"
    assert one + one == Cost(num_requests=2, usage=make_usage(10, 4), usd=0.5)
    unknown = one.model_copy(update={"usd": None})
    for total in (one + unknown, unknown + one, unknown + unknown):
        assert total == Cost(num_requests=2, usage=make_usage(10, 4), usd=None)


@pytest.mark.parametrize(
    ("model", "detail", "size", "tokens"),
    [
        ("gpt-4o-mini", "low", (640, 480), 2833),
        ("gpt-4o-mini", "high", (300, 300), 8500),
        ("gpt-4o-mini", "high", (640, 480), 2833 + 2 * 5667),
        ("gpt-4o", "high", (4096, 2048), 85 + 170 * 6),
        ("gpt-4o", "high", (4096, 512), 85 + 170 * 4),
        ("mine", "high", (300, 300), 85 + 170),
        ("gpt-4.1-mini", "high", (640, 480), 486),
    ],
)
def test_an_image_is_counted_as_openai_bills_it(model, detail, size, tokens):
    width, height = size
    assert guess_prompt_tokens(model, detail, width=width, height=height, num_text_tokens=0) == tokens


@pytest.mark.parametrize(
    ("model", "detail", "tokens"),
    [("gpt-4o-mini", "low", 2833), ("gpt-4o-mini", "high", 2833 + 2 * 5667), ("gpt-4.1-mini", "high", 486)],
)
def test_by_default_a_photo_and_350_tokens_of_text_are_expected(model, detail, tokens):
    assert guess_prompt_tokens(model, detail) == tokens + 350


@pytest.mark.parametrize(
    ("num_tokens", "usd", "said"),
    [
        (999, None, "999 tokens"),
        (1000, 0.0, "1.0 k tokens, $0.00"),
        (10**6, 1.0, "1.0 M tokens, $1.00"),
        (10**9, 1234.5, "1,000.0 M tokens, $1,234.50"),
        (10, 0.0123, "10 tokens, $0.012"),
    ],
)
def test_tokens_and_dollars_are_said_as_people_do(num_tokens, usd, said):
    assert describe_tokens(num_tokens) + describe_usd(usd) == said


def test_an_estimate_goes_by_what_was_paid_and_before_that_by_the_test():
    meter = open_meter(make_section(), 0, NOTHING, make_usage(3000, 50))
    assert meter.estimate(10).usage == make_usage(30_000, 500)
    assert meter.summary == ""
    for usage in (make_usage(2500, 20), make_usage(1500, 0)):
        meter.begin()
        meter.end(usage)
    assert meter.estimate(10).usage == make_usage(20_000, 100)
    assert (meter.cost.num_requests, meter.cost.usage) == (2, make_usage(4000, 20))
    assert meter.summary.startswith("4.0 k tokens, $0.0006")


def test_before_any_test_an_estimate_goes_by_the_models_image():
    for detail, num_tokens in (("high", 2833 + 2 * 5667), ("low", 2833)):
        section = make_section(image_detail=detail)
        assert open_meter(section, 0, NOTHING).estimate(1).usage == make_usage(num_tokens + 350, 60)
    several = make_section(image="none", num_samples=5, temperature=0.7)
    assert open_meter(several, 0, NOTHING).estimate(1).usage == make_usage(350, 5 * 60)


def test_the_cap_counts_what_runs_and_what_earlier_commands_paid():
    meter = open_meter(make_section(max_cost_usd=0.05, input_usd=10.0, output_usd=0.0), 2, make_usage(2000))
    meter.begin()
    meter.begin()
    meter.begin()
    with pytest.raises(RequestError, match=r"one more request could exceed judge\.max_cost_usd = 0\.05") as caught:
        meter.begin()
    assert (caught.value.scope, caught.value.reason) == ("account", "budget")
    meter.end(None)  # it was not billed, so there is room again
    meter.begin()
    with pytest.raises(RequestError):
        meter.begin()


def test_a_dearer_judgment_makes_the_cap_more_careful():
    meter = open_meter(make_section(max_cost_usd=0.05, input_usd=10.0, output_usd=0.0), 0, NOTHING, make_usage(1000))
    meter.begin()
    meter.begin()
    meter.end(make_usage(2600))
    meter.end(make_usage(400))
    with pytest.raises(RequestError):
        meter.begin()


@pytest.mark.parametrize("num_paid", range(1, 40))
def test_a_cap_that_is_met_to_the_cent_allows_the_last_request_in_batches_and_alone(num_paid):
    """Of binary fractions: (0.07 - 0.06) / 0.01 is below 1. A batch of none would be submitted for ever."""
    section = make_section(max_cost_usd=round((num_paid + 1) * 0.01, 2), input_usd=10.0, output_usd=0.0)
    meter = open_meter(section, num_paid, make_usage(1000 * num_paid))
    num_affordable = meter.count_affordable()
    try:
        meter.begin()
    except RequestError:
        assert num_affordable == 0
    else:
        assert num_affordable == 1


def test_the_cap_allows_as_many_more_as_the_dearest_so_far_would_take():
    def open_with(max_usd, prices=(10.0, 0.0), num_requests=0, usage=NOTHING):
        section = make_section(max_cost_usd=max_usd, input_usd=prices[0], output_usd=prices[1])
        return open_meter(section, num_requests, usage, make_usage(1000))

    assert open_with(None).count_affordable() is None
    assert open_with(0.05, prices=(0.0, 0.0)).count_affordable() is None
    assert open_with(0.059).count_affordable() == 5
    assert open_with(0.5, num_requests=2, usage=make_usage(40_000)).count_affordable() == 0, "0.1 of one that takes 0.2"
    assert open_with(0.5, num_requests=9, usage=make_usage(90_000)).count_affordable() == 0, "more is paid than that"
    meter = open_with(0.5)
    for usage in (make_usage(10_000), make_usage(2000)):
        meter.begin()
        meter.end(usage)
    assert meter.count_affordable() == 3


def test_a_free_judge_never_meets_its_cap():
    meter = open_meter(make_section(max_cost_usd=0.05, input_usd=0.0, output_usd=0.0), 0, NOTHING, make_usage(1000))
    meter.begin()
    meter.end(make_usage(2600))
    meter.begin()
    assert meter.cost.usd == 0


def test_a_cap_needs_prices():
    with pytest.raises(RecipeError, match=r"prices of mine are not known; set judge\.input_usd"):
        open_meter(JudgeSection(kind="pointwise", model="mine", max_cost_usd=1.0), 0, NOTHING)
