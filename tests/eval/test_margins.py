"""Margins of the right option: the rows, their tests, and what is said of them."""

import pytest
from scipy import stats

from vcot.eval.margins import build_margins, describe_margins, render_margins
from vcot.eval.statistics import estimate_mean
from vcot.eval.table_files import write_markdown
from vcot.pipeline.odds import OptionScores
from vcot.pipeline.records import CheckpointRef, ImageRef, Task

BASE = CheckpointRef(name="base", digest="sha256:aa", kind="base")
POLICY = CheckpointRef(name="policy", digest="sha256:bb", kind="merged")


def make_task(number, image):
    ref = ImageRef(sha256=f"{image:064x}", path=f"images/{image:064x}.png", width=4, height=4)
    return Task(id=f"t{number}", question="q?", choices=("a", "b", "c"), answer=number % 3, images=(ref,), source="nano",
                split="test")  # fmt: skip


TASKS = [make_task(number, number // 2) for number in range(12)]


def tell(margins, checkpoint=BASE):
    """Options' scores of the tasks in order, whose right one leads by these; None for what failed."""
    found = []
    for task, margin in zip(TASKS, margins, strict=False):
        logps = [-4.0, -5.0, -5.0]
        logps = [logps[(place - task.answer - 1) % 3] for place in range(3)]
        fields = {"key": f"{task.id} {checkpoint.name}", "task": task.id, "checkpoint": checkpoint.digest}
        if margin is None:
            found.append(OptionScores(**fields, error="no", reason="server"))
        else:
            logps[task.answer] = -4.0 + margin
            found.append(OptionScores(**fields, logps=tuple(logps)))
    return found


TRUE = [2.0, 2.5, 3.0, 1.5, 2.0, -0.5, 2.0, 3.0, 2.5, 1.0, 2.0, 2.5]
BLANK = [0.5, -0.5, 0.0, 0.5, -1.0, -0.5, 0.5, 0.0, -0.5, 0.5, 0.0, 0.5]


def test_a_row_for_each_checkpoint_and_image():
    found = {"true": tell(TRUE) + tell(BLANK, POLICY), "blank": tell(BLANK) + tell(BLANK, POLICY)}
    true, blank, same, other = build_margins(found, TASKS, [BASE, POLICY])
    assert [(row.checkpoint.name, row.shown) for row in (true, blank, same, other)] == [
        ("base", "true"), ("base", "blank"), ("policy", "true"), ("policy", "blank"),
    ]  # fmt: skip
    assert true.margin.value == pytest.approx(sum(TRUE) / 12)
    assert (true.margin.n, true.num_questions) == (6, 12), "clustered by image"
    assert true.right.value == 11 / 12
    assert blank.right.value == 5 / 12, "a tie is not right"
    assert (true.lost, true.p_value, true.p_holm) == (None, None, None)
    assert blank.lost.value == pytest.approx((sum(TRUE) - sum(BLANK)) / 12)
    assert blank.lost.low > 0
    assert blank.p_holm == pytest.approx(2 * blank.p_value), "two comparisons, one family"
    assert (other.lost.value, other.p_value) == (0.0, 1.0)


def test_what_failed_is_in_no_figure_and_is_counted():
    found = {"true": tell([None, *TRUE[1:]]), "blank": tell([*BLANK[:11], None])}
    true, blank = build_margins(found, TASKS, [BASE])
    assert (true.num_questions, true.num_failed) == (11, 1)
    assert (blank.num_questions, blank.num_failed) == (11, 1)
    assert blank.lost.value == pytest.approx((sum(TRUE[1:11]) - sum(BLANK[1:11])) / 10), "those that both told of"
    assert build_margins({"true": tell([None] * 12)}, TASKS, [BASE]) == []
    assert "11, 1 failed" in write_markdown(render_margins([true, blank]))


def test_sentences_say_what_is_clear():
    found = {"true": tell(TRUE) + tell(BLANK, POLICY), "blank": tell(BLANK) + tell(BLANK, POLICY)}
    base, policy = describe_margins(build_margins(found, TASKS, [BASE, POLICY]))
    assert base == (
        "With its own image base finds the right option 1.96 nats likelier than the best wrong one (a factor of 7.09). "
        "The margin lost without it is +1.96 nats with blank."
    )
    assert "which could be noise" in policy
    assert "No other image changes the margin" in policy
    worse = describe_margins(build_margins({"true": tell([-margin for margin in TRUE])}, TASKS, [BASE]))
    assert "1.96 nats less likely" in worse[0]
    assert "noise" not in worse[0]


def test_the_table_has_no_comparison_for_the_true_image():
    text = write_markdown(render_margins(build_margins({"true": tell(TRUE), "blank": tell(BLANK)}, TASKS, [BASE])))
    lines = [line for line in text.splitlines() if line.startswith(("| true", "| blank"))]
    assert "+1.96" in lines[0]
    assert lines[0].count("|  |") >= 1
    assert "0.0" in lines[1]


def test_each_cell_is_the_rows_figure():
    true, blank = build_margins({"true": tell([None, *TRUE[1:]]), "blank": tell(BLANK)}, TASKS, [BASE])
    [table, *_] = render_margins([true, blank])
    cells = {
        name: [cell.strip() for cell in line.strip("| ").split("|")]
        for line in write_markdown([table]).splitlines()
        for name in ("true", "blank", "margin")
        if line.startswith("|") and f" {name} " in line
    }
    assert cells["true"][1:4] == [
        f"{true.margin.value:+.2f}", f"{true.margin.low:+.2f} to {true.margin.high:+.2f}", f"{100 * true.right.value:.1f}",
    ]  # fmt: skip
    assert cells["true"][4:] == ["", "", "", "11, 1 failed"]
    assert cells["blank"][4] == f"{blank.lost.value:+.2f}"
    assert cells["blank"][5] == f"{blank.lost.low:+.2f} to {blank.lost.high:+.2f}"
    assert cells["blank"][7] == "12"
    assert cells["margin"][-7:] == ["margin", "95 % interval", "right", "lost", "95 % interval", "p", "questions"]
    assert "nats" in str(table.title)
    assert "1 comparisons" in str(table.caption)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 0.0)])
