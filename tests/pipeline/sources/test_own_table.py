"""Tables of one's own: which column holds what, and every fault as one sentence with its place."""

import io
import json
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.hub_cache import write_snapshot
from tests.pages import list_blocks
from vcot.pipeline.data_sections import ColumnsSection
from vcot.pipeline.errors import DataError, RecipeError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources import key_tasks, load_tasks
from vcot.pipeline.sources.own_table import find_index
from vcot.services.recipes.recipe import load_recipe, parse_recipe, render_recipe


def png(colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


ROWS = [
    {"q": "What colour?", "options": ["red", "blue"], "right": "red", "picture": "1.png", "group": "colours"},
    {"q": "What else?", "options": ["red", "blue"], "right": "B", "picture": "sub/2.png", "group": None},
]
IN_WORDS = {"question": "q", "choices": "", "answer": "right", "image": "picture"}
COLUMNS = {"question": "q", "choices": "options", "answer": "right", "image": "picture", "subject": "group"}


@pytest.fixture
def folder(tmp_path):
    directory = tmp_path / "data [mine]"
    (directory / "sub").mkdir(parents=True)
    (directory / "1.png").write_bytes(png())
    (directory / "sub" / "2.png").write_bytes(png("blue"))
    return directory


@pytest.fixture
def httpserver_folder(folder):
    """Serves the folder on this machine."""
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path, tmp_path, columns=COLUMNS, **fields):
    run = tmp_path / "run"
    section = TasksSection(source="table", path=path and str(path), columns=ColumnsSection(**columns), **fields)
    return sorted(load_tasks(section, run, ImageStore(run)), key=lambda task: task.question)


def test_json_lines_with_paths_of_images_are_tasks(folder, tmp_path):
    first, second = load(write_lines(folder / "mine.jsonl", ROWS), tmp_path)
    assert (first.question, first.choices, first.answer, first.subject) == (
        "What colour?",
        ("red", "blue"),
        0,
        "colours",
    )
    assert (second.answer, second.subject, second.source, second.split) == (1, None, "table", "train")
    assert first.images[0].sha256 != second.images[0].sha256
    assert first.id.startswith("table/")


@pytest.mark.parametrize("kind", ["bytes", "struct", "path"])
def test_parquet_holds_images_as_bytes_as_the_hub_does_or_as_paths(folder, tmp_path, kind):
    shown = {"bytes": png(), "struct": {"bytes": png(), "path": None}, "path": "1.png"}[kind]
    rows = [row | {"picture": shown} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), folder / "mine.parquet")
    tasks = load(folder / "mine.parquet", tmp_path)
    assert [task.answer for task in tasks] == [0, 1]
    assert len({task.images[0].sha256 for task in tasks}) == 1


def test_a_folder_has_files_of_each_split(folder, tmp_path):
    write_lines(folder / "train-0.jsonl", ROWS[:1])
    write_lines(folder / "train-1.jsonl", ROWS[1:])
    write_lines(folder / "test.jsonl", [ROWS[0] | {"q": "A test?"}])
    assert [task.question for task in load(folder, tmp_path)] == ["What colour?", "What else?"]
    assert [task.question for task in load(folder, tmp_path, split="test")] == ["A test?"]
    with pytest.raises(DataError, match=r"no folder with validation\*\.parquet or validation\*\.jsonl"):
        load(folder, tmp_path, split="validation")


def test_a_data_set_of_the_hub_is_read_by_its_columns(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([row | {"picture": {"bytes": png(), "path": None}} for row in ROWS]), path)
    write_snapshot(
        tmp_path / "hub", "dataset", "me/mine", "main", {"data/train-00000-of-00001.parquet": path.read_bytes()}
    )
    assert len(load(None, tmp_path, COLUMNS | {"hub": "me/mine"})) == 2
    both = {f"{name}/train-0.parquet": path.read_bytes() for name in ("main", "socratic")}
    write_snapshot(tmp_path / "hub", "dataset", "me/two", "main", both)
    with pytest.raises(
        DataError, match=r"it has train in main and socratic, and nothing says which is meant.*set path"
    ):
        load(None, tmp_path, COLUMNS | {"hub": "me/two"})


