"""Does training on AI feedback make nano answer better, and does it look at the image? Base, DPO and mDPO, several seeds.

    make experiment           (python -m bench.experiment [--run DIR] [--seeds N ...] [--methods M ...])

Measured, from real runs: accuracy of each arm with each prompt when the question's own image is shown, a blank one, and
another question's; image reliance (own minus blank, own minus other); the differences between arms in both; and the reward
margin on validation pairs. Written to `docs/experiments.md` (between its marks), `.json` and `.svg`.

How: one run, its responses, judgments, pairs and reference log-probs shared; `vcot run` once for each method and seed. A
seed decides the adapter's start, the order of pairs and dropout. An arm's accuracy is over the answers of all its seeds.
Every figure is clustered by image, differences are paired by question (an arm's value for a question is its mean over
seeds), p is Holm's over all differences. What is done is not done again: stopped anywhere, the same command goes on.

Limits: nano. Intervals are about other questions, given these seeds; the spread over seeds stands beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vcot.eval.evaluate import Scores
from vcot.eval.statistics import adjust_holm, compare_paired, estimate_accuracy
from vcot.eval.table import Setting, format_estimate, format_p, list_settings, question_shares, select_scores
from vcot.pipeline.records import Interval, Record, Score, ShownImage
from vcot.services.cli.commands import run_all
from vcot.services.cli.terminal import Terminal
from vcot.services.jobs.trainer import read_progress
from vcot.services.run.directory import open_run
from vcot.services.run.rounds import list_rounds
from vcot.services.run.serving import running_gateway
from vcot.services.run.session import Session
from vcot.services.run.steps import load_scores

DOCS = Path(__file__).parents[1] / "docs"
IMAGES: tuple[ShownImage, ...] = ("true", "blank", "other")
_MARKS = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.DOTALL)
_COLOURS = {"true": "#4f46e5", "blank": "#94a3b8", "other": "#f59e0b"}


class Cell(Record):
    """One arm with one prompt, temperature and image."""

    arm: str
    prompt: str
    temperature: float
    shown: ShownImage
    accuracy: Interval
    by_seed: tuple[float, ...]
    no_answer: float


class Contrast(Record):
    """The second of two arms minus the first."""

    first: str
    second: str
    prompt: str
    temperature: float
    measure: str
    """`accuracy`, or the reliance on the image: `own - blank`, `own - other`."""
    difference: Interval
    p_holm: float
    mde: float


class Experiment(Record):
    """All that was measured."""

    seeds: tuple[int, ...]
    num_pairs: int
    num_questions: int
    margins: dict[str, tuple[float, ...]]
    """By arm, a value a seed: the reward margin on validation pairs at the end."""
    reward_accuracies: dict[str, tuple[float, ...]]
    """The same for the share of validation pairs that the policy ranks right."""
    cells: tuple[Cell, ...]
    contrasts: tuple[Contrast, ...]


@dataclass
class Arm:
    """The checkpoints of one method; filled by `run_arm`."""

    name: str
    scores: list[Scores]
    """One per seed."""
    margins: tuple[float, ...] = ()
    reward_accuracies: tuple[float, ...] = ()
    num_pairs: int = 0

    def pooled(self, shown: ShownImage, setting: Setting) -> list[Score]:
        """The answers of all seeds."""
        return [score for part in self.scores for score in select_scores(part[shown], setting)]

    def measure(self, name: str, setting: Setting) -> dict[str, float]:
        """By question, over the seeds: the share that is right, or what of it is lost with another image."""
        own = question_shares(self.pooled("true", setting))
        if name == "accuracy":
            return own
        shown: ShownImage = "blank" if name == "own - blank" else "other"
        lost = question_shares(self.pooled(shown, setting))
        return {task: value - lost[task] for task, value in own.items() if task in lost}


MEASURES = ("accuracy", "own - blank", "own - other")


async def run_arms(
    directory: Path, methods: Sequence[str], seeds: Sequence[int], overrides: Sequence[str]
) -> list[Arm]:
    """Train and evaluate every method with every seed, behind one gateway."""
    terminal, arms = Terminal(), [Arm("base", []), *(Arm(method, []) for method in methods)]
    with open_run(directory, "nano", overrides) as run:
        async with running_gateway(run, terminal.say):
            for seed in seeds:
                for arm in arms[1:]:
                    terminal.heading("arm", f"{arm.name}, seed {seed}")
                    await _run_one(directory, arm, seed, arms[0])
    return arms


async def _run_one(directory: Path, arm: Arm, seed: int, base: Arm) -> None:
    with open_run(directory, None, [f"train.method={arm.name}", f"train.seed={seed}"], access="alone") as run:
        async with Session(run, Terminal()) as session:
            await run_all(session)
            [current] = list_rounds(session)
            assert current.policy is not None
            split = run.recipe.eval.split
            base.scores = base.scores or [load_scores(session, [session.base], split)]
            arm.scores.append(load_scores(session, [current.policy], split))
            last = [point for point in read_progress(current.job_directory) if point.kind == "validation"][-1]
            arm.margins = (*arm.margins, last.reward_margin or 0.0)
            arm.reward_accuracies = (*arm.reward_accuracies, last.reward_accuracy or 0.0)
            arm.num_pairs = len(current.pairs.train)


def measure(arms: Sequence[Arm], seeds: Sequence[int]) -> Experiment:
    """Everything, from the scores. Pure."""
    settings = list_settings(arms[0].scores[0]["true"])
    contrasts = list(_contrasts(arms, settings))
    adjusted = adjust_holm([contrast.p_holm for contrast in contrasts])
    return Experiment(
        seeds=tuple(seeds),
        num_pairs=arms[1].num_pairs,
        num_questions=len(arms[0].measure("accuracy", settings[0])),
        margins={arm.name: arm.margins for arm in arms[1:]},
        reward_accuracies={arm.name: arm.reward_accuracies for arm in arms[1:]},
        cells=tuple(_cell(arm, setting, shown) for setting in settings for arm in arms for shown in IMAGES),
        contrasts=tuple(
            contrast.model_copy(update={"p_holm": p}) for contrast, p in zip(contrasts, adjusted, strict=True)
        ),
    )


def _cell(arm: Arm, setting: Setting, shown: ShownImage) -> Cell:
    good = [score for score in arm.pooled(shown, setting) if score.error is None]
    seeds = ([s for s in select_scores(part[shown], setting) if s.error is None] for part in arm.scores)
    return Cell(
        arm=arm.name,
        prompt=setting[0],
        temperature=setting[1],
        shown=shown,
        accuracy=estimate_accuracy([s.value == "correct" for s in good], [s.image or s.task for s in good]),
        by_seed=tuple(statistics.fmean(s.value == "correct" for s in part) for part in seeds),
        no_answer=statistics.fmean(score.value == "no_answer" for score in good),
    )


def _contrasts(arms: Sequence[Arm], settings: Sequence[Setting]) -> Iterator[Contrast]:
    """Each trained arm against the base, and the trained ones against the first; p is not adjusted yet."""
    images = {score.task: score.image or score.task for score in arms[0].scores[0]["true"]}
    pairs = [(arms[0], arm) for arm in arms[1:]] + [(arms[1], arm) for arm in arms[2:]]
    for first, second in pairs:
        for setting in settings:
            for name in MEASURES:
                old, new = first.measure(name, setting), second.measure(name, setting)
                tasks = [task for task in old if task in new]
                values = [old[task] for task in tasks], [new[task] for task in tasks]
                found = compare_paired(*values, [images[task] for task in tasks])
                yield Contrast(
                    first=first.name,
                    second=second.name,
                    prompt=setting[0],
                    temperature=setting[1],
                    measure=name,
                    difference=found.interval,
                    p_holm=found.p_value,
                    mde=found.mde,
                )


def render_tables(found: Experiment) -> str:
    """The two tables as Markdown."""
    size = f"{len(found.seeds)} seeds, {found.num_pairs} training pairs, {found.num_questions} test questions"
    lines = [
        f"{size}. Accuracy in %, ± half of the 95 % interval; in brackets lowest and highest seed.",
        "",
        "| prompt, temperature | arm | own image | blank | another's | own - blank | own - other |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, float, str], dict[str, Cell]] = {}
    for cell in found.cells:
        groups.setdefault((cell.prompt, cell.temperature, cell.arm), {})[cell.shown] = cell
    for (prompt, temperature, arm), cells in groups.items():
        own = cells["true"].accuracy.value
        lost = [f"{100 * (own - cells[name].accuracy.value):+.1f}" for name in IMAGES[1:]]
        row = [f"{prompt} {temperature:g}", arm, *(_describe(cells[name]) for name in IMAGES), *lost]
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", "| trained with | reward margin by seed | validation pairs ranked right, % |", "|---|---|---|"]
    for arm, margins in found.margins.items():
        ranked = ", ".join(f"{100 * share:.0f}" for share in found.reward_accuracies[arm])
        lines.append(f"| {arm} | {', '.join(f'{margin:.2f}' for margin in margins)} | {ranked} |")
    lines += [
        "",
        "| difference, points | prompt, temperature | of | value | 95 % interval | p (Holm) | detectable |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in found.contrasts:
        interval = f"{100 * c.difference.low:+.1f} to {100 * c.difference.high:+.1f}"
        value = f"{100 * c.difference.value:+.1f}"
        value = f"**{value}**" if c.p_holm < 0.05 else value
        row = [f"{c.second} - {c.first}", f"{c.prompt} {c.temperature:g}", c.measure, value, interval]
        lines.append(
            f"| {' | '.join(row)} | {format_p(c.p_holm).removeprefix('p ').removeprefix('= ')} | {100 * c.mde:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _describe(cell: Cell) -> str:
    estimate = format_estimate(cell.accuracy)
    spread = f" [{100 * min(cell.by_seed):.1f}, {100 * max(cell.by_seed):.1f}]" if len(cell.by_seed) > 1 else ""
    return estimate + spread


def draw(found: Experiment, out: Path) -> None:
    """Accuracy by arm and image, a panel for each prompt at the first temperature."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    temperature = min(cell.temperature for cell in found.cells)
    cells = [cell for cell in found.cells if cell.temperature == temperature]
    prompts, arms = (list(dict.fromkeys(getattr(cell, name) for cell in cells)) for name in ("prompt", "arm"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vcot", "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.4 * len(prompts), 3.4), layout="constrained", facecolor="#f8fafc")
        panels = figure.subplots(1, len(prompts), sharey=True, squeeze=False)[0]
        for axes, prompt in zip(panels, prompts, strict=True):
            for cell in (cell for cell in cells if cell.prompt == prompt):
                place = arms.index(cell.arm) + 0.22 * (IMAGES.index(cell.shown) - 1)
                colour, interval = _COLOURS[cell.shown], cell.accuracy
                axes.bar(place, 100 * interval.value, 0.2, color=colour, label=f"{cell.shown} image")
                axes.plot([place, place], [100 * interval.low, 100 * interval.high], color="#1e293b", linewidth=1.2)
                axes.plot(
                    [place] * len(cell.by_seed), [100 * v for v in cell.by_seed], "_", color="#1e293b", markersize=7
                )
            axes.axhline(25, color="#1e293b", linestyle=(0, (2, 3)), linewidth=1)
            axes.set_xticks(range(len(arms)), arms)
            axes.set_title(f"{prompt}, temperature {temperature:g}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_facecolor("#f8fafc")
        panels[0].set_ylabel("accuracy, %")
        handles, labels = panels[0].get_legend_handles_labels()
        legend = dict(zip(labels, handles, strict=True))
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.experiment", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/experiment"))
    parser.add_argument("--methods", nargs="+", default=["dpo", "mdpo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.4, 0.8])
    parser.add_argument(
        "--set", nargs="*", default=[], help="more overrides of the nano recipe, as section.field=value"
    )
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args()
    overrides = [
        f"eval.temperatures={options.temperatures}",
        f"eval.images={list(IMAGES)}",
        "serve.port=0",
        *options.set,
    ]
    found = measure(asyncio.run(run_arms(options.run, options.methods, options.seeds, overrides)), options.seeds)
    (options.out / "experiments.json").write_text(found.model_dump_json(indent=1) + "\n", "utf-8")
    draw(found, options.out / "experiments.svg")
    page = options.out / "experiments.md"
    text = page.read_text("utf-8") if page.is_file() else "<!-- measured -->\n<!-- /measured -->\n"
    page.write_text(_MARKS.sub(lambda marks: f"{marks[1]}{render_tables(found)}{marks[2]}", text), "utf-8")
    print(found.model_dump_json(exclude={"cells", "contrasts"}))


if __name__ == "__main__":
    main()
