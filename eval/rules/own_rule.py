"""Ours, as evaluations of our own runs read: what a person reads at once, and never a guess (pipeline/parsers.py)."""

from __future__ import annotations

from eval.rules import Rule
from pipeline.parsers import explain_unread, parse_choice

VCOT = Rule(parse_choice, explain=explain_unread, minds_cut=True)
