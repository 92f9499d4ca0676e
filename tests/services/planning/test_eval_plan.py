"""`vcot eval --plan`: counts that can be done by hand, and a smallest difference that the evaluation then finds."""

import asyncio
import json

import pytest

from tests.services.cli.test_cli import vcot
from tests.services.planning.test_estimate import SHAPE
from tests.services.run.test_results import finish
from vcot.eval.statistics import Noise
from vcot.pipeline.errors import InputError, RecipeError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges import find_judge
from vcot.pipeline.sections import JudgeSection
from vcot.services.planning.assumptions import (
    ANSWER_TOKENS,
    JUDGE_TEXT_TOKENS,
    NANO_RESPONSES_S,
    OPTIONS,
    THOUGHT_TOKENS,
)
from vcot.services.planning.eval_plan import Known, Owed, describe_plan, plan_evaluation, render_plan
from vcot.services.planning.judge_estimate import count_audit
from vcot.services.recipes.recipe import load_recipe
from vcot.services.run.auditing import list_ways

__all__ = ["vcot"]


def plan(*overrides, num_checkpoints=2, known=Known(), recipe="paper", shape=SHAPE, is_nano=False):  # noqa: B008 - frozen
    return plan_evaluation(load_recipe(recipe, overrides), num_checkpoints, known, shape, is_nano=is_nano)


def test_the_papers_evaluation_by_hand():
    found = plan()
    assert (found.num_requests, found.num_answered) == (2_017 * 2 * 2 * 2, 0)
    assert found.image_tokens == 16_136 * 576
    assert found.prompt_tokens == pytest.approx(16_136 * (576 + 95), rel=0.03)
    assert found.completion_tokens.likely == 8_068 * (ANSWER_TOKENS.likely + THOUGHT_TOKENS.likely)
    assert (found.grading, found.num_option_requests) == (None, 0)
    hours = {each.hardware: each.hours for each in found.times}
    assert 0 < hours["8 x H100 80 GB"].likely < hours["1 x A100 80 GB"].likely
    assert all(each.low < each.likely < each.high for each in hours.values())


def test_seeds_samples_and_images_are_counted():
    found = plan("eval.num_seeds=2", "eval.num_samples=3", 'eval.images=["true", "blank"]', num_checkpoints=3)
    assert found.num_requests == 2_017 * 2 * 2 * 2 * 2 * 3
    assert found.num_responses == 6
    assert found.completion_tokens.likely == found.num_requests / 2 * 3 * (ANSWER_TOKENS.likely + THOUGHT_TOKENS.likely)


def test_requests_without_an_image_have_no_image_tokens():
    both = plan('eval.images=["true", "question_only"]')
    assert (both.num_requests, both.image_tokens) == (2 * 16_136, 16_136 * 576)
    assert both.prompt_tokens - both.image_tokens == 2 * (plan().prompt_tokens - plan().image_tokens)


def test_margins_are_a_request_for_each_option_and_image_and_read_whole_prompts():
    asked, margins = plan('eval.images=["true", "blank"]'), plan('eval.images=["true", "blank"]', "eval.margins=true")
    num = 2_017 * 2 * 2 * OPTIONS
    assert (margins.num_option_requests, margins.num_requests - asked.num_requests) == (num, num)
    assert margins.image_tokens - asked.image_tokens == num * 576
    assert margins.completion_tokens.likely - asked.completion_tokens.likely == num, "one token must be asked for"
    assert all(more.hours.likely > less.hours.likely for more, less in zip(margins.times, asked.times, strict=True))
    table, _ = render_plan(margins)
    assert ["  of them for margins", f"{num:,}, if a question has {OPTIONS} options"] in rows(table)


def test_margins_of_a_run_are_counted_by_its_own_questions():
    owed = {"zero_shot": 0, "cot": 0}
    found = plan("eval.margins=true", known=Known(owed=owed, num_questions=2_017, options=Owed(9_000, 100)))
    assert (found.num_option_requests, found.num_requests - found.num_answered) == (9_000, 100)
    assert found.completion_tokens.high == 100
    assert ["  of them for margins", "9,000"] in rows(render_plan(found)[0])


JUDGE = 'eval.judge={kind = "pointwise", model = "gpt-4o-mini", gold = true, num_audited = 50, image = "none"}'


def test_a_judge_of_the_answers_is_counted_and_priced_with_its_report_card():
    found = plan(JUDGE)
    assert found.grading.num_requests == 16_136 + 2 * 50, "each answer, and the card's two of each task asked again"
    assert found.grading.prompt_tokens.likely == found.grading.num_requests * (
        JUDGE_TEXT_TOKENS + THOUGHT_TOKENS.likely
    )
    tokens = found.grading.prompt_tokens.likely * 0.15 + found.grading.completion_tokens.likely * 0.60
    assert found.grading.usd.likely == pytest.approx(tokens / 1e6)
    assert 0 < found.grading.hours.low < found.grading.hours.high
    assert (
        "The judge gpt-4o-mini is owed up to 16,236 requests, its report card's included, for about $"
        in describe_plan(found)
    )
    assert any(name == "cost" and "for gpt-4o-mini" in value for name, value in rows(render_plan(found)[0]))
    seeing = plan(JUDGE.replace('image = "none"', 'image = "own"'))
    assert seeing.grading.num_requests == 16_136 + 4 * 2 * 50
    assert seeing.grading.prompt_tokens.likely > 16_136 * 2_833
    claims = plan(JUDGE.replace("pointwise", "claims"))
    assert claims.grading.num_requests > 5 * 16_136


