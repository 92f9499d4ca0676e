"""`vcot sweep` with real TRL: three trainings on nano, killed in the middle, and the same command again."""

from __future__ import annotations

import csv
import json
import re

import pytest

from vcot.pipeline.pairs import PairSet
from vcot.pipeline.publish import pairs_digest
from vcot.pipeline.records import StageCount
from vcot.services.cli.terminal import Terminal
from vcot.services.jobs import trainer
from vcot.services.run.directory import open_run
from vcot.services.run.rounds import Pairs, Round
from vcot.services.run.session import Session
from vcot.services.run.steps import publish_splits
from vcot.services.run.sweep import RECORD, sweep
from vcot.training.protocol.job import ADAPTER
from vcot.training.protocol.search import Sweep

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]
GRID = (
    "sweep.num_pairs=20",
    "sweep.epochs=[1, 2]",
    "sweep.learning_rate=[1e-4, 1e30]",
    "sweep.lora_dropout=[0.1]",
    "train.num_evaluations=2",
    "eval.num_tasks=2",
)


class Stopped(Exception):
    """Stands for Ctrl-C: the block of the worker process is left."""


@pytest.fixture
def session(tmp_path):
    with open_run(tmp_path / "run", "nano", GRID) as run:
        yield Session(run, Terminal())


@pytest.fixture
def current(session, pairs_in):
    """The run's round, with pairs that nobody had to sample."""
    pairs = pairs_in(session.run.images, 40, 0)
    train, validation = pairs[:36], pairs[36:]
    digest, directory = pairs_digest(train, validation), session.run.path("pairs", "drawn")
    pair_set = PairSet(tuple(pairs), StageCount(stage="pair", requested=40, ok=40))
    found = Round(session, 1, session.base)
    vars(found)["pairs"] = Pairs(
        pair_set, train, validation, iter, digest, directory, (), StageCount(stage="judge", requested=80, ok=80)
    )
    publish_splits(found, train, validation, digest, directory)
    return found


def read_sweep(session):
    return Sweep.model_validate_json(session.run.path("report", RECORD).read_text())


async def test_a_killed_sweep_does_not_do_again_what_is_done(session, current, monkeypatch, capsys):
    """One learning rate is absurd on purpose: such a training fails, and is no reason to stop."""
    train_all = trainer.train_all

    async def stop_after_one(jobs, log, on_poll):
        def poll():
            on_poll()
            if session.run.path("report", RECORD).is_file():
                raise Stopped

        await train_all(jobs, log, poll)

    monkeypatch.setattr(trainer, "train_all", stop_after_one)
    with pytest.raises(Stopped):
        await sweep(current)
    assert "how long they take is said as soon as" in capsys.readouterr().err
    done = read_sweep(session).points
    assert 1 <= read_sweep(session).num_ended < 3

    asked = []

    async def remember(jobs, log, on_poll):
        asked.extend(job.key for job in jobs.values())
        await train_all(jobs, log, on_poll)

    monkeypatch.setattr(trainer, "train_all", remember)
    found = await sweep(current)
    assert found == read_sweep(session)
    fine = {point.job for point in done if not point.fault}
    assert fine.isdisjoint(asked)
    assert (found.num_ended, found.num_trainings, found.num_train, found.num_validation) == (3, 3, 18, 2)
    assert [(point.settings.learning_rate, point.varies) for point in found.points if point.fault] == [
        (1e30, "learning_rate")
    ]
    centre, first, second, _ = found.points
    assert (first.settings.epochs, second.settings.epochs, first.job == second.job) == (1, 2, True)
    assert first.seconds < second.seconds
    steps = [p for p in trainer.read_progress(session.run.path("training", first.job[:12])) if p.kind == "train"]
    assert {step.learning_rate for step in steps} == {5e-5}, "half the peak, and constant"
    assert first.loss != second.loss
    assert None not in (centre.gap, first.gap, second.gap)
    assert found.choices["learning_rate"] == centre
    assert found.choices["epochs"] in (first, second)
    assert found.chosen == centre.settings.model_copy(update={"epochs": found.choices["epochs"].settings.epochs})
    said = capsys.readouterr()
    assert found.chosen.flags in said.out
    assert re.search(r"passes of a pair through the model are left: about \d+ s, at [\d.]+ s a pass", said.err)
    assert (await sweep(current)).chosen == found.chosen

    adapters = {path.parent.name for path in session.run.directory.glob(f"training/*/{ADAPTER}")}
    kept = {centre.job[:12]} if found.chosen == centre.settings else set()
    assert adapters == kept, "one that was trained with the chosen settings is kept, and no other"
    rows = list(csv.DictReader(session.run.path("report", "sweep.csv").read_text().splitlines()))
    assert {row["job"] for row in rows if row["chosen"] == "1"} == {centre.job, found.choices["epochs"].job}
    svg = session.run.path("report", "sweep.svg").read_text()
    assert svg.startswith("<svg xmlns=")
    assert "chosen" in svg
    references = list(session.run.directory.glob("reference/*.sqlite"))
    assert len(references) == 1, "the reference's log-probs are computed once for all"
    looked = list(session.run.directory.glob("training/preflight/*.json"))
    assert len(looked) == 1, "each pair is looked at once for all"
    assert json.loads(looked[0].read_text())["train"]["num_kept"] == 18
    assert current.job.key not in {point.job for point in found.points}
