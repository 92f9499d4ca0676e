"""`vcot pair --preview`: what the pair policies would make, shown; nothing is written."""

from __future__ import annotations

import textwrap

from rich.table import Table

from vcot.pipeline.pair_preview import PairExample, PairsPreview
from vcot.pipeline.report import Began, tell
from vcot.services.run.rounds import list_rounds
from vcot.services.run.session import Session

_MAX_LINES, _WIDTH = 4, 110
"""Of a response's text."""


async def preview(session: Session) -> None:
    """`vcot pair --preview`."""
    session.report(Began("pair", "what each policy would make; nothing is written"))
    found = list_rounds(session)[-1].preview()
    tell(session.report, [_tabulate(found), *(_describe(example) for example in found.examples)], found)


def _tabulate(found: PairsPreview) -> Table:
    table = Table("policy", title=f"The recipe's policy is {found.policy}")
    for heading in ("pairs", "tasks with one", "words", "score gap", "chosen right"):
        table.add_column(heading, justify="right")
    table.add_column("tasks without one")
    for row in found.policies:
        table.add_row(
            row.policy,
            f"{row.num_pairs:,}",
            f"{row.count.ok:,} of {row.count.requested:,}",
            _show(row.mean_length_difference, "+.1f"),
            _show(row.mean_score_gap, ".3g"),
            _show(row.share_right, ".0%"),
            row.count.by_reason or "-",
        )
    table.caption = "words: of the chosen response minus those of the rejected one, on average, as the score gap is"
    return table


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _describe(example: PairExample) -> str:
    """The question, and both responses cut to a few lines."""
    gain = "" if example.image_gain is None else f", image gain {example.image_gain:.2f} nats"
    return "\n".join(
        [
            f"\n{example.task}: {_cut(example.question)}",
            f"  chosen, {example.chosen_score:g}{gain}:\n{_cut(example.chosen, '    ')}",
            f"  rejected, {example.rejected_score:g}:\n{_cut(example.rejected, '    ')}",
        ]
    )


def _cut(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text.strip(), _WIDTH, initial_indent=indent, subsequent_indent=indent, max_lines=_MAX_LINES, placeholder=" ..."
    )
