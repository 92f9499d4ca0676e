"""Mixtures of data sets by weight, and filters."""

import json
from collections import Counter

import pytest

from vcot.pipeline.errors import DataError, RecipeError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.records import Task
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources import key_tasks, load_round, load_tasks, name_sources
from vcot.pipeline.sources.source import Source
from vcot.services.recipes.recipe import load_recipe


def write_table(path, number, **fields):
    rows = [
        {"question": f"{path.stem} {n}?", "answer": "yes", "id": f"{path.stem}-{n}"} | fields for n in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": "table", "path": str(path), "columns": {"image": "", "choices": "", "id": "id"}}


@pytest.fixture
def parts(tmp_path):
    return [write_table(tmp_path / f"{name}.jsonl", size) for name, size in (("big", 60), ("small", 10))]


def load(tmp_path, **fields):
    section = TasksSection(**fields)
    return load_tasks(section, tmp_path / "run", ImageStore(tmp_path / "run"))


def count(tasks):
    return Counter(task.question.split()[0] for task in tasks)


def mix(parts, *weights, **fields):
    weighted = [part | {"weight": weight} for part, weight in zip(parts, weights, strict=True)]
    return {"source": "mix", "parts": weighted, **fields}


@pytest.mark.parametrize(
    ("weights", "num_tasks", "expected"), [((3, 1), 20, (15, 5)), ((1, 1), 7, (4, 3)), ((1, 3), 20, (10, 10))]
)
def test_each_part_gives_its_share_as_long_as_it_has_questions(tmp_path, parts, weights, num_tasks, expected):
    tasks = load(tmp_path, **mix(parts, *weights, num_tasks=num_tasks))
    assert count(tasks) == dict(zip(("big", "small"), expected, strict=True))


def test_at_every_point_each_part_has_given_its_share(tmp_path):
    sizes = {"big": 60, "a": 10, "b": 10, "c": 10, "d": 10, "e": 10}
    parts = [write_table(tmp_path / f"{name}.jsonl", size) for name, size in sizes.items()]
    drawn = load(tmp_path, **mix(parts, 6, 1, 1, 1, 1, 1, num_tasks=66))
    for number in range(1, 67):
        counts = count(drawn[:number])
        assert all(abs(counts[name] - number * {"big": 6}.get(name, 1) / 11) < 1 for name in sizes)


def test_the_first_of_more_are_the_same_and_rounds_follow_one_another(tmp_path, parts):
    drawn = load(tmp_path, **mix(parts, 3, 1, num_tasks=24))
    assert drawn[:12] == load(tmp_path, **mix(parts, 3, 1, num_tasks=12))
    section = TasksSection(**mix(parts, 3, 1, num_tasks=12))
    assert load_round(section, 2, tmp_path / "run", ImageStore(tmp_path / "run")) == drawn[12:]
    assert all(count(drawn[:n])["small"] == n // 4 for n in (4, 8, 12, 16))


def test_without_a_number_all_questions_of_all_parts_come_once(tmp_path, parts):
    tasks = load(tmp_path, **mix(parts, 1, 1))
    assert count(tasks) == {"big": 60, "small": 10}
    with pytest.raises(
        RecipeError, match=r"weights of tasks\.parts say which questions are drawn; set tasks\.num_tasks"
    ):
        load(tmp_path, **mix(parts, 2, 1))


def test_weights_parts_and_filters_are_in_the_key(parts):
    sections = [mix(parts, 1, 1), mix(parts, 2, 1), mix(parts[:1], 1), mix(parts, 1, 1, filter={"max_words": 3})]
    sections.append(mix([parts[0] | {"filter": {"gold": "some"}}, parts[1]], 1, 1))
    assert len({key_tasks(TasksSection(**section)) for section in sections}) == 5
    assert name_sources(TasksSection(**mix(parts, 1, 1))) == "table + table"


def test_a_question_in_two_parts_is_named(tmp_path, parts):
    with pytest.raises(DataError, match=r"task table/big-\d+ is in parts 1 and 2 of tasks\.parts"):
        load(tmp_path, **mix([parts[0], parts[0]], 1, 1))


def test_a_mixture_needs_parts_and_others_take_none(tmp_path, parts):
    with pytest.raises(RecipeError, match=r"tasks\.source = mix needs tasks\.parts"):
        load(tmp_path, source="mix")
    with pytest.raises(RecipeError, match=r"source table does not go by tasks\.parts; set tasks\.source = mix"):
        load(tmp_path, **(parts[0] | {"parts": parts}))


def test_a_drawn_part_mixes_with_a_read_one(tmp_path, parts):
    tasks = load(tmp_path, **mix([{"source": "nano"}, parts[1]], 1, 1, num_tasks=8))
    assert Counter(task.source for task in tasks) == {"nano": 4, "table": 4}


def test_a_mixture_is_written_in_a_recipe():
    text = 'tasks.parts=[{source = "aokvqa", weight = 2.0}, {source = "scienceqa", hint = true}]'
    section = load_recipe("nano", ["tasks.source=mix", text]).tasks
    assert [(part.source, part.weight, part.hint) for part in section.parts] == [
        ("aokvqa", 2.0, False), ("scienceqa", 1.0, True),
    ]  # fmt: skip


ROWS = (
    {"question": "one two three?", "answer": "x", "options": ["x", "y"], "kind": "NAT"},
    {"question": "one two?", "answer": "x", "options": None, "kind": "SOC"},
    {"question": "one?", "answer": None, "options": None, "kind": None},
)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"subjects": ["NAT", "SOC"]}, {3, 2}),
        ({"options": "some"}, {3}),
        ({"options": "none", "gold": "some"}, {2}),
        ({"gold": "none"}, {1}),
        ({"max_words": 2}, {2, 1}),
        ({"images": "none"}, {3, 2, 1}),
    ],
)
def test_only_questions_that_meet_every_line_are_drawn(tmp_path, chosen, expected):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    columns = {"image": "", "choices": "options", "subject": "kind"}
    tasks = load(tmp_path, source="table", path=str(path), columns=columns, filter=chosen)
    assert {len(task.question.split()) for task in tasks} == expected


def test_a_filter_that_keeps_nothing_says_so(tmp_path, parts):
    with pytest.raises(DataError, match="holds no question that can be drawn; set another"):
        load(tmp_path, **(parts[0] | {"filter": {"images": "some"}}))


def test_a_source_that_does_not_go_by_the_filter_is_found_out(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="questions of nano are made here, and not filtered"):
        load(tmp_path, source="nano", num_tasks=3, filter={"gold": "some"})
    task = Task(id="t", question="q?", choices=(), answer=None, source="s", split="train")
    (tmp_path / "careless.py").write_text("SOURCE = None")
    monkeypatch.syspath_prepend(tmp_path)
    import careless

    careless.SOURCE = Source(load=lambda section, store: [task], digest=lambda section: "d")
    with pytest.raises(RecipeError, match=r"careless:SOURCE does not go by tasks\.filter, and gave task t"):
        load(tmp_path, source="careless:SOURCE", filter={"gold": "some"})