def test_a_question_about_two_pictures_is_two_questions(folder, tmp_path):
    rows = [ROWS[0], ROWS[0] | {"picture": "sub/2.png"}]
    first, second = load(write_lines(folder / "mine.jsonl", rows), tmp_path)
    assert first.id != second.id
    assert first.images[0].sha256 != second.images[0].sha256
    again = load(write_lines(folder / "mine.jsonl", rows[::-1]), tmp_path)
    assert {task.id: task.images[0].sha256 for task in again} == {t.id: t.images[0].sha256 for t in (first, second)}


def test_questions_without_options_are_answered_in_words_or_have_no_gold_answer(folder, tmp_path):
    path = write_lines(folder / "mine.jsonl", [ROWS[0] | {"right": "a disc"}, ROWS[1] | {"right": None}])
    tasks = load(path, tmp_path, COLUMNS | {"choices": ""})
    assert {(task.choices, task.answer, task.gold) for task in tasks} == {((), None, "a disc"), ((), None, "")}


def test_one_table_may_hold_questions_with_options_and_without(folder, tmp_path):
    path = write_lines(folder / "mine.jsonl", [ROWS[0], ROWS[1] | {"options": None, "right": "a disc"}])
    assert {len(task.choices): (task.answer, task.gold) for task in load(path, tmp_path)} == {
        2: (0, ""),
        0: (None, "a disc"),
    }


def test_several_answers_may_be_right(folder, tmp_path):
    rows = [{"q": "What?", "picture": "1.png", "right": ["disc", "circle", "disc"]}]
    (task,) = load(write_lines(folder / "mine.jsonl", rows), tmp_path, IN_WORDS)
    assert (task.gold, task.accepted) == ("disc", ("disc", "circle", "disc"))


def test_numbers_of_a_column_with_gaps_are_whole_and_a_gap_is_no_answer(folder, tmp_path):
    gaps = pa.array([1.0, float("nan")])
    options = pa.array([["red", "blue"]] * 2)
    pq.write_table(pa.table({"q": ["a", "b"], "options": options, "right": gaps, "group": gaps}), folder / "1.parquet")
    tasks = load(folder / "1.parquet", tmp_path, COLUMNS | {"image": ""})
    assert {task.question: (task.answer, task.subject) for task in tasks} == {"a": (1, "1"), "b": (None, None)}
    words = load(folder / "1.parquet", tmp_path, COLUMNS | {"image": "", "choices": ""})
    assert {task.question: task.gold for task in words} == {"a": "1", "b": ""}
    with pytest.raises(DataError, match=r"row 1: group is nan, and must be a text"):
        load(folder / "1.parquet", tmp_path, COLUMNS | {"image": "", "question": "group"})


def test_options_that_are_numbers_may_be_named_by_their_place_where_that_is_one_only(folder, tmp_path):
    rows = [{"q": "How many?", "options": [0, 1, 7], "right": 1}, {"q": "How old?", "options": [7, 8, 9], "right": 2}]
    tasks = load(write_lines(folder / "mine.jsonl", rows), tmp_path, COLUMNS | {"image": "", "subject": None})
    assert {task.question: task.answer for task in tasks} == {"How many?": 1, "How old?": 2}


def test_whole_numbers_among_fractions_stay_whole(folder, tmp_path):
    rows = [
        {"q": 3, "options": [3, 4], "right": "4", "n": 1},
        {"q": 3.5, "options": [0.5, 1.5], "right": "0.5", "n": 2.5},
    ]
    columns = COLUMNS | {"image": "", "subject": None, "id": "n"}
    tasks = load(write_lines(folder / "mine.jsonl", rows), tmp_path, columns)
    assert [(task.id, task.question, task.choices, task.answer) for task in tasks] == [
        ("table/1", "3", ("3", "4"), 1),
        ("table/2.5", "3.5", ("0.5", "1.5"), 0),
    ]


def test_a_row_may_have_several_images_in_their_order(folder, tmp_path):
    rows = [
        {"q": "Which?", "right": "one", "picture": ["sub/2.png", "1.png"]},
        {"q": "Why?", "right": "so", "picture": []},
    ]
    two, none = sorted(
        load(write_lines(folder / "mine.jsonl", rows), tmp_path, IN_WORDS),
        key=lambda t: -len(t.images),
    )
    stored = ImageStore(tmp_path / "run")
    expected = tuple(stored.put_file(folder / name) for name in ("sub/2.png", "1.png"))
    assert (two.images, none.images) == (expected, ())


