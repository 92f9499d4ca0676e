"""The paper's Table 1 from scores: accuracy by column for each checkpoint, prompt and temperature, with intervals.

Below it stand the paired differences between checkpoints, each with its interval, p-value and the smallest effect that
the benchmark could have seen, and sentences that say what they show. A failed request is in no figure and is counted;
an answer that could not be read, or that was cut off, counts as not correct, and its share is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Protocol, TypeVar

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from vcot.eval.findings import Difference, EvalResult
from vcot.eval.statistics import adjust_holm, chance_level, compare_paired, compare_signs, estimate_accuracy
from vcot.pipeline.records import CheckpointRef, Interval, PromptName, Score

OVERALL = "Avg"
"""The column of all questions; a benchmark names the others."""
LEVEL = 0.05

Setting = tuple[PromptName, float]
"""A prompt and a temperature."""


def build_results(
    scores: Sequence[Score],
    checkpoints: Sequence[CheckpointRef],
    columns: Sequence[str],
    *,
    seed: int,
    num_samples: int,
) -> list[EvalResult]:
    """One row per checkpoint, prompt and temperature that `scores` holds, in that order; `seed` is the sampling's."""
    rows = []
    for checkpoint in checkpoints:
        own = [score for score in scores if score.checkpoint == checkpoint.digest]
        for prompt, temperature in list_settings(own):
            group = select_scores(own, (prompt, temperature))
            good = [score for score in group if score.error is None]
            no_answer = sum(score.value == "no_answer" for score in good)
            row = EvalResult(
                checkpoint=checkpoint,
                prompt=prompt,
                temperature=temperature,
                seed=seed,
                num_samples=num_samples,
                accuracy={
                    column: estimate_accuracy([s.earned for s in part], [s.image or s.task for s in part])
                    for column, part in _split(good, columns).items()
                },
                no_answer=no_answer / len(good) if good else 0.0,
                cut=sum(score.is_cut for score in good) / len(good) if good else 0.0,
                chance=chance_level([score.num_choices for score in good or group]),
                num_scored=len(good),
                num_failed=len(group) - len(good),
            )
            rows.append(row)
    return rows


def build_chance(scores: Iterable[Score], columns: Sequence[str]) -> dict[str, float]:
    """The accuracy of a uniform guess on the questions of `scores`, by column; a column without questions is absent."""
    parts = _split(list({score.task: score for score in scores}.values()), columns)
    return {column: chance_level([score.num_choices for score in part]) for column, part in parts.items()}


def build_differences(
    scores: Sequence[Score], base: CheckpointRef, policies: Sequence[CheckpointRef]
) -> list[Difference]:
    """Each of `policies` minus `base`, then minus each earlier one, per prompt and temperature, on what both answered.

    All of them are one family: Holm's correction is for their number, of McNemar's tests as of the paired ones.
    """
    sides = [(base, policy) for policy in policies] + list(combinations(policies, 2))
    pairs = [
        (side, setting, questions)
        for side in sides
        for setting in list_settings(scores)
        if (questions := _paired(scores, *side, setting))
    ]
    results = [
        compare_paired([first for first, _, _ in q], [second for _, second, _ in q], [image for _, _, image in q])
        for _, _, q in pairs
    ]
    signs = [compare_signs([first for first, _, _ in q], [second for _, second, _ in q]) for _, _, q in pairs]
    adjusted = adjust_holm([result.p_value for result in results])
    exact = adjust_holm([sign.p_value for sign in signs])
    return [
        Difference(
            base=side[0],
            policy=side[1],
            prompt=setting[0],
            temperature=setting[1],
            accuracy=result.interval,
            p_value=result.p_value,
            p_holm=p_holm,
            mde=result.mde,
            num_questions=len(questions),
            better_on=(sign.num_first, sign.num_second),
            p_exact=p_exact,
        )
        for (side, setting, questions), result, p_holm, sign, p_exact in zip(
            pairs, results, adjusted, signs, exact, strict=True
        )
    ]


def describe_differences(differences: Sequence[Difference]) -> list[str]:
    """What the differences show, in plain sentences: one paragraph for each two checkpoints."""
    sides = dict.fromkeys((d.policy.name, d.base.name) for d in differences)
    return [_describe(*side, [d for d in differences if (d.policy.name, d.base.name) == side]) for side in sides]


