"""`vcot run --dry-run`: the steps that `vcot run` makes, counted as by hand; and nothing is begun."""

import asyncio
import json

import pytest

from tests.services.cli.test_cli import vcot
from tests.services.planning.test_estimate import SHAPE
from tests.services.run.test_results import finish
from vcot.services.planning.assumptions import ANSWER_TOKENS, CANDIDATE_SHARE, H100_80, THOUGHT_TOKENS
from vcot.services.planning.estimate import count_work, estimate_run
from vcot.services.planning.run_plan import plan_run
from vcot.services.recipes.recipe import load_recipe

__all__ = ["vcot"]


def plan(*overrides, recipe="paper", shape=SHAPE, is_nano=False):
    made = plan_run(load_recipe(recipe, overrides), shape, is_nano=is_nano)
    return {step.step: step for step in made.steps}, "\n".join(made.outlook)


def test_the_papers_run_by_hand():
    steps, outlook = plan()
    assert [*steps] == ["sample", "judge", "pair", "train", "merge", "eval", "swap", "report"]
    assert (steps["sample"].num_requests, steps["judge"].num_requests) == (17_056, 8 * 17_056)
    assert steps["sample"].num_tokens == 8 * 17_056 * THOUGHT_TOKENS.likely
    assert steps["judge"].usd == pytest.approx(73, abs=1)
    assert steps["eval"].num_requests == 2_017 * 2 * 2 * 2
    assert steps["eval"].num_tokens == 8_068 * (ANSWER_TOKENS.likely + THOUGHT_TOKENS.likely)
    assert "8 x H100 80 GB" in outlook
    assert [name for name, step in steps.items() if step.usd is not None] == ["judge"]


def test_what_else_a_recipe_may_ask_for_is_a_step():
    judge = 'eval.judge={kind = "pointwise", model = "gpt-4o-mini"}'
    settings = ("tasks.num_tasks=100", "rounds.num=3", "eval.num_tasks=50", "pairs.policy=image_driven", judge)
    steps, _ = plan(*settings)
    assert [*steps][:3] + [*steps][-3:] == ["sample", "judge", "gain", "grade", "swap", "report"]
    assert steps["sample"].num_requests == 300
    assert steps["sample"].what.endswith(", 3 rounds")
    assert steps["gain"].num_requests == round(300 + 2 * 2_400 * CANDIDATE_SHARE.likely)
    assert steps["grade"].usd > 0


def test_the_validation_that_chooses_one_of_several_rounds_is_counted():
    judge = 'eval.judge={kind = "pointwise", model = "gpt-4o-mini", num_audited = 10, image = "none"}'
    settings = ("tasks.num_tasks=100", "eval.num_tasks=50", "eval.num_seeds=2", judge)
    (one, _), (three, _) = plan(*settings), plan(*settings, "rounds.num=3")
    assert "choose" not in one
    assert three["choose"].what.startswith("base and 3 policies, 50 scienceqa questions of validation")
    each = 50 * 2 * 2 * 2  # of two prompts, two temperatures and two seeds
    assert (three["choose"].num_requests, three["eval"].num_requests) == (4 * each, 2 * each)
    assert three["grade"].num_requests == one["grade"].num_requests + 4 * each == 6 * each + 2 * 10
    counts = [count_work(load_recipe("paper", (*settings, f"rounds.num={num}"))) for num in (1, 3)]
    assert [found.num_eval_responses for found in counts] == [2 * each, 6 * each]
    evaluating = [
        estimate_run(load_recipe("paper", (*settings, f"rounds.num={num}")), SHAPE, H100_80, 1) for num in (1, 3)
    ]
    assert evaluating[1].stages[-1].hours.likely > evaluating[0].stages[-1].hours.likely


@pytest.mark.parametrize(
    ("judge", "num"),
    [
        ("{kind = 'pointwise', model = 'gpt-4o-mini', min_auc = 0.6, num_audited = 30}", 4 * 30 * 2),
        ("{kind = 'pointwise', model = 'gpt-4o-mini', min_auc = 0.6, image = 'none'}", 100 * 2),
        ("{kind = 'pairwise', model = 'gpt-4o-mini', min_auc = 0.6}", 5 * 100 * 2),
        (
            "{kind = 'gated', min_auc = 0.6, num_audited = 30, members = [{kind = 'pointwise', model = 'gpt-4o-mini'}]}",
            4 * 30 * 2,
        ),
    ],
)
def test_the_report_card_that_a_least_auc_asks_for_is_counted_once(judge, num):
    settings = ("tasks.num_tasks=100", "rounds.num=2")
    with_card, without = (
        plan(*settings, f"judge={each}")[0]
        for each in (judge, judge.replace("min_auc = 0.6, ", "").replace(", min_auc = 0.6", ""))
    )
    assert with_card["judge"].num_requests == without["judge"].num_requests + num


def test_a_program_is_asked_nothing_and_nano_is_timed_on_two_cores():
    steps, outlook = plan(recipe="nano", shape=None, is_nano=True)
    assert (steps["judge"].num_requests, steps["judge"].what) == (None, "by verifier, a program")
    assert outlook.startswith("12,000 responses take 2.2 (1.1 to 5.0) minutes on two CPU cores")


def test_what_is_not_known_before_it_is_read_is_said():
    table = ("tasks.source=table", 'tasks.columns={question = "q"}')
    steps, outlook = plan(*table, "tasks.num_tasks=", recipe="nano", shape=None, is_nano=True)
    assert steps["sample"].what.startswith("all table tasks x 8 responses")
    assert (steps["sample"].num_requests, steps["judge"].num_requests, steps["eval"].num_requests) == (
        None,
        None,
        7_200,
    )
    assert "known when they are read" in outlook
    assert "config.json of /weights is not here" in plan("model.source=/weights", shape=None)[1]


def test_nothing_is_begun_written_or_asked(vcot, tmp_path):
    code, out, _ = vcot("run", "--dry-run", "--json", "--set", "sample.k=4")
    steps = {step["step"]: step for step in json.loads(out)["steps"]}
    assert (code, steps["sample"]["what"]) == (0, "600 nano tasks x 4 responses at temperature 0.5")
    assert not list(tmp_path.iterdir())
    code, _, err = vcot("run", "--dry-run", "--recipe", "papr")
    assert code == 2
    assert "do you mean paper" in err or "did you mean paper" in err


def test_of_a_run_that_is_there_it_says_what_is_done(vcot, tmp_path):
    run = asyncio.run(finish(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if not path.name.startswith("ledger")}
    code, out, _ = vcot("run", "--dry-run", "--run", run, "--set", "eval.num_seeds=2")
    assert code == 0
    told = out[out.index("What vcot run would do") :]
    held = told.partition("holds of this, and does not ask again:")[2]
    assert [
        cell.strip() for cell in next(line for line in held.splitlines() if "eval base" in line).split("│")[2:7]
    ] == [*("36", "18", "0", "0", "18")]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if not path.name.startswith("ledger")} == before