def test_a_table_without_images_has_no_column_of_them(folder, tmp_path, caplog):
    rows = [{"q": "What is 2 + 2?", "right": "4"}]
    (task,) = load(write_lines(folder / "mine.jsonl", rows), tmp_path, IN_WORDS | {"image": ""})
    assert (task.images, task.gold) == ((), "4")
    assert "without an image" not in caplog.text


def test_rows_without_an_image_are_questions_without_one_and_counted(folder, tmp_path, caplog):
    path = write_lines(folder / "mine.jsonl", [ROWS[0], ROWS[1] | {"picture": None}])
    assert sorted(len(task.images) for task in load(path, tmp_path)) == [0, 1]
    assert "1 rows have no picture; they are questions without an image" in caplog.text


def test_addresses_are_downloaded_where_that_is_allowed(folder, tmp_path, httpserver_folder):
    rows = [{"q": "What?", "right": "a disc", "picture": f"{httpserver_folder}/1.png"}]
    path = write_lines(folder / "mine.jsonl", rows)
    with pytest.raises(DataError, match=r"is an address; set tasks\.columns\.allow_urls=true"):
        load(path, tmp_path, IN_WORDS)
    (task,) = load(path, tmp_path, IN_WORDS | {"allow_urls": True})
    assert ImageStore(tmp_path / "run").read(task.images[0]) == (folder / "1.png").read_bytes()
    rows = [{"q": "What?", "right": "a disc", "picture": f"{httpserver_folder}/gone.png"}]
    with pytest.raises(DataError, match=r"gone\.png cannot be downloaded \(.*404.*\); correct the address"):
        load(write_lines(folder / "mine.jsonl", rows), tmp_path, IN_WORDS | {"allow_urls": True})


def test_the_mapping_is_part_of_the_key_and_the_place_is_not(folder, tmp_path):
    def key(path, **columns):
        section = TasksSection(source="table", path=str(path), columns=ColumnsSection(**(COLUMNS | columns)))
        return key_tasks(section)

    path = write_lines(folder / "mine.jsonl", ROWS)
    first = key(path)
    assert key(path, answer="") != first
    assert key(path.rename(tmp_path / "moved.jsonl")) == first