def describe_family(differences: Sequence[Difference]) -> str:
    """Which tests p-values were corrected for together, in a sentence."""
    num_sides = len({(d.policy.digest, d.base.digest) for d in differences})
    if len(differences) == 1:
        return "p is of one test only, and so not corrected."
    of = "" if num_sides == 1 else f", of {num_sides} pairs of checkpoints"
    return f"p is corrected (Holm) for all {len(differences)} differences of this table together{of}."


def render_results(
    results: Sequence[EvalResult],
    differences: Sequence[Difference],
    chance: dict[str, float],
    columns: Sequence[str],
) -> list[RenderableType]:
    """Table 1, the differences below it, and what they show, for a terminal."""
    parts: list[RenderableType] = [_render_accuracy(results, chance, (OVERALL, *columns))]
    if differences:
        parts += [_render_differences(differences), *(Text(f"\n{text}") for text in describe_differences(differences))]
    return parts


def select_scores(scores: Iterable[Score], setting: Setting) -> list[Score]:
    """Those of one setting."""
    return [score for score in scores if (score.prompt, score.temperature) == setting]


def list_settings(scores: Iterable[Score]) -> list[Setting]:
    """Prompts in the order in which they appear, each with its temperatures ascending."""
    found = dict.fromkeys((score.prompt, score.temperature) for score in scores)
    prompts = list(dict.fromkeys(prompt for prompt, _ in found))
    return sorted(found, key=lambda setting: (prompts.index(setting[0]), setting[1]))


def _split(scores: Sequence[Score], columns: Sequence[str]) -> dict[str, list[Score]]:
    """The scores of each column, all of them first; a column without scores is absent."""
    parts = {
        column: [score for score in scores if column in (OVERALL, score.subject)] for column in (OVERALL, *columns)
    }
    return {column: part for column, part in parts.items() if part}


def _paired(
    scores: Sequence[Score], base: CheckpointRef, policy: CheckpointRef, setting: Setting
) -> list[tuple[float, float, str]]:
    """Per question that both answered: the share correct of base and of policy, and the image."""
    own = ([score for score in select_scores(scores, setting) if score.checkpoint == c.digest] for c in (base, policy))
    shares = [question_shares(part) for part in own]
    images = {score.task: score.image or score.task for score in scores}
    return [(first, shares[1][task], images[task]) for task, first in shares[0].items() if task in shares[1]]


def question_shares(scores: Iterable[Score]) -> dict[str, float]:
    """What the responses to a question earned on average; one without an answered request is absent."""
    values: dict[str, list[float]] = {}
    for score in scores:
        if score.error is None:
            values.setdefault(score.task, []).append(score.earned)
    return {task: float(np.mean(earned)) for task, earned in values.items()}


def _describe(policy: str, base: str, differences: Sequence[Difference]) -> str:
    clear = [d for d in differences if d.p_holm < LEVEL]
    better = [d for d in clear if d.accuracy.value > 0]
    worse = [d for d in clear if d.accuracy.value <= 0]
    seen = format_range([d.mde for d in differences])
    sentences = [
        f"{policy} answers {verb} questions right than {base} {_list_differences(found)}."
        for verb, found in (("more", better), ("fewer", worse))
        if found
    ]
    if rest := len(differences) - len(clear):
        other = "other " if clear else ""
        what = f"The {other}difference" if rest == 1 else f"The {other}{rest} differences"
        sentences.append(f"{what} cannot be told from noise.")
    sentences += _describe_exact(differences)
    sentences.append(
        f"With this many questions, a true difference of {seen} points would be found four times in five; "
        "a smaller one would mostly be missed."
    )
    return " ".join(sentences)


def _describe_exact(differences: Sequence[Difference]) -> list[str]:
    """Whether McNemar's exact test says the same; nothing of differences that have none."""
    tested = [(d, d.p_exact) for d in differences if d.p_exact is not None]
    other = [
        f"with {d.prompt} at {d.temperature:g} ({d.better_on[1]} questions to {d.better_on[0]}, {format_p(p_exact)})"
        for d, p_exact in tested
        if (p_exact < LEVEL) != (d.p_holm < LEVEL)
    ]
    if not tested:
        return []
    says = f"says otherwise {list_phrases(other)}" if other else "says the same"
    return [f"McNemar's exact test, which counts the questions on which each is the better one, {says}."]


