"""The report card of a judge: can its scores be trusted, before preference pairs are made of them? Pure.

It is made of tasks with a gold answer to which one response is right and another wrong. Everything is counted within a
task, as pairs are made: what a judge says of two different questions does not matter.

    AUC          how often the right response scores above the wrong one, a tie as half: 0.5 is a coin
    ties         how often the two score alike
    stability    how often the order is the same when the judge is asked again
    image        the same without the image, with a blank one, and with another question's: a judge that looks loses AUC
    length       by how much the score rises, in its standard deviations, where a response is twice as long as the other,
                 beyond what being right explains
    places       of a judge that compares: how often the same response wins in both orders
    own          of a judge whose model has sampled responses, too: how often a right one of its own scores above a right one
                 of another model to the same task, a tie as half. The gold answer stands for equal quality (Wataoka et al.
                 2024, equal opportunity; Chen et al. 2025, gold judgments), so that 0.5 is even
    agreement    of several judges: Krippendorff's (2011) alpha over their rankings, 1 for the same, 0 for chance

Intervals are clustered by image, as for accuracies (eval/statistics.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.text import Text

from vcot.eval.statistics import compare_paired, estimate_accuracy, estimate_slope
from vcot.eval.table import new_table
from vcot.pipeline.records import Interval, Record

CHANCE = 0.5
_GOOD, _STEADY, _LONG = 0.75, 0.9, 0.1
"""An AUC that ranks well, a share of orders that is steady, and a slope that shows."""
_CONTROLS = {"none": "no image", "blank": "a blank image", "other": "another question's image"}


@dataclass(frozen=True)
class Duel:
    """A right response and a wrong one to one task, under one way of asking the judge."""

    task: str
    cluster: str
    """The task's image, or the task where it has none."""
    right: float
    wrong: float

    @property
    def won(self) -> float:
        """1 where the right one scores higher, 0.5 for a tie, 0 else."""
        return (self.right > self.wrong) + (self.right == self.wrong) / 2


class Control(Record):
    """The judge without the image that the task is about."""

    shown: str
    """`none`, `blank` or `other`."""
    auc: Interval
    lost: Interval
    """AUC with the image, minus this, on the same tasks."""
    p_value: float
    """Two-sided, that the image makes no difference."""
    same_order: Interval
    """Share of tasks whose two responses are in the same order as with the image."""


class ReportCard(Record):
    """What is known of a judge."""

    judge: str
    num_tasks: int
    """With a right and a wrong response that it both scored."""
    num_unjudged: int
    """Tasks of which it gave a response no score."""
    auc: Interval
    ties: Interval
    stability: Interval | None = None
    """None of a program, which always says the same."""
    controls: tuple[Control, ...] = ()
    length: Interval | None = None
    """Standard deviations of the score for each doubling of the length; None where lengths do not differ."""
    num_compared: int = 0
    num_hung: int = 0
    """Comparisons whose outcome hung on the order, of `num_compared`."""
    alpha: float | None = None
    """Between the members of an ensemble."""
    knows_gold: bool = False
    """Whether the gold answer decides its scores."""
    is_own_model: bool = False
    """Of a card of an earlier version: the judge is the model whose responses it judges, and no more is known."""
    self_preference: Interval | None = None
    """How often a right response of the judge's own model scores above another model's right one, a tie as half."""
    why_no_self: str = ""
    """Why that cannot be measured, after `because`; empty for a program, which has no responses of its own."""

    @property
    def verdicts(self) -> list[str]:
        """What that means, in sentences, the gravest first."""
        return [*_judge_answers(self), _judge_auc(self.auc), *_judge_image(self), *_judge_rest(self)]


def _judge_answers(card: ReportCard) -> list[str]:
    num = card.num_tasks + card.num_unjudged
    if card.num_unjudged <= (1 - _STEADY) * num:
        return []
    return [f"It gave no verdict that can be read in {card.num_unjudged} of {num} tasks, so the rest says little."]


def _judge_auc(auc: Interval) -> str:
    told = f"a right response scores above a wrong one in {auc.value:.0%} ({auc.low:.0%} to {auc.high:.0%}) of tasks"
    if auc.low <= CHANCE <= auc.high:
        return f"This judge ranks no better than chance can explain: {told}."
    if auc.high < CHANCE:
        return f"This judge ranks worse than chance: {told}."
    how = "well" if auc.low >= _GOOD else "better than chance"
    return f"This judge ranks {how}: {told}."


