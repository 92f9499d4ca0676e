"""Ours, as evaluations of our own runs read: what a person reads at once, and never a guess (pipeline/parsers.py)."""

from __future__ import annotations

from vcot.eval.rules import Rule
from vcot.pipeline.parsers import parse_or_explain

VCOT = Rule(parse_or_explain, minds_cut=True)
