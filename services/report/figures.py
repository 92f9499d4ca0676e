"""The page's figures as inline SVG.

Matplotlib draws with stand-in colours that are then replaced by the page's CSS variables, so that a figure follows the
page's light or dark scheme; text stays text, in the page's font. Each figure is drawn about as wide as a telephone's
screen: two stand side by side on a wide one.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from importlib import resources
from typing import TYPE_CHECKING

from vcot.eval.findings import Difference, EvalResult
from vcot.eval.image_reliance import Reliance
from vcot.eval.margins import Margin
from vcot.eval.table import OVERALL
from vcot.pipeline.records import Interval
from vcot.services.report.data import TrendRow
from vcot.training.protocol.job import TrainProgress
from vcot.training.protocol.search import VARIED, Sweep, SweepPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_IN = 4.6
_INK, _FAINT, _PAPER = "#010101", "#020202", "#030303"
_SERIES = ("#040401", "#040402", "#040403", "#040404", "#040405", "#040406")
"""The base, then the policies; or the true image, then what was shown instead."""
_MARKERS = "osD^v"
_VARIABLES = {
    _INK: "var(--ink-soft)",
    _FAINT: "var(--line)",
    _PAPER: "var(--card)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES)},
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vcot",
    "text.parse_math": False,
    "font.size": 10.0,
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
    """Accuracy over all questions, by checkpoint, prompt and temperature, with its interval and the chance level."""
    settings = list(dict.fromkeys((row.prompt, row.temperature) for row in results))
    checkpoints = list(dict.fromkeys(row.checkpoint for row in results))

    def draw(axes: Axes) -> None:
        for number, checkpoint in enumerate(checkpoints):
            rows = [row for row in results if row.checkpoint == checkpoint and OVERALL in row.accuracy]
            shift = _shift(number, len(checkpoints))
            places = [settings.index((row.prompt, row.temperature)) + shift for row in rows]
            _plot_intervals(axes, [row.accuracy[OVERALL] for row in rows], places, number, checkpoint.name)
        axes.axvline(100 * chance, color=_INK, linestyle=(0, (2, 3)), linewidth=1, label="chance")
        _name_rows(axes, [f"{prompt} {temperature:g}" for prompt, temperature in settings])
        axes.set_xlabel("accuracy, %")

    return _render("accuracy", 1.1 + 0.27 * len(settings) * max(2, len(checkpoints)), draw)


def draw_differences(differences: Sequence[Difference]) -> str:
    """Each difference with its interval, over the band of effects that the benchmark would mostly have missed."""
    places = range(len(differences))

    def draw(axes: Axes) -> None:
        widths, starts = [200 * d.mde for d in differences], [-100 * d.mde for d in differences]
        axes.barh(places, widths, left=starts, height=0.62, color=_FAINT, label="would mostly be missed")
        for number, side in enumerate(dict.fromkeys((d.policy, d.base) for d in differences), start=1):
            own = [place for place in places if (differences[place].policy, differences[place].base) == side]
            intervals = [differences[place].accuracy for place in own]
            _plot_intervals(axes, intervals, own, number, " - ".join(ref.name for ref in side))
        axes.axvline(0, color=_INK, linewidth=1)
        _name_rows(axes, [f"{d.prompt} {d.temperature:g}" for d in differences])
        axes.set_xlabel("difference, points")

    return _render("differences", 1.1 + 0.54 * len(differences), draw)


def draw_reliance(rows: Sequence[Reliance]) -> str:
    """Accuracy of each checkpoint under each prompt and temperature, by the image that was shown."""
    groups = list(dict.fromkeys((row.checkpoint.name, row.prompt, row.temperature) for row in rows))
    shown = list(dict.fromkeys(row.shown for row in rows))

    def draw(axes: Axes) -> None:
        for number, name in enumerate(("true", *shown)):
            own = [row for row in rows if row.shown == (shown[0] if name == "true" else name)]
            shift = _shift(number, 1 + len(shown))
            places = [groups.index((row.checkpoint.name, row.prompt, row.temperature)) + shift for row in own]
            intervals = [row.true if name == "true" else row.accuracy for row in own]
            _plot_intervals(axes, intervals, places, number, name.replace("_", " "))
        _name_rows(axes, [f"{name}\n{prompt} {temperature:g}" for name, prompt, temperature in groups])
        axes.set_xlabel("accuracy, %")

    return _render("reliance", 1.1 + max(0.62, 0.2 * (1 + len(shown))) * len(groups), draw)


def draw_margins(rows: Sequence[Margin]) -> str:
    """The mean margin of each checkpoint, in nats, by what was shown."""
    checkpoints = list(dict.fromkeys(row.checkpoint for row in rows))
    shown = list(dict.fromkeys(row.shown for row in rows))

    def draw(axes: Axes) -> None:
        for number, checkpoint in enumerate(checkpoints):
            own = [row for row in rows if row.checkpoint == checkpoint]
            shift = _shift(number, len(checkpoints))
            places = [shown.index(row.shown) + shift for row in own]
            _plot_intervals(axes, [row.margin for row in own], places, number, checkpoint.name, scale=1)
        axes.axvline(0, color=_INK, linewidth=1)
        _name_rows(axes, [name.replace("_", " ") for name in shown])
        axes.set_xlabel("margin, nats")

    return _render("margins", 1.1 + 0.27 * len(shown) * max(2, len(checkpoints)), draw)


def draw_trend(rows: Sequence[TrendRow]) -> str:
    """Accuracy on the validation split after each round, with intervals; round 0 is the base."""

    def draw(axes: Axes) -> None:
        for number, first in enumerate(rows[0].results):
            setting = (first.prompt, first.temperature)
            found = [(row.number, r) for row in rows for r in row.results if (r.prompt, r.temperature) == setting]
            points = [(place, r.accuracy[OVERALL]) for place, r in found if OVERALL in r.accuracy]
            colour, marker = _look_of(number)
            for place, interval in points:
                x = place + 0.03 * number
                axes.plot([x, x], [100 * interval.low, 100 * interval.high], color=colour, linewidth=2.2, alpha=0.55)
            axes.plot(
                [place + 0.03 * number for place, _ in points],
                [100 * interval.value for _, interval in points],
                f"-{marker}",
                color=colour,
                markersize=5,
                label=f"{first.prompt} {first.temperature:g}",
            )
        axes.set_xticks([row.number for row in rows], ["base", *(f"round {row.number}" for row in rows[1:])])
        axes.set_ylabel("accuracy, %")

    return _render("trend", 3.1, draw)


def draw_loss(progress: Sequence[TrainProgress]) -> str:
    """Training and validation loss over the steps."""

    def draw(axes: Axes) -> None:
        _plot_curves(axes, progress, lambda point: point.loss)
        axes.set_ylabel("loss")

    return _render("loss", 2.9, draw)


def draw_rewards(progress: Sequence[TrainProgress]) -> str:
    """The share of pairs whose chosen response has the higher implicit reward, over the steps."""

    def draw(axes: Axes) -> None:
        _plot_curves(axes, progress, lambda p: None if p.reward_accuracy is None else 100 * p.reward_accuracy)
        axes.axhline(50, color=_INK, linestyle=(0, (2, 3)), linewidth=1)
        axes.set_ylim(0, 104)
        axes.set_ylabel("pairs ranked right, %")

    return _render("rewards", 2.9, draw)


def draw_sweep(sweep: Sweep) -> str:
    """Validation loss over its gap to the training loss, a point for each candidate, with the chosen ones in a ring."""

    def draw(axes: Axes) -> None:
        for number, (label, points) in enumerate(_list_series(sweep).items()):
            colour, marker = (_INK, "o") if label == _CENTRE else _look_of(number)
            axes.plot(*_place_points(points), marker, color=colour, markersize=5, label=label)
        for point in sweep.points:
            if point.varies is not None and point.loss is not None:
                value = f"{getattr(point.settings, point.varies):g}"
                place = point.gap or 0.0, point.loss
                axes.annotate(value, place, xytext=(6, -3), textcoords="offset points", fontsize=8)
        axes.plot(
            *_place_points(list(sweep.choices.values())),
            "o",
            color=_INK,
            fillstyle="none",
            markersize=11,
            label="chosen",
        )
        axes.axvline(0, color=_INK, linestyle=(0, (2, 3)), linewidth=1)
        axes.margins(x=0.14)  # room for the values beside the points
        axes.set_xlabel("validation loss - training loss")
        axes.set_ylabel("validation loss")

    return _render("sweep", 3.2, draw)


_CENTRE = "the recipe's own"


def _list_series(sweep: Sweep) -> dict[str, list[SweepPoint]]:
    """The points that share a colour, by their label: those of a learning rate in a grid, else those of a setting."""
    if sweep.mode == "grid":
        rates = sorted({point.settings.learning_rate for point in sweep.points})
        return {f"lr {rate:g}": [p for p in sweep.points if p.settings.learning_rate == rate] for rate in rates}
    series = {name: [point for point in sweep.points if point.varies == name] for name in (*VARIED, None)}
    labels = {name: _CENTRE if name is None else name.removeprefix("lora_").replace("_", " ") for name in series}
    return {labels[name]: points for name, points in series.items() if points}


def _place_points(points: Sequence[SweepPoint]) -> tuple[list[float], list[float]]:
    done = [point for point in points if point.loss is not None]
    return [point.gap or 0.0 for point in done], [point.loss or 0.0 for point in done]


def draw_gap(progress: Sequence[TrainProgress]) -> str:
    """How far the validation loss is above the training loss since the evaluation before, over the steps."""

    def draw(axes: Axes) -> None:
        points = [(p.step, p.gap) for p in progress if p.gap is not None]
        axes.plot([x for x, _ in points], [y for _, y in points], color=_SERIES[1], marker="o", markersize=4)
        axes.axhline(0, color=_INK, linestyle=(0, (2, 3)), linewidth=1)
        axes.set_xlabel("step")
        axes.set_ylabel("validation loss - training loss")

    return _render("gap", 2.9, draw)


def standalone(svg: str) -> str:
    """A figure as a document of its own, which follows the viewer's light or dark scheme as the page does."""
    style = resources.files("vcot.services.report").joinpath("templates", "style.css").read_text("utf-8")
    colours = style[: style.index("* {")]  # the variables of both schemes stand first
    tag, inside = svg.split(">", 1)
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    look = "svg { background: var(--card); font-family: system-ui, sans-serif; }"
    return f"{tag.replace('<svg', f'<svg {namespaces}', 1)}><style>{colours}{look}</style>{inside}\n"


