"""A run as tables, for a notebook: its tasks, every response with its score and rationale, pairs, and evaluations.

    run = load("runs/nano")
    run.responses.pandas()

A table is read from the run each time that it is gone through, some rows at a time; `pandas` and `arrow` hold all of it,
`batches` and a loop over it do not. A run is read as it was when the first table was; a command may write to it meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcot.pipeline.judging import Seen, look_at_judgments
from vcot.pipeline.pairs import Couple
from vcot.pipeline.records import Response, Task
from vcot.pipeline.report import ignore
from vcot.pipeline.stage import batched
from vcot.services.run.directory import open_run
from vcot.services.run.rounds import Round, list_rounds, make_judge
from vcot.services.run.session import Session

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_BATCH = 1000
Cells = dict[str, Any]
_TYPES: dict[str, dict[str, str]] = {
    "tasks": {
        "part": "text", "round": "number", "task": "text", "question": "text", "choices": "texts", "answer": "text",
        "gold": "text", "accepted": "texts", "subject": "text", "family": "text", "images": "texts", "source": "text",
        "split": "text",
    },
    "responses": {
        "round": "number", "task": "text", "response": "text", "index": "number", "checkpoint": "text", "weights": "text",
        "prompt": "text", "temperature": "real", "seed": "number", "text": "text", "thought": "text", "answer": "text",
        "finish_reason": "text", "error": "text", "reason": "text", "refused": "flag", "judge": "text", "judgment": "text",
        "score": "real", "score_low": "real", "score_high": "real", "rationale": "text", "judge_error": "text",
        "judge_refused": "flag",
    },
    "judgments": {
        "round": "number", "task": "text", "response": "text", "judge": "text", "judgment": "text", "score": "real",
        "score_low": "real", "score_high": "real", "rationale": "text", "judge_error": "text", "judge_refused": "flag",
    },
    "pairs": {
        "round": "number", "split": "text", "task": "text", "prompt": "text", "chosen": "text", "rejected": "text",
        "chosen_score": "real", "rejected_score": "real", "chosen_response": "text", "rejected_response": "text",
        "judge": "text", "weights": "text",
    },
    "evaluations": {
        "task": "text", "subject": "text", "checkpoint": "text", "weights": "text", "prompt": "text", "temperature": "real",
        "shown": "text", "index": "number", "response": "text", "text": "text", "finish_reason": "text", "outcome": "text",
        "answer": "text", "target": "text", "error": "text",
    },
}  # fmt: skip
"""Columns of each table, in order, with their types."""


@dataclass(frozen=True)
class Rows:
    """One table of a run."""

    name: str
    read: Callable[[], Iterator[Cells]]

    def __iter__(self) -> Iterator[Cells]:
        """Each row as a dict. Raises OwedError, and what else reading the run raises, at the first."""
        return self.read()

    @property
    def columns(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(_TYPES[self.name])

    @property
    def schema(self) -> pa.Schema:
        """Their Arrow types."""
        import pyarrow as pa

        types = {
            "text": pa.string(), "number": pa.int64(), "real": pa.float64(), "flag": pa.bool_(),
            "texts": pa.list_(pa.string()),
        }  # fmt: skip
        return pa.schema([(name, types[kind]) for name, kind in _TYPES[self.name].items()])

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Some rows at a time, as Arrow."""
        import pyarrow as pa

        schema = self.schema
        for rows in batched(self, _BATCH):
            yield pa.RecordBatch.from_pylist(list(rows), schema=schema)

    def arrow(self) -> pa.Table:
        """All rows."""
        import pyarrow as pa

        return pa.Table.from_batches(self.batches(), schema=self.schema)

    def pandas(self) -> pd.DataFrame:
        """All rows."""
        return self.arrow().to_pandas()


