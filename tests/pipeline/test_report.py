"""What a step tells reaches any listener, and what was opened is always ended."""

import pytest

from vcot.pipeline.report import Began, Ended, Progress, Waiting, aside, progress, tracking, tracking_several, waiting
from vcot.pipeline.stage import Tally


def test_progress_is_told_by_the_tally_with_its_troubles():
    events = []
    tally = Tally("sample", total=3)
    with tracking(events.append, "responses", lambda: "$1") as on_progress:
        tally.add("failed", reason="timeout")
        on_progress(tally)
    assert events == [Progress("responses", 0, 0, ""), Progress("responses", 1, 3, "$1; 1 failed"), Ended()]


@pytest.mark.parametrize(
    ("open_one", "first"),
    [
        (lambda report: aside(report, "serve", "x"), Began("serve", "x", is_aside=True)),
        (lambda report: progress(report, "steps"), Progress("steps", 0, 0, "")),
        (lambda report: waiting(report, "x"), Waiting("x")),
    ],
)
def test_what_failed_inside_is_ended_too(open_one, first):
    events = []
    with pytest.raises(ValueError, match="inside"), open_one(events.append):
        raise ValueError("inside")
    assert events == [first, Ended()]


def test_stages_that_go_on_at_once_are_told_as_one():
    events = []
    first, second = Tally("eval", total=3), Tally("eval", total=4)
    with tracking_several(events.append, "responses") as track:
        listeners = track(), track()
        listeners[0](first)
        second.add("failed", reason="timeout")
        listeners[1](second)
        first.add("ok", 2)
        listeners[0](first)
    assert [(event.done, event.total, event.note) for event in events[1:-1]] == [
        (0, 3, ""),
        (1, 7, "1 failed"),
        (3, 7, "1 failed"),
    ]
    assert events[-1] == Ended()