def draw_histogram(values: Sequence[float], label: str, name: str) -> str:
    """How often each value occurs; `label` names the axis, `name` the figure."""

    def draw(axes: Axes) -> None:
        axes.hist(values, bins=20, range=(min(0.0, *values), max(1.0, *values)), color=_SERIES[1], rwidth=0.88)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel(label)
        axes.set_ylabel("number")

    return _render(name, 2.5, draw)


def _shift(number: int, total: int) -> float:
    """Where the `number`-th of `total` series is in each row, from its middle: all of them within it."""
    return min(0.24, 0.8 / total) * (number - (total - 1) / 2)


def _look_of(series: int) -> tuple[str, str]:
    """Colour and marker of a series: the colours in turn, each time with another marker."""
    times, place = divmod(series, len(_SERIES))
    return _SERIES[place], _MARKERS[times % len(_MARKERS)]


def _plot_intervals(
    axes: Axes, intervals: Sequence[Interval], places: Sequence[float], series: int, name: str, *, scale: float = 100
) -> None:
    """Points with their intervals, in percent or points but for another scale, one row each."""
    colour, marker = _look_of(series)
    for interval, place in zip(intervals, places, strict=True):
        ends = [scale * interval.low, scale * interval.high]
        axes.plot(ends, [place, place], color=colour, linewidth=2.2, alpha=0.55)
    axes.plot(
        [scale * interval.value for interval in intervals], places, marker, color=colour, markersize=6, label=name
    )


