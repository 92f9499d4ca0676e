"""What a run will take: the paper's counts, arithmetic that can be done by hand, and assumptions that were measured."""

import json
from pathlib import Path

import pytest

from vcot.pipeline.ledger import Ledger
from vcot.pipeline.prompts import PROMPTS, render_options, render_prompt
from vcot.pipeline.records import CheckpointRef, Judgment, Response, SamplingParams, Task, Usage, content_key
from vcot.services.planning import assumptions
from vcot.services.planning.assumptions import A100_80, H100_80, KINDS, THOUGHT_TOKENS, TRAIN_EFFICIENCY, Span
from vcot.services.planning.estimate import count_work, estimate_disk, estimate_run, estimate_run_judge
from vcot.services.planning.judge_estimate import judge_hours
from vcot.services.planning.outlook import render_costs
from vcot.services.recipes.recipe import load_recipe
from vcot.training.protocol.shape import find_shape, read_shape

SHAPE = read_shape(find_shape("llava-hf/llava-1.5-7b-hf"))
DATA = Path(__file__).parents[4] / "shared" / "data"
real_data = pytest.mark.skipif(not (DATA / "aokvqa").is_dir(), reason="needs the extracts of the public data sets")


def paper(*overrides):
    return load_recipe("paper", overrides)


def hours(*overrides, kind=A100_80, num=1):
    run = estimate_run(paper(*overrides), SHAPE, kind, num)
    return {stage.name: stage.hours for stage in run.stages}


def test_the_papers_counts():
    counts = count_work(paper())
    assert (counts.num_tasks, counts.num_responses) == (17_056, 136_448)
    assert counts.num_pairs == Span(10_000, 10_000, 10_000)
    assert counts.num_eval_responses == 2 * 2_017 * 2 * 2
    assert count_work(paper("tasks.num_tasks=100", "sample.k=4", "rounds.num=2")).num_responses == 800
    assert count_work(load_recipe("nano", ("tasks.num_tasks=",))) is None


def test_training_hours_are_six_operations_for_each_parameter_and_token():
    """Of 10,000 pairs: 9,000 train twice, 10 x 1,000 are validated, all pass once for the reference."""
    found = hours()["train"].high  # prompts not shared
    tokens = 2 * (576 + 95 + THOUGHT_TOKENS.high)
    decoder = 6.74e9 - 32_064 * 4096
    forward = 2 * (decoder * tokens + 0.303e9 * 2 * 577)
    flops = (9_000 * 2 * 3 + 10 * 1_000 + 10_000) * forward
    assert found == pytest.approx(flops / (312e12 * TRAIN_EFFICIENCY.high) / 3600, rel=0.02)
    assert hours("train.gradient_checkpointing=false")["train"].high < found
    assert hours("train.epochs=4")["train"].high > 1.7 * found


def test_more_and_faster_cards_take_less_but_the_judge_does_not():
    one, eight = hours(kind=H100_80), hours(kind=H100_80, num=8)
    assert eight["train"].likely == pytest.approx(one["train"].likely / 8)
    assert eight["sample"].likely < one["sample"].likely / 3 < hours()["sample"].likely
    assert eight["judge"] == one["judge"] == hours()["judge"]


@pytest.mark.parametrize(("kind", "num"), KINDS)
def test_a_figure_never_stands_without_its_range(kind, num):
    run = estimate_run(paper(), SHAPE, kind, num)
    for stage in run.stages:
        assert 0 < stage.hours.low < stage.hours.likely < stage.hours.high
    assert run.hours.likely == pytest.approx(sum(stage.hours.likely for stage in run.stages))


def test_the_judges_bill_is_mostly_the_image():
    recipe = paper()
    counts = count_work(recipe)
    judge = estimate_run_judge(recipe, counts)
    assert judge.num_requests == 136_448
    assert judge.input_tokens.likely > 136_448 * 2_833
    assert 60 < judge.dollars.low < judge.dollars.likely < judge.dollars.high < 100
    high = paper("judge.image_detail=high")
    assert estimate_run_judge(high, counts).dollars.likely > 4 * judge.dollars.likely
    thrice = estimate_run_judge(paper("judge.num_samples=3", "judge.temperature=0.7"), counts)
    assert thrice.output_tokens.likely == 3 * judge.output_tokens.likely
    assert thrice.input_tokens.likely == judge.input_tokens.likely
    pairwise = estimate_run_judge(paper("judge.kind=pairwise"), counts)
    each, alone = (found.input_tokens.likely / found.num_requests for found in (pairwise, judge))
    assert each - alone == THOUGHT_TOKENS.likely, "it reads two responses at a time"
    own = paper("judge.base_url=http://judge/v1", "judge.model=mine")
    assert estimate_run_judge(own, counts).dollars is None
    assert estimate_run_judge(paper("judge.kind=verifier"), counts).dollars.high == 0
    lowest_tier = (judge.input_tokens + judge.output_tokens).high / 200_000 / 60
    assert judge_hours(recipe.judge, judge).high == pytest.approx(lowest_tier)


