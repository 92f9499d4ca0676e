"""Which points a sweep has, and which of them is chosen."""

import pytest

from pipeline.errors import StageError
from pipeline.recipe import SweepSection, load_recipe
from training.job import TrainProgress
from training.sweep import Settings, SweepPoint, apply_settings, choose, plan_points, summarise

SETTINGS = Settings(epochs=2, learning_rate=1e-5, lora_dropout=0.1, lora_alpha=128)


def make_point(loss, gap, job="j"):
    return SweepPoint(job=job, settings=SETTINGS, loss=loss, gap=gap)


def test_the_papers_grid_is_the_whole_product_short_trainings_first():
    points = plan_points(load_recipe("paper").sweep)
    assert len(points) == len(set(points)) == 5 * 4 * 3 * 3
    assert [point.epochs for point in points] == sorted(point.epochs for point in points)
    assert SETTINGS in points
    assert len(plan_points(load_recipe("nano").sweep)) == 4
    assert len(plan_points(SweepSection(epochs=(3,)))) == 36


def test_settings_change_the_recipe_and_print_as_flags():
    train = load_recipe("paper").train
    assert apply_settings(train, SETTINGS) == train
    changed = apply_settings(train, SETTINGS.model_copy(update={"lora_alpha": 64}))
    assert (changed.lora_alpha, changed.beta) == (64, train.beta)
    flags = SETTINGS.flags.removeprefix("--set ").split()
    assert load_recipe("nano", flags).train.learning_rate == 1e-5


def test_the_lowest_loss_wins_unless_a_smaller_gap_is_as_good():
    low, close, far = make_point(0.500, 0.20), make_point(0.504, -0.05), make_point(0.60, 0.0)
    assert choose([far, low, close], tolerance=0.01) == close
    assert choose([far, low, close], tolerance=0.0) == low
    assert choose([SweepPoint(job="x", settings=SETTINGS, fault="diverged"), far], 0.01) == far
    assert choose([], 0.01) is None


def test_a_point_is_summed_up_by_its_last_validation():
    def progress(kind, step, loss, gap=None):
        return TrainProgress(kind=kind, step=step, num_steps=2, epoch=1, loss=loss, gap=gap, elapsed_s=step)

    curve = [progress("validation", 0, 0.69), progress("validation", 2, 0.6, 0.1), progress("train", 2, 0.5)]
    point = summarise("j", SETTINGS, curve)
    assert (point.loss, point.gap, point.seconds) == (0.6, 0.1, 2)
    assert summarise("j", SETTINGS, curve, "out of memory").loss is None
    with pytest.raises(StageError, match="no validation pair"):
        summarise("j", SETTINGS, curve[2:])