def _plot_curves(
    axes: Axes, progress: Sequence[TrainProgress], measure: Callable[[TrainProgress], float | None]
) -> None:
    """`measure` over the steps, for training and for validation."""
    for kind, colour, marker in (("train", _SERIES[0], ""), ("validation", _SERIES[1], "o")):
        points = [(p.step, value) for p in progress if p.kind == kind and (value := measure(p)) is not None]
        axes.plot([x for x, _ in points], [y for _, y in points], color=colour, marker=marker, markersize=4, label=kind)
    axes.set_xlabel("step")


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """A label per row, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")


def _render(name: str, height_in: float, draw: Callable[[Axes], None]) -> str:
    """The SVG element of what `draw` puts on empty axes; `name` keeps its ids apart from other figures'."""
    # Matplotlib takes a second to import and is of no use to other commands.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside upper left", ncols=2, handlelength=1.4, columnspacing=1.2)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _adapt(buffer.getvalue(), name)


def _adapt(svg: str, name: str) -> str:
    """Matplotlib's document as an element of the page: its own ids, the page's colours and font, nothing else."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', element, count=1)
    element = re.sub(r' id="[a-z_0-9.]+_\d+"', "", element)
    element = re.sub(r' id="', f' id="{name}-', element)
    element = re.sub(r'xlink:href="#', f'href="#{name}-', element)
    element = element.replace("url(#", f"url(#{name}-")
    element = re.sub(r"font-family: [^;\"]*;? ?", "", element)
    element = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", element, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        element = element.replace(colour, variable)
    return element.strip()
