"""The lists that a recipe picks from, and that anyone can add to: what is built in, and where packages announce theirs.

A recipe only checks a name. What an object of a list must be is said where such objects live, as in pipeline/sources/.
docs/extending.md shows how to write one of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vcot.pipeline.plugins import Plugins

SOURCE_NAMES: Plugins[Any] = Plugins(
    "source",
    "vcot.sources",
    {
        "nano": "vcot.pipeline.sources.nano.questions:NANO",
        "aokvqa": "vcot.pipeline.sources.aokvqa:AOKVQA",
        "aokvqa_da": "vcot.pipeline.sources.aokvqa:AOKVQA_DA",
        "scienceqa": "vcot.pipeline.sources.scienceqa:SCIENCEQA",
        "scienceqa_all": "vcot.pipeline.sources.scienceqa:SCIENCEQA_ALL",
        "unusual": "vcot.pipeline.sources.unusual:UNUSUAL_THINGS",
        "absent": "vcot.pipeline.sources.absent:ABSENT_THINGS",
        "visual_genome": "vcot.pipeline.sources.visual_genome:VISUAL_GENOME",
        "table": "vcot.pipeline.sources.own_table:TABLE",
        "mix": "vcot.pipeline.sources.mix:MIX",
    },
)
PROMPT_NAMES: Plugins[Any] = Plugins(
    "prompt",
    "vcot.prompts",
    {
        "thought_specific": "vcot.pipeline.prompts:THOUGHT_SPECIFIC",
        "thought_generic": "vcot.pipeline.prompts:THOUGHT_GENERIC",
        "zero_shot": "vcot.pipeline.prompts:ZERO_SHOT",
        "cot": "vcot.pipeline.prompts:COT",
        "two_stage": "vcot.pipeline.prompts:TWO_STAGE",
        "caption_first": "vcot.pipeline.prompts:CAPTION_FIRST",
        "short_answer": "vcot.pipeline.prompts:SHORT_ANSWER",
    },
)
JUDGE_NAMES: Plugins[Any] = Plugins(
    "judge",
    "vcot.judges",
    {
        "verifier": "vcot.pipeline.judges.verifier:Verifier",
        "pointwise": "vcot.pipeline.judges.pointwise:PointwiseJudge",
        "expected": "vcot.pipeline.judges.expected:ExpectedJudge",
        "claims": "vcot.pipeline.judges.claims:ClaimsJudge",
        "pairwise": "vcot.pipeline.judges.pairwise:PairwiseJudge",
        "gated": "vcot.pipeline.judges.gated:GatedJudge",
        "ensemble": "vcot.pipeline.judges.ensemble:EnsembleJudge",
    },
)
PAIR_POLICY_NAMES: Plugins[Any] = Plugins(
    "pair policy",
    "vcot.pair_policies",
    {
        "best_worst": "vcot.pipeline.pair_policies:pick_best_worst",
        "right_wrong": "vcot.pipeline.pair_policies:pick_right_wrong",
        "gold_aware": "vcot.pipeline.pair_policies:pick_gold_aware",
        "margin": "vcot.pipeline.pair_policies:pick_by_margin",
        "length_matched": "vcot.pipeline.pair_policies:pick_length_matched",
        "length_penalised": "vcot.pipeline.pair_policies:pick_length_penalised",
        "rating": "vcot.pipeline.pair_policies:pick_by_rating",
        "image_driven": "vcot.pipeline.pair_policies:pick_image_driven",
    },
)
BENCHMARK_NAMES: Plugins[Any] = Plugins(
    "benchmark",
    "vcot.benchmarks",
    {
        "nano": "vcot.eval.benchmarks.nano_world:NANO",
        "scienceqa": "vcot.eval.benchmarks.scienceqa_img:SCIENCEQA",
        "scienceqa_all": "vcot.eval.benchmarks.scienceqa_whole:SCIENCEQA_ALL",
        "aokvqa": "vcot.eval.benchmarks.aokvqa_mc:AOKVQA",
        "aokvqa_da": "vcot.eval.benchmarks.aokvqa_direct:AOKVQA_DA",
        "unusual": "vcot.eval.benchmarks.unusual_things:UNUSUAL",
        "absent": "vcot.eval.benchmarks.absent_things:ABSENT",
        "table": "vcot.eval.benchmarks.own_questions:TABLE",
    },
)
RULE_NAMES: Plugins[Any] = Plugins(
    "rule",
    "vcot.rules",
    {
        "vcot": "vcot.eval.rules.own_rule:VCOT",
        "scienceqa": "vcot.eval.rules.scienceqa_rule:SCIENCEQA_OFFICIAL",
        "llava": "vcot.eval.rules.llava_rule:LLAVA",
        "lmms_eval": "vcot.eval.rules.lmms_eval_rule:LMMS_EVAL",
        "vlmevalkit": "vcot.eval.rules.vlmevalkit_rule:VLMEVALKIT",
        "inspect": "vcot.eval.rules.inspect_rule:INSPECT",
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
