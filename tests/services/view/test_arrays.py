"""The index's columns say what its rows say."""

from contextlib import closing

import pytest

from vcot.services.view.arrays import read_mask, read_numbers, read_scored, write_columns
from vcot.services.view.index import Facets, Index, Part, open_index

SCORES = {1: [0.0, 0.5], 2: [0.5], 3: [1.0], 4: []}


@pytest.fixture
def index(tmp_path):
    path = tmp_path / "index.sqlite"
    with closing(open_index(path)) as connection:
        connection.execute("INSERT INTO names VALUES (1, 'pair|made'), (2, 'subject|NAT'), (3, 'refused|gone')")
        for num, own in SCORES.items():
            part, best = "train" if num < 3 else "eval", max(own, default=None)
            row = (num, part, f"t{num}", "NAT", "?", 5 - num % 2, best)
            connection.execute(
                "INSERT INTO items (num, part, task, subject, question, num_lost, best) VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            connection.executemany("INSERT INTO scores VALUES (?, ?, 1)", ((num, score) for score in own))
        connection.executemany("INSERT INTO marks VALUES (?, ?)", [(1, 2), (1, 4), (2, 1)])
        parts = (Part(slug="train", title="Training", num_tasks=2), Part(slug="eval", title="Evaluation", num_tasks=2))
        write_columns(connection, parts)
    return Index(path)


def list_true(mask):
    return mask.nonzero()[0].tolist()


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (0.5, 0.5, [1, 2]), (None, 0.5, [1, 2]), (0.5, None, [1, 2, 3]), (0.51, 1.0, [3]), (0.0, 0.49, [1]),
        (1.01, None, []), (None, -0.01, []), (0.9, 0.1, []), (None, None, [1, 2, 3]),
    ],
)  # fmt: skip
def test_scores_are_found_with_their_bounds(index, low, high, found):
    assert list_true(read_scored(index, low, high)) == found


def test_masks_have_the_items_that_carry_the_mark(index):
    assert list_true(read_mask(index, "mark|pair|made")) == [2, 4]
    assert list_true(read_mask(index, "mark|subject|NAT")) == [1]
    assert list_true(read_mask(index, "part|train")) == [1, 2]
    assert list_true(read_mask(index, "part|eval")) == [3, 4]
    assert list_true(read_mask(index, "mark|no such")) == []
    assert index.read("facets", Facets).marks == {"pair|made": 2, "subject|NAT": 1}, (
        "what nothing carries is not offered"
    )


def test_orders_have_what_has_a_value_and_equals_in_the_runs_order(index):
    assert read_numbers(index, "order|order").tolist() == [1, 2, 3, 4]
    assert read_numbers(index, "order|best").tolist() == [1, 2, 3]
    assert read_numbers(index, "order|lost").tolist() == [1, 3, 2, 4]
    assert read_numbers(index, "order|worst").tolist() == []