@dataclass(frozen=True)
class LoadedRun:
    """A run that is only read; a context manager, for who wants its file closed."""

    session: Session

    def __enter__(self) -> LoadedRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the ledger."""
        self.session.run.ledger.close()

    @property
    def tables(self) -> tuple[Rows, ...]:
        """All of them."""
        return self.tasks, self.responses, self.judgments, self.pairs, self.evaluations

    @property
    def tasks(self) -> Rows:
        """The questions: `part` is `train` or `eval`; `answer` is the gold option's letter."""
        return Rows("tasks", self._read_tasks)

    @property
    def responses(self) -> Rows:
        """Every sampled response, errors included, with the recipe's judge's score and rationale."""
        return Rows("responses", self._read_responses)

    @property
    def judgments(self) -> Rows:
        """What each judge said of each response: of one with members, theirs, too."""
        return Rows("judgments", self._read_judgments)

    @property
    def pairs(self) -> Rows:
        """The preference pairs, with the split that they are in."""
        return Rows("pairs", self._read_pairs)

    @property
    def evaluations(self) -> Rows:
        """Every answer to the benchmark, with what it counted as; `shown` says which image was."""
        return Rows("evaluations", self._read_evaluations)

    @cached_property
    def _rounds(self) -> list[Round]:
        return list_rounds(self.session)

    def _read_tasks(self) -> Iterator[Cells]:
        for current in self._rounds:
            for task in current.tasks:
                yield _describe_task(task) | {"part": "train", "round": current.number}
        for task in self.session.questions(self.session.run.recipe.eval.split).tasks:
            yield _describe_task(task) | {"part": "eval", "round": None}

    def _read_responses(self) -> Iterator[Cells]:
        judge, ledger = make_judge(self.session), self.session.run.ledger
        for current in self._rounds:
            for groups in batched(current.groups):
                judged = look_at_judgments(judge, groups, ledger, whole=True)
                for group, (_, seen) in zip(groups, judged, strict=True):
                    by_key = {one.response.key: one for one in seen}
                    for response in group.found:
                        said = _describe_judgment(by_key.get(response.key), judge.name)
                        yield {"round": current.number} | _describe_response(response) | said

    def _read_judgments(self) -> Iterator[Cells]:
        for current in self._rounds:
            for judge in make_judge(self.session).walk():
                found = look_at_judgments(judge, current.groups, self.session.run.ledger, whole=True)
                for task, seen in found:
                    for one in seen:
                        if one.judgment is not None:
                            place = {"round": current.number, "task": task.id, "response": one.response.key}
                            yield place | _describe_judgment(one, judge.name)

    def _read_pairs(self) -> Iterator[Cells]:
        for current in self._rounds:
            for split, couples in (("train", current.pairs.train), ("validation", current.pairs.validation)):
                yield from self._read_couples(current, split, couples)

    def _read_couples(self, current: Round, split: str, couples: list[Couple]) -> Iterator[Cells]:
        for pair in current.read(couples):
            fields = {"task", "prompt", "chosen", "rejected", "chosen_score", "rejected_score", "judge"}
            keys = {"chosen_response": pair.chosen_key, "rejected_response": pair.rejected_key, "weights": pair.policy}
            yield {"round": current.number, "split": split} | pair.model_dump(include=fields) | keys

    def _read_evaluations(self) -> Iterator[Cells]:
        questions, ledger = self.session.questions(self.session.run.recipe.eval.split), self.session.run.ledger
        for checkpoint in self.session.registry.list():
            for shown in questions.section.images:
                for requests in batched(questions.requests(checkpoint.ref, [shown])):
                    found = ledger.get(Response, (key for request in requests for key in request.response_keys()))
                    responses = list(found.values())
                    for response, score in zip(responses, questions.score(responses, ledger), strict=True):
                        said = {
                            "subject": score.subject,
                            "shown": shown,
                            "outcome": score.value,
                            "target": score.target,
                        }
                        yield _describe_response(response) | said | {"answer": score.answer}


def load(directory: str | Path) -> LoadedRun:
    """A run's tables. Raises RecipeError where the directory is no run."""
    with open_run(Path(directory), access="read") as run:
        return LoadedRun(Session(run, ignore))


def _describe_task(task: Task) -> Cells:
    fields = {"question", "choices", "gold", "accepted", "subject", "family", "source", "split"}
    own = {"task": task.id, "answer": task.answer_letter, "images": [image.path for image in task.images]}
    return task.model_dump(include=fields) | own


def _describe_response(response: Response) -> Cells:
    fields = {"task", "index", "prompt", "text", "thought", "answer", "finish_reason", "error", "reason", "refused"}
    return response.model_dump(include=fields) | {
        "response": response.key,
        "checkpoint": response.checkpoint.name,
        "weights": response.checkpoint.digest,
        "temperature": response.sampling.temperature,
        "seed": response.sampling.seed,
    }


def _describe_judgment(seen: Seen | None, judge: str) -> Cells:
    found = seen.judgment if seen else None
    return {
        "judge": judge,
        "judgment": found.key if found else None,
        "score": found.score if found else None,
        "score_low": found.low if found else None,
        "score_high": found.high if found else None,
        "rationale": found.rationale if found else None,
        "judge_error": found.error if found else None,
        "judge_refused": found.refused if found else None,
    }
