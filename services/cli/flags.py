"""Flags that several commands take, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

Json = Annotated[bool, Parameter(negative=(), help="Print the result as JSON, for programs.")]
Wandb = Annotated[
    bool,
    Parameter(
        negative=(), help="Send the training's curves to Weights & Biases (short for --set train.report_to=...)."
    ),
]
Flag = Annotated[bool, Parameter(negative=())]
Tables = Annotated[
    Path | None,
    Parameter(
        help="Also write all tables into this folder (Markdown, LaTeX, CSV, Parquet), and figures, if any, as SVG."
    ),
]
Bundle = Annotated[
    Path | None,
    Parameter(
        help="Serve nothing: write one run's pages into this folder, as files that open from disk without server or network."
    ),
]
NumBundled = Annotated[
    int | None,
    Parameter(
        name="--tasks",
        help="With --bundle: how many tasks, with chains and images (default: 60); the pages say what is left out.",
    ),
]

FileFormat = Annotated[Literal["parquet", "jsonl", "csv"], Parameter(name="--format")]

Audit = Annotated[
    bool,
    Parameter(
        negative=(), help="Judge only responses that are known to be right or wrong, and make the judge's report card."
    ),
]
CardJson = Annotated[bool, Parameter(negative=(), help="With --audit: print the report card as JSON, for programs.")]
MaxCost = Annotated[
    float | None,
    Parameter(
        help="Stop before judging costs the run more dollars than this (short for --set judge.max_cost_usd=...)."
    ),
]