def _judge_image(card: ReportCard) -> list[str]:
    if not card.controls:
        return []
    unharmed = [control for control in card.controls if control.lost.low <= 0]
    if not unharmed:
        return ["It looks at the image: without it, or with a wrong one, it ranks worse."]
    return [_judge_control(control) for control in unharmed]


def _judge_control(control: Control) -> str:
    """Of an image without which the judge does not rank clearly worse."""
    shown, kept = _CONTROLS[control.shown], control.same_order.value
    if kept >= _STEADY:
        return f"Nothing shows that it looks at the image: with {shown} it keeps its order in {kept:.0%} of tasks."
    low, high = control.lost.low, control.lost.high
    return (
        f"With {shown} it changes its order in {1 - kept:.0%} of tasks, but not clearly to the worse: it loses "
        f"{control.lost.value:.0%} AUC ({low:.0%} to {high:.0%})."
    )


def _judge_rest(card: ReportCard) -> list[str]:
    said = []
    if card.knows_gold:
        said.append("It goes by the gold answer, so its AUC proves nothing; it ranks right above right unaudited.")
    if card.stability is not None and card.stability.high < _STEADY:
        said.append(f"It is unsteady: asked again, it keeps the order in {card.stability.value:.0%} of tasks.")
    if card.length is not None and abs(card.length.value) >= _LONG and not card.length.low <= 0 <= card.length.high:
        likes = "longer" if card.length.value > 0 else "shorter"
        said.append(f"Its score follows length: it likes {likes} responses, right or wrong.")
    if card.num_compared and card.num_hung / card.num_compared > 1 - _STEADY:
        share = card.num_hung / card.num_compared
        said.append(f"The order in which it reads two responses decides {share:.0%} of its comparisons.")
    if card.ties.value > 1 - _GOOD:
        said.append(f"It cannot tell the two apart in {card.ties.value:.0%} of tasks, which give no pair.")
    return [*said, *_judge_self(card)]


def _judge_self(card: ReportCard) -> list[str]:
    """Whether it favours what its own model said."""
    if card.self_preference is None:
        why = card.why_no_self or (card.is_own_model and "it was audited by an earlier version; audit it again")
        return [f"Whether it favours its own responses cannot be measured here, because {why}."] if why else []
    own = card.self_preference
    told = (
        f"of two right responses that of its own model scores higher in {own.value:.0%} ({own.low:.0%} to {own.high:.0%}) "
        f"of {own.n} tasks or images, where 50% is even"
    )
    if own.low > CHANCE:
        return [f"It favours its own responses, or their style: {told}."]
    if own.high < CHANCE:
        return [f"It favours the other model's responses, or their style: {told}."]
    return [f"Nothing shows that it favours its own responses: {told}."]


def build_card(
    judge: str,
    duels: Mapping[str, Sequence[Duel]],
    *,
    num_unjudged: int,
    lengths: Mapping[str, tuple[int, int]],
    compared: tuple[int, int] = (0, 0),
    rankings: Sequence[Sequence[float]] = (),
    knows_gold: bool = False,
    both_right: Sequence[Duel] = (),
    why_no_self: str = "",
) -> ReportCard:
    """The card, from duels by the way of asking: `own`, and as far as they were asked, `again`, `none`, `blank`, `other`.

    `lengths` are of the right and the wrong response, in words, by task. `compared` is how many comparisons were made, and
    how many hung on the order. `rankings` are several judges' scores of the same responses, ranked within each task.
    `both_right` sets a right response of the judge's own model (as `right`) against another model's right one; where there
    is none, `why_no_self` says why. Raises ValueError where there is no duel.
    """
    own = duels["own"]
    clusters = [duel.cluster for duel in own]
    return ReportCard(
        judge=judge,
        num_tasks=len(own),
        num_unjudged=num_unjudged,
        auc=estimate_accuracy([duel.won for duel in own], clusters),
        ties=estimate_accuracy([float(duel.won == CHANCE) for duel in own], clusters),
        stability=_compare_orders(both) if (both := _match(own, duels.get("again", ()))) else None,
        controls=tuple(_control(name, both) for name in _CONTROLS if (both := _match(own, duels.get(name, ())))),
        length=_estimate_length(own, lengths),
        num_compared=compared[0],
        num_hung=compared[1],
        alpha=estimate_alpha(rankings) if rankings else None,
        knows_gold=knows_gold,
        self_preference=(
            estimate_accuracy([duel.won for duel in both_right], [duel.cluster for duel in both_right])
            if both_right
            else None
        ),
        why_no_self="" if both_right else why_no_self,
    )


