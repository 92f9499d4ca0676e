"""From the scores and files of a run to what people read: Table 1 in the terminal, `results.json`, and the report page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType

from eval.table import build_chance, build_differences, build_results, render_results
from pipeline.records import Difference, EvalResult, Record, Score
from services.checkpoints import Checkpoint
from services.stages import Session


class Evaluation(Record):
    """What an evaluation found; `results.json` in the run's report folder."""

    results: tuple[EvalResult, ...]
    differences: tuple[Difference, ...]
    """Each later checkpoint minus the first."""
    chance: dict[str, float]

    @property
    def renderables(self) -> list[RenderableType]:
        """The tables and sentences for a terminal."""
        return render_results(self.results, self.differences, self.chance)


def evaluate_scores(session: Session, scores: Sequence[Score], checkpoints: Sequence[Checkpoint]) -> Evaluation:
    """Table 1 and the paired differences, kept as `report/results.json`."""
    section = session.run.recipe.eval
    refs = [checkpoint.ref for checkpoint in checkpoints]
    evaluation = Evaluation(
        results=tuple(build_results(scores, refs, seed=section.seed, num_samples=section.num_samples)),
        differences=tuple(build_differences(scores, refs[0], refs[1:])),
        chance=build_chance(scores),
    )
    session.run.path("report", "results.json").write_text(evaluation.model_dump_json(indent=2) + "\n", "utf-8")
    return evaluation
