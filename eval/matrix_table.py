"""The parser matrix in a terminal (a row for each rule, the differences between logs), and what it shows in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from vcot.eval.matrix import LogDifference, Matrix
from vcot.eval.rules import OWN, UNREAD
from vcot.eval.table import (
    LEVEL,
    OVERALL,
    format_estimate,
    format_p,
    format_p_cell,
    format_range,
    list_phrases,
    new_table,
)


def render_matrix(found: Matrix, columns: Sequence[str]) -> list[RenderableType]:
    """Tables and sentences."""
    parts: list[RenderableType] = [_render_results(found, (OVERALL, *columns))]
    parts += [Text(text) for text in (*found.notes, *describe_reasons(found))]
    if found.differences:
        parts += [_render_differences(found.differences), *(Text(f"\n{text}") for text in describe_logs(found))]
    return parts


def _render_results(found: Matrix, columns: Sequence[str]) -> Table:
    table = new_table(
        f"Accuracy on {found.benchmark} {found.split} in %, ± half of the 95 % interval (clustered by image)",
        "unread: in %, no readable answer, not correct. of read: accuracy among the others. "
        "*: unread as worth a guess, as its original draws one.",
        (*columns, "unread", "of read", "n"),
    )
    for log in dict.fromkeys(row.log for row in found.results):
        table.add_row(Text(log, style="bold"))
        for row in found.results:
            if row.log == log:
                cells = [format_estimate(row.accuracy[column]) if column in row.accuracy else "" for column in columns]
                of_read = "" if row.of_read is None else f"{100 * row.of_read:.1f}"
                tail = (f"{100 * row.no_answer:.1f}", of_read, str(row.num_scored))
                table.add_row(f"  {row.rule}{'*' if row.guesses else ''}", *cells, *tail)
    levels = [f"{100 * found.chance[column]:.1f}{' ' * 5}" if column in found.chance else "" for column in columns]
    table.add_row("chance", *levels, style="dim")
    return table


def describe_reasons(found: Matrix) -> list[str]:
    """`vcot read no answer in 3 of logs.jsonl: 2 two, 1 cut`, of our rule and of others that tell reasons apart."""
    said = []
    for row in found.results:
        if set(row.reasons) - {UNREAD} or (row.rule == OWN and row.reasons):
            reasons = ", ".join(f"{number} {reason.replace('_', ' ')}" for reason, number in row.reasons.items())
            said.append(f"{row.rule} read no answer in {sum(row.reasons.values())} of {row.log}: {reasons}")
    return said


def _render_differences(differences: Sequence[LogDifference]) -> Table:
    table = new_table(
        "Paired differences in points, on the same questions",
        "p: after Holm's correction. detectable: with 80 % power at 5 %. unread: the change of that share.",
        (OVERALL, "95 % interval", "p", "detectable", "unread", "questions"),
    )
    for log, base in dict.fromkeys((d.log, d.base) for d in differences):
        table.add_row(Text(f"{log} - {base}", style="bold"))
        for d in differences:
            if (d.log, d.base) == (log, base):
                interval = f"{100 * d.accuracy.low:+.1f} to {100 * d.accuracy.high:+.1f}"
                p_value = format_p_cell(d.p_holm)
                figures = (f"{100 * d.accuracy.value:+.1f}", interval, p_value, f"{100 * d.mde:.1f}")
                table.add_row(f"  {d.rule}", *figures, f"{100 * d.no_answer:+.1f}", str(d.num_questions))
    return table


def describe_logs(found: Matrix) -> list[str]:
    """For each two logs that are compared, under which rules one is better, and what could have been seen."""
    differences = found.differences
    pairs = dict.fromkeys((d.log, d.base) for d in differences)
    return [_describe(log, base, [d for d in differences if (d.log, d.base) == (log, base)]) for log, base in pairs]


def _describe(log: str, base: str, differences: Sequence[LogDifference]) -> str:
    """What the differences between two logs show, in sentences."""
    clear = [d for d in differences if d.p_holm < LEVEL]
    sentences = []
    for verb, found in (
        ("more", [d for d in clear if d.accuracy.value > 0]),
        ("fewer", [d for d in clear if d.accuracy.value <= 0]),
    ):
        if found:
            rules = [f"{d.rule} ({100 * d.accuracy.value:+.1f} points, {format_p(d.p_holm)})" for d in found]
            sentences.append(f"{log} answers {verb} questions right than {base} under {list_phrases(rules)}.")
    if rest := [d.rule for d in differences if d.p_holm >= LEVEL]:
        sentences.append(
            f"Under {list_phrases(rest)} the difference between {log} and {base} cannot be told from noise."
        )
    seen = format_range([d.mde for d in differences])
    sentences.append(f"A true difference of {seen} points would be found four times in five.")
    return " ".join(sentences)