def _list_differences(differences: Sequence[Difference]) -> str:
    """`with zero_shot at 0.4 (+3.1 points, p = 0.012) and ...`."""
    parts = [
        f"with {d.prompt} at {d.temperature:g} ({100 * d.accuracy.value:+.1f} points, {format_p(d.p_holm)})"
        for d in differences
    ]
    return list_phrases(parts)


def format_range(shares: Sequence[float]) -> str:
    """Shares in [0, 1] as one figure in points, or as "smallest to largest" where they differ."""
    smallest, largest = (f"{100 * pick(shares):.1f}" for pick in (min, max))
    return smallest if smallest == largest else f"{smallest} to {largest}"


def format_half(interval: Interval) -> str:
    """Half of the interval, in points."""
    return f"{50 * (interval.high - interval.low):.1f}"


def format_estimate(interval: Interval, width: int = 3) -> str:
    """`66.8 ±2.1` in %, the half in `width` places, so that a column of them is aligned."""
    return f"{100 * interval.value:.1f} {f'±{format_half(interval)}':>{width + 1}}"


def list_phrases(phrases: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def format_p(p_value: float) -> str:
    """`p = 0.03`, or `p < 0.001`."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def _render_accuracy(results: Sequence[EvalResult], chance: dict[str, float], columns: Sequence[str]) -> Table:
    table = new_table(
        "Accuracy in %, ± half of the 95 % interval (clustered by image)",
        "unread: in %, no readable answer (cut: cut off), counts as not correct. failed: in no figure.",
        (*columns, "unread", "cut", "failed", "n"),
    )

    def list_cells(row: EvalResult) -> Iterable[str]:
        cells = [_cell(row, column) for column in columns]
        shares = (f"{100 * row.no_answer:.1f}", f"{100 * row.cut:.1f}")
        return f"  {row.prompt} {row.temperature:g}", *cells, *shares, str(row.num_failed), str(row.num_scored)

    fill_by_checkpoint(table, results, list_cells)
    levels = [f"{100 * chance[column]:.1f}{' ' * 5}" if column in chance else "" for column in columns]
    table.add_row("chance", *levels, style="dim")
    return table


def _cell(row: EvalResult, column: str) -> str:
    interval = row.accuracy.get(column)
    if interval is None:
        return ""
    return format_estimate(interval)


def _render_differences(differences: Sequence[Difference]) -> Table:
    table = new_table(
        "Paired differences in points, on the same questions",
        f"{describe_family(differences)} exact: the same, by McNemar's test. detectable: with 80 % power at 5 %.",
        (OVERALL, "95 % interval", "p", "exact", "detectable", "n"),
    )
    for side in dict.fromkeys((d.policy.name, d.base.name) for d in differences):
        table.add_row(Text(" - ".join(side), style="bold"))
        for d in differences:
            if (d.policy.name, d.base.name) == side:
                interval = f"{100 * d.accuracy.low:+.1f} to {100 * d.accuracy.high:+.1f}"
                exact = "" if d.p_exact is None else format_p_cell(d.p_exact)
                figures = (
                    f"{100 * d.accuracy.value:+.1f}",
                    interval,
                    format_p_cell(d.p_holm),
                    exact,
                    f"{100 * d.mde:.1f}",
                )
                style = "green" if d.p_holm < LEVEL and d.accuracy.value > 0 else "red" if d.p_holm < LEVEL else ""
                table.add_row(f"  {d.prompt} {d.temperature:g}", *figures, str(d.num_questions), style=style)
    return table


def format_p_cell(p_value: float) -> str:
    """`0.03`, or `< 0.001`."""
    return format_p(p_value).removeprefix("p ").removeprefix("= ")


class _OfCheckpoint(Protocol):
    @property
    def checkpoint(self) -> CheckpointRef: ...


_R = TypeVar("_R", bound=_OfCheckpoint)


def fill_by_checkpoint(table: Table, rows: Sequence[_R], list_cells: Callable[[_R], Iterable[str]]) -> Table:
    """The table with a line for each of `rows`, name first, below the name of its checkpoint."""
    for checkpoint in dict.fromkeys(row.checkpoint for row in rows):
        table.add_row(Text(checkpoint.name, style="bold"))
        for row in rows:
            if row.checkpoint == checkpoint:
                table.add_row(*list_cells(row))
    return table


def new_table(title: str, caption: str, figures: Sequence[str]) -> Table:
    """An empty table that fits 80 columns: a name, then figures."""
    table = Table(
        title=f"\n{title}",
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("", min_width=15, no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table