def test_what_is_judged_costs_nothing_again():
    found = plan(JUDGE, known=Known(num_owed_judge=0))
    assert (found.grading.num_answered, found.grading.usd.high) == (16_236, 0)
    assert "has scored all answers" in describe_plan(found)


def test_a_judge_of_an_unknown_price_is_asked_for_it_and_a_program_costs_nothing():
    own = plan('eval.judge={kind = "pointwise", model = "mine", base_url = "http://judge/v1"}')
    assert own.grading.usd is None
    assert any("the price of mine is not known" in value for _, value in rows(render_plan(own)[0]))
    assert plan('eval.judge={kind = "verifier"}').grading is None


def test_a_judge_that_would_be_refused_is_refused_before():
    with pytest.raises(RecipeError, match=r"eval\.judge\.kind = pairwise scores an answer by the others"):
        plan('eval.judge={kind = "pairwise", model = "gpt-4o-mini"}')


def test_the_card_is_asked_in_as_many_ways_as_the_plan_counts(tmp_path):
    for image, num in (("own", 5), ("none", 2)):
        section = JudgeSection(kind="pointwise", model="gpt-4o-mini", image=image)
        assert len(list_ways(find_judge(section, ImageStore(tmp_path)))) == num
        assert count_audit(section, 3) == (num - 1) * 3 * 2


def rows(table):
    return [list(pair) for pair in zip(*(column.cells for column in table.columns), strict=True)]


def test_what_is_answered_is_neither_read_nor_timed_again():
    none = plan(known=Known(owed={"zero_shot": 0, "cot": 0}, num_questions=2_017))
    assert (none.num_answered, none.prompt_tokens, none.completion_tokens.high, none.times) == (16_136, 0, 0, ())
    half = plan(known=Known(owed={"zero_shot": 0, "cot": 100}, num_questions=2_017))
    assert (half.num_answered, half.completion_tokens.likely) == (16_036, 100 * THOUGHT_TOKENS.likely)
    assert "The run has answered 16,036 of them. The 100 that are owed take about" in describe_plan(half)


def test_nano_is_timed_on_two_cores_and_an_unknown_shape_has_no_tokens_of_prompts():
    [time] = plan(recipe="nano", is_nano=True).times
    assert time.hours.likely == pytest.approx(7_200 / NANO_RESPONSES_S.likely / 3600)
    found = plan(shape=None)
    assert (found.prompt_tokens, found.times) == (None, ())


def test_a_benchmark_of_unknown_size_is_asked_for_its_number():
    with pytest.raises(InputError, match=r"set eval.num_tasks"):
        plan("eval.num_tasks=", recipe="nano")
    with pytest.raises(InputError, match=r"2 or more"):
        plan("eval.num_tasks=1", recipe="nano")


def test_the_validation_split_of_several_rounds_is_said_to_come_beside():
    assert "validation" not in describe_plan(plan())
    said = describe_plan(plan("rounds.num=3", "tasks.num_tasks=100"))
    assert "of the base and 3 policies; that is not counted here" in said


def test_one_checkpoint_is_compared_with_none():
    assert describe_plan(plan(num_checkpoints=1)).endswith("One checkpoint alone is compared with none.")


def test_what_is_known_takes_the_place_of_what_is_assumed():
    found = plan(known=Known(noise=Noise(accuracy=0.8, correlation=0.5, alike=0.7)))
    assert (found.noise, found.detectable.low) == ("measured", found.detectable.high)
    assert found.detectable.low < plan().detectable.likely
    assert found.detectable_corrected > found.detectable.likely
    assert "answers is measured: 0.50" in describe_plan(found)


def test_without_a_run_the_recipe_is_planned_and_nothing_is_begun(vcot, tmp_path):
    code, out, _ = vcot("eval", "--plan", "--json")
    assert (code, json.loads(out)["num_requests"]) == (0, 7_200)
    assert not list(tmp_path.iterdir())
    code, _, err = vcot("eval", "base", "--plan")
    assert code == 2
    assert "no run that could hold base" in err


def test_a_run_that_is_evaluated_says_what_is_left_and_what_it_measured(vcot, tmp_path):
    run = asyncio.run(finish(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if not path.name.startswith("ledger")}
    _, out, _ = vcot("eval", "--plan", "--json", "--run", run)
    found = json.loads(out[out.index("{\n") :])  # behind what `finish` printed
    assert (found["num_requests"], found["num_answered"], found["noise"]) == (36, 36, "measured")
    code, out, _ = vcot("eval", "--plan", "--run", run, "--set", "eval.num_seeds=2")
    assert (code, "72, 36 of them answered already" in out) == (0, True)
    assert "is measured" in out
    _, out, _ = vcot("eval", "base", "--plan", "--json", "--run", run)
    assert (json.loads(out)["num_checkpoints"], json.loads(out)["num_answered"]) == (1, 18)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if not path.name.startswith("ledger")} == before


def test_a_run_says_what_is_left_of_margins_and_of_the_judge(vcot, tmp_path):
    run = asyncio.run(finish(tmp_path))
    _, out, err = vcot("eval", "--plan", "--json", "--run", run, "--set", "eval.margins=true", JUDGE)
    found = json.loads(out[out.index("{\n") :])  # behind what `finish` printed
    tasks = [json.loads(line) for path in run.glob("tasks/*.jsonl") for line in path.read_text().splitlines()]
    num_options = sum(len(task["choices"]) for task in tasks if task["split"] == "test")
    assert found["num_option_requests"] == 2 * num_options == found["num_requests"] - found["num_answered"], err
    assert found["are_options_counted"]
    grading = found["grading"]
    texts = grading["num_requests"] - grading["num_answered"] - 2 * 9  # of the card
    assert 0 < texts <= 36, "answers to a question that say the same are judged once"