@pytest.mark.parametrize(
    ("rows", "columns", "said"),
    [
        (ROWS, {"answer": "rihgt"}, r"has no column rihgt, only q, options, right, group; set tasks\.columns\.answer"),
        (ROWS, {"image": "image"}, r"has no column image, only q, .*; set tasks\.columns\.image"),
        ([ROWS[0] | {"right": "green"}], {}, r"row 0: answer 'green' is neither an index from 0, a letter nor"),
        ([ROWS[0] | {"picture": "https://x.org/1.png"}], {}, r"https://x\.org/1\.png of row 0 of .* is an address"),
        ([ROWS[0] | {"options": []}], {}, r"row 0: options is empty; leave it null"),
        ([ROWS[0] | {"options": None, "right": []}], {}, r"row 0: right is an empty list; leave it null"),
        ([ROWS[0] | {"picture": ["1.png", None]}], {}, r"an image of row 0 of .* is empty"),
        ([ROWS[0] | {"picture": "gone.png"}], {}, r"gone\.png cannot be opened"),
        ([ROWS[0] | {"q": "a\u0000b"}], {}, r"row 0: q holds the control character '\\x00'"),
        ([ROWS[0] | {"q": " "}], {}, r"row 0: q is ' ', and must be a text"),
        ([ROWS[0] | {"q": "a\u202eb"}], {}, r"row 0: q holds the control character '\\u202e'"),
        ([ROWS[0] | {"right": True}], {}, r"row 0: answer True is neither"),
        ([ROWS[0] | {"name": "x"}, ROWS[1] | {"name": "x"}], {"id": "name"}, r"id table/x occurs twice"),
        ([ROWS[0] | {"name": None}], {"id": "name"}, r"row 0: name is None, and must be a text"),
        ([ROWS[0] | {"name": "2026-11-28"}], {"id": "name"}, r"row 0: name is read as the date 2026-11-28.*as Parquet"),
        ([ROWS[0] | {"options": ["red"]}], {}, r"has 1 choice\(s\)"),
        ([ROWS[0] | {"options": "red|blue"}], {}, r"row 0: options is 'red\|blue', and must be a list"),
        ([ROWS[0] | {"options": {"A": "red", "B": "blue"}}], {}, r"row 0: options is \{'A': 'red'.*must be a list"),
        ([ROWS[0] | {"options": [1, 2, 3], "right": 2}], {}, r"answer 2 is a place from 0 and, at another place, one of"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_value_and_place(folder, tmp_path, rows, columns, said):
    with pytest.raises(DataError, match=said):
        load(write_lines(folder / "mine.jsonl", rows), tmp_path, COLUMNS | columns)


@pytest.mark.parametrize("name", ["empty.png", "broken.png"])
def test_an_image_that_is_none_is_named(folder, tmp_path, name):
    (folder / name).write_bytes(b"" if name == "empty.png" else b"\x89PNG nothing")
    with pytest.raises(DataError, match=rf"{name} cannot be read"):
        load(write_lines(folder / "mine.jsonl", [ROWS[0] | {"picture": name}]), tmp_path)


def test_a_file_that_cannot_be_read_is_named(folder, tmp_path):
    (folder / "mine.jsonl").write_text('{"q": "a", \n{{')
    with pytest.raises(DataError, match=r"mine\.jsonl cannot be read"):
        load(folder / "mine.jsonl", tmp_path)
    (folder / "mine.jsonl").write_text("")
    with pytest.raises(DataError, match=r"mine\.jsonl cannot be read \(it is empty\)"):
        load(folder / "mine.jsonl", tmp_path)
    (folder / "mine.jsonl").write_bytes("\n".join(map(json.dumps, ROWS)).replace("else", "\xe9lse").encode("latin-1"))
    with pytest.raises(DataError, match=r"mine\.jsonl, row 1 holds a text that is not UTF-8 .*0xe9"):
        load(folder / "mine.jsonl", tmp_path)
    pq.write_table(pa.table({"q": pa.array([], pa.string())}), folder / "none.parquet")
    with pytest.raises(DataError, match=r"none\.parquet cannot be read \(BatchSize must be greater than 0"):
        load(folder / "none.parquet", tmp_path)
    with pytest.raises(DataError, match=r"is no \.parquet or \.jsonl file"):
        load(folder / "1.png", tmp_path)


def test_without_columns_the_recipe_is_asked_for_them(tmp_path):
    with pytest.raises(RecipeError, match=r"source table needs to know your columns: set tasks\.columns"):
        load_tasks(TasksSection(source="table", path="x"), tmp_path, ImageStore(tmp_path))


@pytest.mark.parametrize(("answer", "index"), [(1, 1), ("blue", 1), ("A", 0), (" B ", 1), ("C", 2), ("D", 1)])
def test_an_answer_is_an_index_a_text_or_a_letter_and_a_text_first(answer, index):
    choices = ("red", "D", "x", "y") if answer == "D" else ("red", "blue", "C")
    assert find_index(answer, choices, "here") == index


def test_columns_are_kept_in_the_recipe():
    recipe = load_recipe(
        "nano", ["tasks.source=table", 'tasks.columns={question = "q", hub = "me/mine", choices = ""}']
    )
    assert recipe.tasks.columns == ColumnsSection(question="q", hub="me/mine", choices="")
    assert parse_recipe(render_recipe(recipe)) == recipe


def test_the_page_s_table_is_read_as_it_stands(tmp_path, monkeypatch):
    (lines,), (toml,) = list_blocks("A table", "json", "data.md"), list_blocks("A table", "toml", "data.md")
    (tmp_path / "clocks.jsonl").write_text(lines)
    for name in ("1.jpg", "2.jpg"):
        Image.new("RGB", (8, 8), "white").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    before, _, rest = render_recipe(load_recipe("nano")).partition("[tasks]")
    section = parse_recipe(f"{before}{toml}\n[sample]{rest.partition('[sample]')[2]}").tasks
    tasks = load_tasks(section, tmp_path / "run", ImageStore(tmp_path / "run"))
    assert sorted((task.question, task.answer) for task in tasks) == [
        ("What does the sign say?", 1),
        ("What time is it?", 0),
    ]


def test_reading_a_table_draws_no_bar_and_leaves_ones_own(folder, tmp_path, capfd):
    import datasets

    datasets.enable_progress_bars()
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    assert len(load(folder / "t.jsonl", tmp_path)) == 2
    listed = pa.table({"q": ["a"], "right": ["b"], "picture": [[{"bytes": png(), "path": None}]]})
    pq.write_table(listed, folder / "t.parquet")
    assert len(load(folder / "t.parquet", tmp_path, IN_WORDS)) == 1
    assert "examples/s" not in capfd.readouterr().err
    assert not datasets.are_progress_bars_disabled()