def test_image_gains_are_read_twice_for_what_may_be_chosen_and_take_a_column():
    plain, gained = hours(), hours("pairs.policy=image_driven")
    assert gained.keys() - plain.keys() == {"gain"}
    prompt, flops = 576 + 114, 2 * (6.74e9 - 32_064 * 4096)
    both = 136_448 * assumptions.CANDIDATE_SHARE.likely * 2 * (prompt + THOUGHT_TOKENS.likely) + 17_056 * prompt
    read = both * flops / (312e12 * assumptions.PREFILL_EFFICIENCY.likely) / 3600
    assert read < gained["gain"].likely < 2 * read, "and a token that must be asked for each time"
    lines = list(render_costs(paper("pairs.policy=image_driven"), SHAPE))
    assert lines[1].split() == [
        "cards",
        "prepare",
        "sample",
        "judge",
        "gain",
        "train",
        "merge",
        "evaluate",
        "in",
        "all",
    ]


def test_margins_and_a_judge_of_the_answers_are_in_the_evaluations_hours():
    grader = 'eval.judge={kind = "pointwise", model = "gpt-4o-mini", gold = true}'
    assert hours("eval.margins=true")["evaluate"].likely > hours()["evaluate"].likely
    assert hours(grader)["evaluate"].likely > hours()["evaluate"].likely
    said = [line for line in render_costs(paper(grader), SHAPE) if line.startswith("  eval.judge: up to ")]
    assert len(said) == 1
    assert f"{16_136 + 4 * 2 * 200:,} requests to gpt-4o-mini" in said[0]


def test_disk_is_mostly_weights():
    recipe = paper()
    disk = estimate_disk(recipe, SHAPE, count_work(recipe))
    assert disk["model, in the hub's cache"] == pytest.approx(7.06e9 * 2 / 2**30, rel=0.01)
    assert disk["policy"] == disk["model, in the hub's cache"]
    assert disk["pairs with their images"] == pytest.approx(10_000 * 140_000 / 2**30)
    alone = paper("merge.serve_as=adapter", "train.target_modules=language-model")
    assert estimate_disk(alone, SHAPE, count_work(alone))["policy"] < 1


@real_data
def test_prompts_are_as_long_as_assumed():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(DATA / "llava-1.5-7b-hf" / "tokenizer.json"))
    template = 12  # USER: and ASSISTANT: with line breaks
    rows = json.loads((DATA / "aokvqa" / "aokvqa_v1p0_val.json").read_text())
    problems = json.loads((DATA / "scienceqa" / "problems.json").read_text()).values()

    def mean(name, rows):
        tasks = [Task(id="1", question=q, choices=c, answer=None, source="s", split="train") for q, c in rows]
        return sum(len(tokenizer.encode(render_prompt(name, task)).ids) for task in tasks) / len(tasks) + template

    asked = [(row["question"], tuple(row["choices"])) for row in rows]
    shown = [(row["question"], tuple(row["choices"])) for row in problems if row["image"]]
    assert mean("thought_specific", asked) == pytest.approx(PROMPTS.resolve("thought_specific").num_tokens, abs=3)
    for name in ("zero_shot", "cot"):
        assert mean(name, shown) == pytest.approx(PROMPTS.resolve(name).num_tokens, abs=3)
    judge = (Path(__file__).parents[3] / "pipeline" / "judges" / "pointwise.txt").read_text()
    filled = [judge.replace("<question>", q).replace("<options>", render_options(c)) for q, c in asked[:200]]
    lengths = [len(tokenizer.encode(text).ids) for text in filled]
    assert sum(lengths) / len(lengths) == pytest.approx(assumptions.JUDGE_TEXT_TOKENS, rel=0.1)


def test_records_are_as_large_as_assumed(tmp_path):
    """With about 200 tokens of text, keys in no order, and SQLite's own files."""
    thought, answer = "the image shows an old table " * 26, "So the answer is (B) a table. " * 4
    made = CheckpointRef(name="base", digest="sha256:" + "a" * 64, kind="base")
    sampling = SamplingParams(temperature=0.5, max_tokens=1024, n=8, seed=1)
    keys = [content_key(number=number) for number in range(2000)]
    responses = [
        Response(
            key=key, group=key, task="22MexNkBPpdZGX6sxbxVBH", index=0, checkpoint=made, prompt="thought_specific",
            sampling=sampling, text=f"{thought}<R>{answer}", thought=thought, answer=answer, finish_reason="stop",
        )
        for key in keys
    ]  # fmt: skip
    judgments = [
        Judgment(
            key=key, response=key, task="22MexNkBPpdZGX6sxbxVBH", judge="pointwise/1:gpt-4o-mini", score=7.0,
            rationale="The response is right about the table. " * 8,
            usage=Usage(prompt_tokens=3200, completion_tokens=90),
        )
        for key in keys
    ]  # fmt: skip
    for name, records, assumed in (
        ("responses", responses, assumptions.RESPONSE_BYTES),
        ("judgments", judgments, assumptions.JUDGMENT_BYTES),
    ):
        ledger = Ledger(tmp_path / name)
        for start in range(0, len(records), 50):
            ledger.put(records[start : start + 50])
        ledger.close()
        assert (tmp_path / name).stat().st_size / len(records) == pytest.approx(assumed, rel=0.3)