def test_an_interval_that_ends_at_zero_could_be_noise(low, high):
    [row] = build_margins({"true": tell(TRUE)}, TASKS, [BASE])
    edge = row.model_copy(update={"margin": row.margin.model_copy(update={"value": 0.5, "low": low, "high": high})})
    [said] = describe_margins([edge])
    assert "0.50 nats likelier" in said
    assert "which could be noise" in said


def test_the_mean_is_scipys_where_each_question_has_an_image():
    values = [margin - 1 for margin in TRUE]
    found, p_value = estimate_mean(values, range(12))
    theirs = stats.ttest_1samp(values, 0)
    assert p_value == pytest.approx(theirs.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval()))


def test_the_clustered_mean_is_statsmodels():
    from statsmodels.api import OLS

    clusters = [number // 2 for number in range(12)]
    fit = OLS(TRUE, [1.0] * 12).fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
    found, p_value = estimate_mean(TRUE, clusters)
    assert (found.low, found.high) == pytest.approx(tuple(fit.conf_int()[0]))
    assert p_value == pytest.approx(fit.pvalues[0])


def test_the_mean_of_what_does_not_vary_or_has_one_image():
    found, p_value = estimate_mean([2.0, 2.0], ["a", "b"])
    assert (found.low, found.high, p_value) == (2.0, 2.0, 0.0)
    assert estimate_mean([0.0, 0.0], ["a", "b"])[1] == 1.0
    found, p_value = estimate_mean([1.0, 3.0], ["a", "a"])
    assert (found.value, found.low, found.high, found.n, p_value) == (2.0, 2.0, 2.0, 1, 1.0)
    with pytest.raises(ValueError, match="no values"):
        estimate_mean([], [])
