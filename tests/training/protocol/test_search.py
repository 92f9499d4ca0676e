"""Which trainings a search has, what is read off each, and which settings are chosen."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcot.pipeline.errors import RecipeError, StageError
from vcot.services.recipes.recipe import load_recipe
from vcot.training.dpo.fit import count_steps, evaluation_steps
from vcot.training.protocol.job import TrainProgress
from vcot.training.protocol.search import (
    Settings,
    Sweep,
    SweepPoint,
    apply_settings,
    choose,
    conclude,
    count_passes,
    describe_time,
    measure_rate,
    plan_search,
    read_settings,
    summarise,
)
from vcot.training.protocol.train_sections import SweepSection

SETTINGS = Settings(epochs=2, learning_rate=1e-5, lora_dropout=0.1, lora_alpha=128)
PAPER = load_recipe("paper")
PLAN = plan_search(PAPER.sweep, PAPER.train)
CURVE = PLAN[1]


def make_point(loss, gap, job="j", varies=None, **settings):
    return SweepPoint(job=job, settings=SETTINGS.model_copy(update=settings), loss=loss, gap=gap, varies=varies)


def make_sweep(*points, mode="one_at_a_time", tolerance=0.01):
    return conclude(
        Sweep(
            mode=mode, num_trainings=9, num_train=18, num_validation=2, tolerance=tolerance, centre=SETTINGS, points=points
        )
    )  # fmt: skip


def make_progress(kind, epoch, loss, gap=None, seconds=0.0):
    step = round(10 * epoch)
    return TrainProgress(kind=kind, step=step, num_steps=50, epoch=epoch, loss=loss, gap=gap, elapsed_s=seconds)


def test_the_papers_search_varies_one_setting_at_a_time():
    assert len(PLAN) == 9, "the centre, the curve, and 3 + 2 + 2 other values"
    assert PLAN[0].train == PAPER.train
    assert read_settings(PAPER.train) == SETTINGS
    for training in PLAN[2:]:
        (read,) = training.reads
        assert training.train == apply_settings(PAPER.train, read)
        assert {name for name, value in read if value != getattr(SETTINGS, name)} == {training.varies}
    assert [t.reads[0].learning_rate for t in PLAN if t.varies == "learning_rate"] == [1e-6, 5e-6, 5e-5]
    assert [t.reads[0].lora_dropout for t in PLAN if t.varies == "lora_dropout"] == [0.5, 0.8]
    assert [t.reads[0].lora_alpha for t in PLAN if t.varies == "lora_alpha"] == [64, 256]


def test_epochs_are_read_off_one_training_that_spends_as_much_learning_rate_by_each_epochs_end():
    assert [read.epochs for read in CURVE.reads] == [1, 2, 3, 4, 5]
    assert {read.model_copy(update={"epochs": 2}) for read in CURVE.reads} == {SETTINGS}
    num_steps = count_steps(1800, CURVE.train)
    for read in CURVE.reads:
        own = apply_settings(PAPER.train, read)
        own_steps = count_steps(1800, own)
        assert own_steps == num_steps * read.epochs / 5
        linear = sum(own.learning_rate * (1 - step / own_steps) for step in range(own_steps))
        assert own_steps * CURVE.train.learning_rate == pytest.approx(linear, rel=0.02)
    constant = PAPER.train.model_copy(update={"schedule": "constant"})
    assert plan_search(PAPER.sweep, constant)[1].train.learning_rate == constant.learning_rate
    assert len(plan_search(SweepSection(epochs=(2,)), PAPER.train)) == 8, "nothing to read beside the centre"


@given(
    st.integers(1, 3000), st.integers(1, 16), st.integers(1, 8), st.integers(1, 4),
    st.sets(st.integers(1, 9), min_size=1).filter(lambda epochs: epochs != {2}),
)  # fmt: skip
def test_the_curve_is_evaluated_at_each_epochs_end(num_rows, batch_size, accumulation, num_processes, epochs):
    update = {"batch_size": batch_size, "gradient_accumulation": accumulation, "num_processes": num_processes}
    curve = plan_search(SweepSection(epochs=tuple(epochs)), PAPER.train.model_copy(update=update))[1]
    per_epoch = math.ceil(math.ceil(num_rows / (batch_size * num_processes)) / accumulation)
    evaluated = evaluation_steps(count_steps(num_rows, curve.train), curve.train.num_evaluations)
    assert {per_epoch * read.epochs for read in curve.reads} <= evaluated


def test_half_epochs_can_be_searched_in_a_grid_only():
    with pytest.raises(RecipeError, match=r'holds 0.5, but they are read at the ends of epochs; .*mode = "grid"'):
        load_recipe("nano", ["sweep.epochs=[0.5, 1]"])
    assert len(plan_search(load_recipe("nano", ["sweep.epochs=[0.5, 1]", "sweep.mode=grid"]).sweep, PAPER.train)) == 4


def test_the_grid_is_the_whole_product_short_trainings_first():
    plan = plan_search(PAPER.sweep.model_copy(update={"mode": "grid"}), PAPER.train)
    points = [read for training in plan for read in training.reads]
    assert len(points) == len(set(points)) == 5 * 4 * 3 * 3
    assert [point.epochs for point in points] == sorted(point.epochs for point in points)
    assert SETTINGS in points
    assert all(training.train == apply_settings(PAPER.train, training.reads[0]) for training in plan)


def test_settings_change_the_recipe_and_print_as_flags():
    changed = apply_settings(PAPER.train, SETTINGS.model_copy(update={"lora_alpha": 64}))
    assert (changed.lora_alpha, changed.beta) == (64, PAPER.train.beta)
    flags = SETTINGS.flags.removeprefix("--set ").split()
    assert load_recipe("nano", flags).train.learning_rate == 1e-5


def test_the_lowest_loss_wins_unless_a_smaller_gap_is_as_good():
    low, close, far = make_point(0.500, 0.20), make_point(0.504, -0.05), make_point(0.60, 0.0)
    assert choose([far, low, close], tolerance=0.01) == close
    assert choose([far, low, close], tolerance=0.0) == low
    assert choose([SweepPoint(job="x", settings=SETTINGS, fault="diverged"), far], 0.01) == far
    assert choose([], 0.01) is None


def test_each_setting_is_chosen_apart_and_epochs_among_the_reads_of_their_curve_only():
    points = [
        make_point(0.50, 0.1, "centre"),
        *(make_point(loss, 0.1, "curve", "epochs", epochs=n) for n, loss in ((1, 0.60), (2, 0.58), (3, 0.59))),
        make_point(0.40, 0.1, "lr", "learning_rate", learning_rate=5e-5),
        make_point(0.55, 0.0, "dropout", "lora_dropout", lora_dropout=0.5),
        SweepPoint(job="alpha", settings=SETTINGS, varies="lora_alpha", fault="diverged"),
    ]
    found = make_sweep(*points)
    assert found.chosen == SETTINGS.model_copy(update={"learning_rate": 5e-5})
    assert {name: point.job for name, point in found.choices.items()} == {
        "epochs": "curve", "learning_rate": "lr", "lora_dropout": "centre", "lora_alpha": "centre",
    }  # fmt: skip
    assert found.num_ended == 5
    assert make_sweep(*points[1:3]).chosen == SETTINGS
    assert make_sweep(*points, mode="grid").chosen == points[4].settings
    assert make_sweep(points[-1]).chosen is None


def test_a_training_is_summed_up_by_the_evaluations_at_the_ends_that_are_read():
    curve = [
        make_progress("validation", 0, 0.69),
        make_progress("train", 1, 0.6),
        make_progress("validation", 1.0, 0.6, 0.1, 7),
        make_progress("validation", 2.0, 0.5, -0.1, 14),
        make_progress("train", 2, 0.5),
    ]
    (point,) = summarise("j", PLAN[0], curve)
    assert (point.loss, point.gap, point.seconds, point.varies) == (0.5, -0.1, 14, None)
    reads = [(p.settings.epochs, p.loss, p.gap) for p in summarise("j", CURVE, curve)]
    assert reads[:2] == [(1, 0.6, 0.1), (2, 0.5, -0.1)]
    failed = summarise("j", CURVE, curve, "out of memory")
    assert [(p.loss, p.fault) for p in failed] == [(None, "out of memory")] * 5
    with pytest.raises(StageError, match="no validation pair"):
        summarise("j", PLAN[0], [curve[1]])


def test_a_training_of_less_than_half_a_step_of_an_epoch_is_not_read_before_its_first_step():
    """One step of three an epoch: the end at epoch 0.33 is further from 0.1 than the start, which every setting shares."""
    short = replace(PLAN[0], reads=(SETTINGS.model_copy(update={"epochs": 0.1}),))
    start, end = make_progress("validation", 0, 0.69), make_progress("validation", 1 / 3, 0.6, 0.1, 7)
    (point,) = summarise("j", short, [start, end])
    assert (point.loss, point.gap) == (0.6, 0.1)


def test_the_work_is_counted_in_passes_and_timed_by_what_was_measured():
    assert count_passes(PLAN, 1800) == 1800 * (2 * 8 + 5)
    assert measure_rate([], 100) is None
    assert measure_rate([make_progress("train", 0.01, 0.6, seconds=9)], 100) is None, "the first step tells little"
    assert measure_rate([make_progress("train", 0.5, 0.6, seconds=25)], 100) == 0.5
    assert [describe_time(seconds) for seconds in (40, 1500, 11520)] == ["40 s", "25 min", "3.2 h"]