def _match(first: Sequence[Duel], second: Sequence[Duel]) -> list[tuple[Duel, Duel]]:
    """The duels of both on the same tasks."""
    by_task = {duel.task: duel for duel in second}
    return [(duel, by_task[duel.task]) for duel in first if duel.task in by_task]


def _compare_orders(both: Sequence[tuple[Duel, Duel]]) -> Interval:
    return estimate_accuracy([float(one.won == other.won) for one, other in both], [one.cluster for one, _ in both])


def _control(shown: str, both: Sequence[tuple[Duel, Duel]]) -> Control:
    clusters = [one.cluster for one, _ in both]
    found = compare_paired([other.won for _, other in both], [one.won for one, _ in both], clusters)
    return Control(
        shown=shown,
        auc=estimate_accuracy([other.won for _, other in both], clusters),
        lost=found.interval,
        p_value=found.p_value,
        same_order=_compare_orders(both),
    )


def _estimate_length(own: Sequence[Duel], lengths: Mapping[str, tuple[int, int]]) -> Interval | None:
    """The slope of the difference in score over the difference in log2 length, with what being right adds as intercept."""
    longer = np.array([np.log2(max(1, lengths[d.task][0]) / max(1, lengths[d.task][1])) for d in own])
    spread = np.std([score for duel in own for score in (duel.right, duel.wrong)])
    if not spread or not np.ptp(longer):
        return None
    leads = np.array([duel.right - duel.wrong for duel in own]) / spread
    return estimate_slope(longer, leads, [duel.cluster for duel in own])


def estimate_alpha(rankings: Sequence[Sequence[float]]) -> float | None:
    """Krippendorff's alpha between judges, a row each, over the same responses; None where all rank all alike."""
    import krippendorff

    values = np.asarray(rankings, dtype=np.float64)
    if np.ptp(values) == 0:
        return None
    return float(krippendorff.alpha(reliability_data=values, level_of_measurement="interval"))


def render_card(card: ReportCard) -> list[Any]:
    """The card for a terminal: its sentences, then its figures."""
    table = new_table(f"Report card of {card.judge}", "Intervals are clustered by image.", ("figure", "95 % interval"))
    for row in list_figures(card):
        table.add_row(*row)
    return [table, Text("\n" + "\n".join(card.verdicts))]


def list_figures(card: ReportCard) -> list[tuple[str, str, str]]:
    """Rows of what, figure and interval, for tables of any kind."""
    rows = [
        ("tasks with a right and a wrong response", f"{card.num_tasks}", ""),
        _row("the right one scores higher (AUC)", card.auc),
        _row("both score alike", card.ties),
    ]
    if card.num_unjudged:
        rows.append(("tasks without both scores", f"{card.num_unjudged}", ""))
    if card.stability is not None:
        rows.append(_row("same order when asked again", card.stability))
    for control in card.controls:
        rows.append(_row(f"AUC with {_CONTROLS[control.shown]}", control.auc))
        rows.append(_row(f"same order with {_CONTROLS[control.shown]}", control.same_order))
    if card.length is not None:
        low, high = card.length.low, card.length.high
        rows.append(("score per doubling of length, in SD", f"{card.length.value:+.2f}", f"{low:+.2f} to {high:+.2f}"))
    if card.num_compared:
        rows.append(("comparisons that hang on the order", f"{card.num_hung} of {card.num_compared}", ""))
    if card.self_preference is not None:
        rows.append(_row("its own right response above another model's", card.self_preference))
    if card.alpha is not None:
        rows.append(("agreement of its members (alpha)", f"{card.alpha:.2f}", ""))
    return rows


def _row(what: str, found: Interval) -> tuple[str, str, str]:
    return what, f"{found.value:.1%}", f"{found.low:.1%} to {found.high:.1%}"


def render_markdown(card: ReportCard) -> str:
    """The card for a data card."""
    lines = [f"- {sentence}" for sentence in card.verdicts]
    lines += ["", "| | | 95 % interval |", "|---|---|---|"]
    lines += [f"| {what} | {figure} | {interval} |" for what, figure, interval in list_figures(card)]
    return "\n".join(lines)
