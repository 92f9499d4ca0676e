"""A person's labels: on disk before they count, never changed, and compared with the judge within a task."""

import os
from itertools import count

import pytest
from pydantic import ValidationError

from vcot.eval.statistics import estimate_accuracy
from vcot.pipeline.errors import InputError
from vcot.services.view.labels import Label, keep_label, measure_agreement, read_labels, say_agreement

CLOCK = count()


def label(response, said, than=None, task="t1"):
    return Label(part="train", task=task, response=response, said=said, than=than, at=next(CLOCK))


def kept(path, *labels):
    for one in labels:
        keep_label(path, one)
    return read_labels(path)


def test_what_was_said_last_holds_and_can_be_taken_back(tmp_path):
    path = tmp_path / "view" / "labels.jsonl"
    said = [
        label("a", "right"),
        label("b", "wrong"),
        label("a", "wrong"),
        label("b", "none"),
        label("a", "better", "b"),
    ]
    held = kept(path, *said)
    assert {key: one.said for key, one in held.marked.items()} == {"a": "wrong"}
    assert held.find("b", "a") == said[-1]
    assert kept(path, label("b", "better", "a")).find("a", "b").response == "b"
    assert kept(path, label("a", "none", "b")).find("a", "b") is None
    assert len(path.read_text().splitlines()) == 7, "no line is ever changed"


def test_a_label_is_on_disk_before_it_is_kept(tmp_path, monkeypatch):
    path, synced = tmp_path / "labels.jsonl", []
    monkeypatch.setattr("os.fsync", lambda number: synced.append(os.fstat(number).st_size))
    keep_label(path, label("a", "right"))
    assert synced == [path.stat().st_size]


def test_a_line_that_a_crash_cut_short_costs_no_other(tmp_path):
    path = tmp_path / "labels.jsonl"
    kept(path, label("a", "right"))
    with path.open("ab") as file:
        file.write(b'{"part": "train", "ta')
    held = kept(path, label("b", "wrong"))
    assert (sorted(held.marked), held.num_unreadable) == (["a", "b"], 1)


def test_a_label_that_cannot_be_kept_is_said(tmp_path):
    (tmp_path / "view").write_text("")
    with pytest.raises(InputError, match=r"labels.jsonl cannot be written .* not kept"):
        keep_label(tmp_path / "view" / "labels.jsonl", label("a", "right"))


@pytest.mark.parametrize(
    "fields", [{"said": "better"}, {"said": "right", "than": "b"}, {"said": "better", "than": "a"}]
)
def test_what_makes_no_sense_is_no_label(fields):
    with pytest.raises(ValidationError):
        Label(part="p", task="t", response="a", at=0, **fields)


def test_agreement_by_hand(tmp_path):
    """Task 1: right a, b against wrong c: won, tied. Task 2: d is better than e: lost. Task 3: one is not scored."""
    held = kept(
        tmp_path / "labels.jsonl",
        *(label("a", "right"), label("b", "right"), label("c", "wrong"), label("d", "better", "e", task="t2")),
        *(label("f", "right", task="t3"), label("g", "wrong", task="t3"), label("h", "right", task="t4")),
    )
    scores = {"a": 0.9, "b": 0.5, "c": 0.5, "d": 0.1, "e": 0.4, "f": 1.0, "h": 1.0}
    found = measure_agreement(held, scores, {"t1": "one image", "t2": "another"})
    assert found.auc.value == pytest.approx((1 + 0.5 + 0) / 3)
    assert found.auc == estimate_accuracy([1, 0.5, 0], ["one image", "one image", "another"])
    assert (found.num_labels, found.num_compared, found.num_unscored) == (7, 3, 1)
    assert "ranks as you do in 50%" in " ".join(say_agreement(found, "verifier/1"))


def test_what_was_compared_itself_is_not_counted_twice(tmp_path):
    held = kept(tmp_path / "labels.jsonl", label("a", "right"), label("b", "wrong"), label("b", "better", "a"))
    assert measure_agreement(held, {"a": 1.0, "b": 0.0}, {}).auc.value == 0


def test_no_comparison_is_no_figure(tmp_path):
    held = kept(tmp_path / "labels.jsonl", label("a", "right"))
    found = measure_agreement(held, {"a": 1.0}, {})
    assert found.auc is None
    assert "then agreement can be counted" in " ".join(say_agreement(found, "verifier/1"))
