"""The lists that a recipe picks from, and that anyone can add to: what is built in, and where packages announce theirs.

A recipe only checks a name. What an object of a list must be is said where such objects live, as in pipeline/sources/.
docs/extending.md shows how to write one of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.plugins import Plugins

SOURCE_NAMES: Plugins[Any] = Plugins(
    "source",
    "vcot.sources",
    {
        "nano": "pipeline.sources.nano.questions:NANO",
        "aokvqa": "pipeline.sources.aokvqa:AOKVQA",
        "aokvqa_da": "pipeline.sources.aokvqa:AOKVQA_DA",
        "scienceqa": "pipeline.sources.scienceqa:SCIENCEQA",
        "scienceqa_all": "pipeline.sources.scienceqa:SCIENCEQA_ALL",
        "unusual": "pipeline.sources.unusual:UNUSUAL_THINGS",
        "absent": "pipeline.sources.absent:ABSENT_THINGS",
        "visual_genome": "pipeline.sources.visual_genome:VISUAL_GENOME",
        "table": "pipeline.sources.own_table:TABLE",
        "mix": "pipeline.sources.mix:MIX",
    },
)
PROMPT_NAMES: Plugins[Any] = Plugins(
    "prompt",
    "vcot.prompts",
    {
        "thought_specific": "pipeline.prompts:THOUGHT_SPECIFIC",
        "thought_generic": "pipeline.prompts:THOUGHT_GENERIC",
        "zero_shot": "pipeline.prompts:ZERO_SHOT",
        "cot": "pipeline.prompts:COT",
        "two_stage": "pipeline.prompts:TWO_STAGE",
        "caption_first": "pipeline.prompts:CAPTION_FIRST",
        "short_answer": "pipeline.prompts:SHORT_ANSWER",
    },
)
JUDGE_NAMES: Plugins[Any] = Plugins(
    "judge",
    "vcot.judges",
    {
        "verifier": "pipeline.judges.verifier:Verifier",
        "pointwise": "pipeline.judges.pointwise:PointwiseJudge",
        "expected": "pipeline.judges.expected:ExpectedJudge",
        "claims": "pipeline.judges.claims:ClaimsJudge",
        "pairwise": "pipeline.judges.pairwise:PairwiseJudge",
        "gated": "pipeline.judges.gated:GatedJudge",
        "ensemble": "pipeline.judges.ensemble:EnsembleJudge",
    },
)
PAIR_POLICY_NAMES: Plugins[Any] = Plugins(
    "pair policy",
    "vcot.pair_policies",
    {
        "best_worst": "pipeline.pair_policies:pick_best_worst",
        "right_wrong": "pipeline.pair_policies:pick_right_wrong",
        "gold_aware": "pipeline.pair_policies:pick_gold_aware",
        "margin": "pipeline.pair_policies:pick_by_margin",
        "length_matched": "pipeline.pair_policies:pick_length_matched",
        "length_penalised": "pipeline.pair_policies:pick_length_penalised",
        "rating": "pipeline.pair_policies:pick_by_rating",
        "image_driven": "pipeline.pair_policies:pick_image_driven",
    },
)
BENCHMARK_NAMES: Plugins[Any] = Plugins(
    "benchmark",
    "vcot.benchmarks",
    {
        "nano": "eval.benchmarks.nano_world:NANO",
        "scienceqa": "eval.benchmarks.scienceqa_img:SCIENCEQA",
        "scienceqa_all": "eval.benchmarks.scienceqa_whole:SCIENCEQA_ALL",
        "aokvqa": "eval.benchmarks.aokvqa_mc:AOKVQA",
        "aokvqa_da": "eval.benchmarks.aokvqa_direct:AOKVQA_DA",
        "unusual": "eval.benchmarks.unusual_things:UNUSUAL",
        "absent": "eval.benchmarks.absent_things:ABSENT",
        "table": "eval.benchmarks.own_questions:TABLE",
    },
)
RULE_NAMES: Plugins[Any] = Plugins(
    "rule",
    "vcot.rules",
    {
        "vcot": "eval.rules.own_rule:VCOT",
        "scienceqa": "eval.rules.scienceqa_rule:SCIENCEQA_OFFICIAL",
        "llava": "eval.rules.llava_rule:LLAVA",
        "lmms_eval": "eval.rules.lmms_eval_rule:LMMS_EVAL",
        "vlmevalkit": "eval.rules.vlmevalkit_rule:VLMEVALKIT",
        "inspect": "eval.rules.inspect_rule:INSPECT",
    },
)
TRL_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
"""TRL's names of the losses that its trainer computes."""
LOSSES: Plugins[Callable[..., Any]] = Plugins(
    "loss",
    "vcot.losses",
    dict.fromkeys(TRL_LOSSES, "trl:DPOTrainer"),
    is_one=callable,
    must_be="a function of log-probs (docs/extending.md)",
)
