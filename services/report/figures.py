"""The page's figures as inline SVG.

Matplotlib draws with stand-in colours that are then replaced by the page's CSS variables, so that a figure follows the
page's light or dark scheme; text stays text, in the page's font. Each figure is drawn about as wide as a telephone's
screen: two stand side by side on a wide one.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.records import CheckpointRef, Difference, EvalResult
from training.job import TrainProgress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN = 4.6
_INK, _FAINT, _PAPER = "#010101", "#020202", "#030303"
_SERIES = ("#040401", "#040402", "#040403", "#040404")
"""The base, then up to three policies."""
_VARIABLES = {
    _INK: "var(--ink-soft)",
    _FAINT: "var(--line)",
    _PAPER: "var(--card)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES)},
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vcot",
    "font.size": 9.0,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


def draw_accuracy(results: Sequence[EvalResult], chance: float) -> str:
    """Accuracy (Avg) of each checkpoint under each prompt and temperature, with its interval and the chance level."""
    settings = list(dict.fromkeys((row.prompt, row.temperature) for row in results))
    checkpoints = list(dict.fromkeys(row.checkpoint for row in results))
    figure, axes = _begin(1.3 + 0.26 * len(settings) * len(checkpoints))
    for number, checkpoint in enumerate(checkpoints):
        rows = [row for row in results if row.checkpoint == checkpoint and "Avg" in row.accuracy]
        shift = 0.22 * (number - (len(checkpoints) - 1) / 2)
        places = [settings.index((row.prompt, row.temperature)) + shift for row in rows]
        _dots(axes, [row.accuracy["Avg"] for row in rows], places, _colour(number), checkpoint.name)
    axes.axvline(100 * chance, color=_INK, linestyle=(0, (2, 3)), linewidth=1)
    axes.annotate(
        "chance", (100 * chance, 1), xycoords=("data", "axes fraction"), xytext=(3, 2), textcoords="offset points"
    )
    axes.set_yticks(range(len(settings)), [f"{prompt} {temperature:g}" for prompt, temperature in settings])
    axes.set_ylim(len(settings) - 0.45, -0.55)
    axes.set_xlabel("accuracy, %")
    axes.grid(visible=False, axis="y")
    _legend(figure, len(checkpoints))
    return _finish(figure, "accuracy")


def draw_differences(differences: Sequence[Difference], checkpoints: Sequence[CheckpointRef]) -> str:
    """Each difference with its interval, over the band of effects that the benchmark would mostly have missed."""
    figure, axes = _begin(1.3 + 0.34 * len(differences))
    places = range(len(differences))
    axes.barh(
        places,
        [200 * d.mde for d in differences],
        left=[-100 * d.mde for d in differences],
        height=0.62,
        color=_FAINT,
        alpha=0.7,
        label="would mostly be missed",
    )
    for policy in dict.fromkeys(d.policy for d in differences):
        own = [place for place in places if differences[place].policy == policy]
        intervals = [differences[place].accuracy for place in own]
        _dots(axes, intervals, own, _colour(checkpoints.index(policy)), f"{policy.name} - {differences[0].base.name}")
    axes.axvline(0, color=_INK, linewidth=1)
    axes.set_yticks(places, [f"{d.prompt} {d.temperature:g}" for d in differences])
    axes.set_ylim(len(differences) - 0.4, -0.6)
    axes.set_xlabel("difference, points")
    axes.grid(visible=False, axis="y")
    _legend(figure, 2)
    return _finish(figure, "differences")


def draw_loss(progress: Sequence[TrainProgress]) -> str:
    """Training and validation loss over the steps."""
    figure, axes = _begin(2.9)
    for kind, colour, marker in (("train", _SERIES[0], ""), ("validation", _SERIES[1], "o")):
        points = [point for point in progress if point.kind == kind]
        axes.plot(
            [p.step for p in points], [p.loss for p in points], color=colour, marker=marker, markersize=4, label=kind
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    _legend(figure, 2)
    return _finish(figure, "loss")


def draw_rewards(progress: Sequence[TrainProgress]) -> str:
    """The share of pairs whose chosen response has the higher implicit reward, over the steps."""
    figure, axes = _begin(2.9)
    for kind, colour, marker in (("train", _SERIES[0], ""), ("validation", _SERIES[1], "o")):
        points = [point for point in progress if point.kind == kind and point.reward_accuracy is not None]
        shares = [100 * (point.reward_accuracy or 0.0) for point in points]
        axes.plot([p.step for p in points], shares, color=colour, marker=marker, markersize=4, label=kind)
    axes.axhline(50, color=_INK, linestyle=(0, (2, 3)), linewidth=1)
    axes.set_ylim(0, 103)
    axes.set_xlabel("step")
    axes.set_ylabel("pairs ranked right, %")
    _legend(figure, 2)
    return _finish(figure, "rewards")


def draw_histogram(values: Sequence[float], label: str, name: str) -> str:
    """How often each score occurs; `label` names the axis, `name` the figure."""
    figure, axes = _begin(2.6)
    low, high = min(0.0, *values), max(1.0, *values)
    axes.hist(values, bins=20, range=(low, high), color=_SERIES[1], rwidth=0.9)
    axes.set_xlabel(label)
    axes.set_ylabel("number")
    axes.grid(visible=False, axis="x")
    return _finish(figure, name)


def _begin(height_in: float) -> tuple[Figure, Axes]:
    """An empty figure. Matplotlib takes a second to import, so it comes with the first one."""
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        return figure, figure.add_subplot()
