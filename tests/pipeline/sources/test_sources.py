"""Sources: the official layouts and the hub's columns become tasks, and every fault is one sentence."""

import io
import json
import os
from pathlib import Path

import huggingface_hub
import pytest
from PIL import Image

from tests.hub_cache import write_snapshot
from vcot.pipeline.errors import DataError, RecipeError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources import load_tasks
from vcot.pipeline.sources.aokvqa import AOKVQA, list_direct
from vcot.pipeline.sources.scienceqa import SCIENCEQA

SHARED = Path(__file__).parents[4] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data (real extracts) is absent")


def png(colour="red", size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def load(tmp_path):
    """Loads a section's tasks in a run of its own."""
    run = tmp_path / "run"
    return lambda **fields: load_tasks(TasksSection(**fields), run, ImageStore(run))


class ScienceQA:
    """A small official layout whose files a test bends before it is loaded."""

    def __init__(self, folder, num=6):
        self.folder = folder
        self.problems = {}
        self.splits = {"train": [], "val": [], "test": [], "minival": ["1"]}
        for number in range(1, num + 1):
            self.add(str(number), "val", colour=(number, 0, 0))

    def add(self, pid, split, colour="red", **fields):
        base = {
            "question": f"Which is number {pid}?", "choices": ["this", "that"], "answer": 1, "hint": "A passage.",
            "image": "image.png", "task": "closed choice", "grade": "grade4", "subject": "natural science",
            "topic": "physics", "category": "c", "skill": "s", "lecture": "Long.", "solution": "It is that.",
            "split": split,
        }  # fmt: skip
        self.problems[pid] = base | fields
        self.splits[split].append(pid)
        if self.problems[pid]["image"]:
            image = self.folder / "images" / split / pid / "image.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(png(colour))

    def write(self):
        (self.folder / "problems.json").write_text(json.dumps(self.problems))
        (self.folder / "pid_splits.json").write_text(json.dumps(self.splits))
        return {"source": "scienceqa", "path": str(self.folder), "split": "validation"}


class Aokvqa:
    """A small official A-OKVQA layout."""

    def __init__(self, folder, images="coco/val2017"):
        self.folder = folder
        self.images = folder / images
        self.images.mkdir(parents=True, exist_ok=True)
        self.rows = []
        for number in range(4):
            self.add(f"q{number}", image_id=number)

    def add(self, question_id, image_id, **fields):
        row = {
            "split": "val", "image_id": image_id, "question_id": question_id, "question": f"What is {question_id}?",
            "choices": ["one", "two", "three", "four"], "correct_choice_idx": 2, "direct_answers": ["three"] * 10,
            "difficult_direct_answer": False, "rationales": ["It is three.", "Three."],
        }  # fmt: skip
        self.rows.append(row | fields)
        (self.images / f"{image_id:012d}.jpg").write_bytes(png((image_id, 9, 9)))

    def write(self, name="aokvqa_v1p0_val.json"):
        (self.folder / name).write_text(json.dumps(self.rows))
        return {"source": "aokvqa", "path": str(self.folder), "split": "validation"}


@pytest.fixture
def science(tmp_path):
    (tmp_path / "data").mkdir()
    return ScienceQA(tmp_path / "data")


@pytest.fixture
def okvqa(tmp_path):
    return Aokvqa(tmp_path / "data")


def test_scienceqa_problem_becomes_a_task(science, load, tmp_path):
    science.add("7", "val", image=None)
    science.add("8", "train")
    tasks = load(**science.write())
    assert len({task.id for task in tasks}) == len(tasks) == 6
    [task] = [task for task in tasks if task.question == "Which is number 3?"]
    assert (task.choices, task.answer) == (("this", "that"), 1)
    assert (task.rationale, task.family, task.subject, task.split) == ("It is that.", "physics", "NAT", "validation")
    assert (task.source, task.images[0].width, task.images[0].height) == ("scienceqa", 8, 6)
    assert (tmp_path / "run" / task.images[0].path).is_file()


def test_aokvqa_annotation_becomes_a_task(okvqa, load):
    tasks = {task.id: task for task in load(**okvqa.write())}
    assert len(tasks) == 4
    task = tasks["aokvqa/q1"]
    assert (task.choices[task.answer], task.rationale, task.subject) == ("three", "It is three. Three.", None)
    assert task.images[0].sha256 != tasks["aokvqa/q2"].images[0].sha256


@pytest.mark.parametrize(
    "folder", ["images", "val2017", "images/val2017", "coco/images/val2017", "../coco/val2017", "."]
)
def test_aokvqa_images_stand_in_any_usual_folder(tmp_path, load, folder):
    (tmp_path / "okvqa").mkdir()
    assert len(load(**Aokvqa(tmp_path / "okvqa", images=folder).write())) == 4


def test_aokvqa_path_may_be_the_list_itself(okvqa, load):
    section = okvqa.write("some_with_images.json")
    assert len(load(**section | {"path": str(okvqa.folder / "some_with_images.json")})) == 4


def test_aokvqa_test_split_has_no_answers(okvqa, load):
    for row in okvqa.rows:
        row["split"] = "test"
        del row["correct_choice_idx"], row["rationales"], row["direct_answers"]
    (okvqa.folder / "coco" / "val2017").rename(okvqa.folder / "coco" / "test2017")
    tasks = load(**okvqa.write("aokvqa_v1p0_test.json") | {"split": "test"})
    assert {(task.answer, task.answer_letter, task.rationale) for task in tasks} == {(None, None, "")}


def test_aokvqa_row_repeated_word_for_word_counts_once(okvqa, load, caplog):
    okvqa.rows += okvqa.rows[:2]
    assert len(load(**okvqa.write())) == 4
    assert "repeats 2 rows" in caplog.text


def test_draw_is_a_prefix_and_ignores_the_order_of_the_file(science, load, tmp_path):
    for number in range(10, 40):
        science.add(str(number), "val")
    section = science.write()
    all_ids = [task.id for task in load(**section)]
    assert [task.id for task in load(**section, num_tasks=10)] == all_ids[:10]
    assert [task.id for task in load(**section, num_tasks=20)] == all_ids[:20]
    assert [task.id for task in load(**section, num_tasks=10, seed=1)] != all_ids[:10]
    science.splits["val"].reverse()
    assert [task.id for task in load(**science.write(), num_tasks=10)] == all_ids[:10]


def test_only_drawn_images_are_read(science, load):
    last = load(**science.write())[-1].question.removeprefix("Which is number ").removesuffix("?")
    (science.folder / "images" / "val" / last / "image.png").unlink()
    assert len(load(**science.write(), num_tasks=5)) == 5
    with pytest.raises(DataError, match="cannot be opened"):
        load(**science.write(), num_tasks=6)


def test_second_load_reads_the_run_and_not_the_images(science, load, tmp_path):
    section = science.write()
    first = load(**section)
    (science.folder / "images" / "val" / "3" / "image.png").unlink()
    assert load(**section) == first
    moved = science.folder.rename(tmp_path / "moved")
    assert load(**section | {"path": str(moved)}) == first
    assert len(list((tmp_path / "run" / "tasks").iterdir())) == 1


def test_changed_data_is_loaded_again(science, load):
    before = load(**science.write())
    science.problems["1"]["question"] = "Which one now?"
    after = load(**science.write())
    assert {task.question for task in after} - {task.question for task in before} == {"Which one now?"}


def test_kept_tasks_that_were_altered_are_refused(science, load, tmp_path):
    section = science.write()
    load(**section)
    [kept] = (tmp_path / "run" / "tasks").iterdir()
    kept.write_text(kept.read_text()[:-40])
    with pytest.raises(DataError, match=r"was altered .*delete it"):
        load(**section)


def test_fewer_questions_than_asked_for_is_said(science, load, caplog):
    assert len(load(**science.write(), num_tasks=50)) == 6
    assert "holds 6 questions, not the 50 asked for" in caplog.text


def bend(**fields):
    return lambda data: data.problems["2"].update(fields)


def spoil_image(content):
    return lambda data: (data.folder / "images" / "val" / "2" / "image.png").write_bytes(content)


SCIENCEQA_FAULTS = {
    "empty": (
        lambda data: data.splits.update(val=[]),
        "split validation, holds no question that can be drawn; set",
    ),
    "one choice": (bend(choices=["only"], answer=0), "problem 2: task scienceqa/.* has 1 choice.*correct the question"),
    "answer out of range": (bend(answer=2), "problem 2: task scienceqa/.*: answer 2 is not an index into 2 choices"),
    "answer below range": (bend(answer=-1), "answer -1 is not an index"),
    "no question": (bend(question=""), "problem 2: question = ''"),
    "no answer": (lambda data: data.problems["2"].pop("answer"), "problem 2: field answer is missing"),
    "unknown subject": (bend(subject="art"), "problem 2: subject = 'art'"),
    "no image field": (lambda data: data.problems["2"].pop("image"), "field image is missing"),
    "missing image": (
        lambda data: (data.folder / "images" / "val" / "2" / "image.png").unlink(),
        r"image .*2/image.png cannot be opened \(No such file or directory\)",
    ),
    "corrupt image": (spoil_image(b"not an image"), "image .*2/image.png cannot be read"),
    "truncated image": (spoil_image(png(size=(64, 64))[:60]), "image .*2/image.png cannot be read"),
    "empty image": (spoil_image(b""), "image .*2/image.png cannot be read"),
    "id twice": (lambda data: data.splits["val"].append("2"), "problem 2: occurs twice in split val"),
    "half a character": (
        lambda data: (data.problems.update({"\ud83d": data.problems["2"]}), data.splits["val"].append("\ud83d")),
        "holds half a character",
    ),
    "pid without problem": (
        lambda data: data.splits["val"].append("99"),
        "problem 99: listed in pid_splits.json but",
    ),
    "pids not text": (lambda data: data.splits["val"].append(99), "pid_splits.json: val.6 = 99"),
    "problem not an object": (lambda data: data.problems.update({"2": [1]}), "problem 2: "),
}


@pytest.mark.parametrize("name", SCIENCEQA_FAULTS)
def test_bad_scienceqa_is_one_sentence(science, load, tmp_path, name):
    spoil, message = SCIENCEQA_FAULTS[name]
    spoil(science)
    with pytest.raises(DataError, match=message) as caught:
        load(**science.write())
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)
    assert not (tmp_path / "run" / "tasks").exists()


AOKVQA_FAULTS = {
    "empty": (lambda data: data.rows.clear(), "holds no question"),
    "one choice": (
        lambda data: data.rows[0].update(choices=["x"], correct_choice_idx=0),
        "q0 has 1 choice",
    ),
    "answer out of range": (lambda data: data.rows[0].update(correct_choice_idx=4), "answer 4 is not an index into 4"),
    "no answer": (lambda data: data.rows[0].pop("correct_choice_idx"), "question q0 has no correct_choice_idx"),
    "id twice": (lambda data: data.rows[0].update(question_id="q1"), "id aokvqa/q1 occurs twice"),
    "other split": (
        lambda data: data.rows[0].update(split="train"),
        "question q0 is of split train, not val; set",
    ),
    "missing image": (
        lambda data: data.rows[0].update(image_id=77),
        "000000000077.jpg of question q0 in .* is in none",
    ),
    "image id not a number": (lambda data: data.rows[0].update(image_id="a/b"), "row 0: image_id = 'a/b'"),
    "row not an object": (lambda data: data.rows.insert(0, "x"), "row 0: "),
}


@pytest.mark.parametrize("name", AOKVQA_FAULTS)
def test_bad_aokvqa_is_one_sentence(okvqa, load, name):
    spoil, message = AOKVQA_FAULTS[name]
    spoil(okvqa)
    with pytest.raises(DataError, match=message) as caught:
        load(**okvqa.write())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "scienceqa", "path": "/nowhere"}, "scienceqa path /nowhere does not exist; give the folder"),
        ({"source": "scienceqa", "path": __file__}, "problems.json cannot be opened"),
        ({"source": "aokvqa", "path": str(Path(__file__).parent)}, "aokvqa_v1p0_train.json cannot be opened"),
        ({"source": "aokvqa", "path": __file__}, "is not JSON"),
        ({"source": "nano"}, "set num_tasks"),
        ({"source": "nano", "num_tasks": 5, "path": "x"}, "and no path"),
    ],
)
def test_bad_section_is_one_sentence(load, fields, message):
    with pytest.raises(DataError, match=message):
        load(**fields)


def test_json_of_another_kind_is_refused(science, load):
    section = science.write()
    (science.folder / "problems.json").write_text("[]")
    with pytest.raises(DataError, match=r"problems.json holds a JSON list, not a dict"):
        load(**section)


def test_nano_tasks_are_drawn_and_kept(load, tmp_path):
    tasks = load(source="nano", num_tasks=12)
    assert len(tasks) == 12
    assert load(source="nano", num_tasks=12) == tasks
    assert load(source="nano", num_tasks=6) == tasks[:6]
    assert all((tmp_path / "run" / task.images[0].path).is_file() for task in tasks)


COMMIT = "c0ffee" + "0" * 34


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Writes splits of a data set into a hub's cache; there is no network."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    datasets.disable_progress_bars()

    def write(name, split, *shards, revision=COMMIT, num_shards=None):
        files = {}
        for number, rows in enumerate(shards):
            path = tmp_path / "shard.parquet"
            datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(str(path))
            hub_name = f"data/{split}-{number:05}-of-{num_shards or len(shards):05}-0123456789abcdef.parquet"
            files[hub_name] = path.read_bytes()
        write_snapshot(tmp_path / "hub", "dataset", name, revision, files)

    return write


SCIENCE_ROW = {
    "question": "Which?", "choices": ["a", "b", "c"], "answer": 2, "hint": "", "task": "", "grade": "grade2",
    "subject": "language science", "topic": "verbs", "category": "", "skill": "", "lecture": "", "solution": "See.",
}  # fmt: skip
OKVQA_ROW = {
    "question": "What?", "choices": ["a", "b", "c", "d"], "direct_answers": "['a']",
    "difficult_direct_answer": False, "rationales": ["Because."], "correct_choice_idx": 0,
}  # fmt: skip


def okvqa_rows(numbers):
    return [
        OKVQA_ROW | {"question_id": f"q{n}", "image": {"bytes": png((n, 0, 0)), "path": f"{n}.jpg"}} for n in numbers
    ]


def test_direct_answers_are_the_questions_that_are_not_difficult(okvqa, load):
    answers = ["taxi"] * 3 + ["cab"] * 4 + ["bus"] * 3
    okvqa.rows[0]["direct_answers"] = answers
    okvqa.rows[1]["difficult_direct_answer"] = True
    tasks = {task.id: task for task in load(**(okvqa.write() | {"source": "aokvqa_da"}))}
    assert set(tasks) == {"aokvqa/q0", "aokvqa/q2", "aokvqa/q3"}
    task = tasks["aokvqa/q0"]
    assert (task.choices, task.answer, task.gold, task.accepted) == ((), None, "cab", tuple(answers))
    assert (task.source, task.rationale) == ("aokvqa_da", "It is three. Three.")


def test_direct_answers_of_the_hub_are_lists_in_a_text(hub, load):
    rows = okvqa_rows([1])
    hub(AOKVQA.hub_name, "validation", rows)
    (task,) = load(source="aokvqa_da", split="validation")
    assert (task.gold, task.accepted) == ("a", ("a",))
    hub(AOKVQA.hub_name, "validation", [rows[0] | {"direct_answers": "[a"}], revision="c" * 40)
    with pytest.raises(DataError, match="direct_answers = '\\[a': the list cannot be read"):
        load(source="aokvqa_da", split="validation", revision="c" * 40)


def test_all_of_scienceqa_has_its_questions_without_an_image(science, load):
    science.add("8", "val", image=None)
    science.problems["8"]["hint"] = "A passage."
    fields = science.write()
    with_image = {task.id: task for task in load(**fields)}
    every = {task.id: task for task in load(**(fields | {"source": "scienceqa_all"}))}
    (words,) = [task for name, task in every.items() if name not in with_image]
    assert (words.images, words.labels["context"]) == ((), "TXT")
    assert {task.labels["context"] for task in with_image.values()} == {"TXT IMG"}
    for problem in science.problems.values():
        problem["hint"] = " "
    found = [task.labels["context"] for task in load(**(science.write() | {"source": "scienceqa_all"}))]
    assert set(found) == {"IMG", "NO"}
    assert found.count("NO") == 1
    assert {name: every[name].images for name in with_image} == {name: t.images for name, t in with_image.items()}


def test_tasks_that_an_earlier_version_kept_are_read(okvqa, load, tmp_path):
    fields = okvqa.write()
    tasks = load(**fields)
    (kept,) = (tmp_path / "run" / "tasks").iterdir()
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    for row in rows:
        row["image"] = row.pop("images")[0]
        del row["accepted"], row["labels"]
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load(**fields) == tasks


def test_scienceqa_hub_columns(hub, load):
    images = [{"bytes": png("red"), "path": None}, None, {"bytes": png("blue"), "path": None}]
    hub(SCIENCEQA.hub_name, "validation", [SCIENCE_ROW | {"image": image} for image in images])
    tasks = {task.id: task for task in load(source="scienceqa", split="validation")}
    assert len(tasks) == len({task.images[0].sha256 for task in tasks.values()}) == 2, "one text, two pictures"
    for task in tasks.values():
        assert (task.choices, task.answer, task.subject, task.family) == (("a", "b", "c"), 2, "LAN", "verbs")
    with pytest.raises(DataError, match=r"split test, cannot be loaded \(there is no test-\*.parquet in it\)"):
        load(source="scienceqa", split="test")


def test_the_hubs_copy_and_the_official_files_are_the_same_tasks(hub, load, science):
    """In whatever order they come, also where the text is the same and the picture is not, or all is the same."""
    for pid, colour in (("a", "red"), ("b", "blue"), ("c", "blue")):
        science.add(pid, "val", colour, question="Which?")
    official = load(**science.write())
    rows = [
        {name: science.problems[pid][name] for name in SCIENCE_ROW}
        | {"image": {"bytes": (science.folder / "images" / "val" / pid / "image.png").read_bytes(), "path": None}}
        for pid in reversed(science.splits["val"])
    ]
    hub(SCIENCEQA.hub_name, "validation", rows)
    copied = load(source="scienceqa", split="validation")
    assert [(task.id, task.question, task.images) for task in copied] == [
        (task.id, task.question, task.images) for task in official
    ]
    assert load(source="scienceqa", split="validation", num_tasks=4) == official[:4]


def test_the_hint_stands_before_the_question_where_it_is_asked_for(science, load):
    science.add("7", "val", hint=" ")
    without = {task.id: task.question for task in load(**science.write())}
    with_hint = {task.id: task.question for task in load(**science.write(), hint=True)}
    assert with_hint == {
        name: question if question == "Which is number 7?" else f"A passage.\n{question}"
        for name, question in without.items()
    }
    with pytest.raises(RecipeError, match="source aokvqa has no hints; leave hint out"):
        load(source="aokvqa", hint=True)


def test_aokvqa_hub_columns(hub, load):
    hub(AOKVQA.hub_name, "train", okvqa_rows(range(2)), okvqa_rows(range(2, 3)))
    tasks = load(source="aokvqa", num_tasks=2)
    assert [task.answer for task in tasks] == [0, 0]
    assert {task.id for task in tasks} < {"aokvqa/q0", "aokvqa/q1", "aokvqa/q2"}
    assert len(load(source="aokvqa")) == 3, "both shards are read"


def test_a_hub_cache_under_a_path_of_patterns_is_read(hub, load, tmp_path, monkeypatch):
    hub(AOKVQA.hub_name, "train", okvqa_rows(range(2)))
    moved = (tmp_path / "hub").rename(tmp_path / "my [v2] cache?")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(moved))
    assert len(load(source="aokvqa")) == 2


def test_a_revision_of_the_hub_is_part_of_the_tasks_key(hub, load, tmp_path):
    old, new = "a" * 40, "b" * 40
    hub(AOKVQA.hub_name, "train", okvqa_rows(range(2)), revision=old)
    hub(AOKVQA.hub_name, "train", okvqa_rows(range(5)), revision=new)
    assert [len(load(source="aokvqa", revision=revision)) for revision in (old, new, None)] == [2, 5, 5]
    assert len(list((tmp_path / "run" / "tasks").iterdir())) == 3
    with pytest.raises(DataError, match=rf"A-OKVQA@{'c' * 40}, split train, cannot be loaded .*set path"):
        load(source="aokvqa", revision="c" * 40)


def test_only_the_split_that_is_asked_for_is_fetched(hub, load, monkeypatch):
    """The paper's run needs neither A-OKVQA's validation nor its test images."""
    hub(AOKVQA.hub_name, "train", okvqa_rows(range(2)))
    asked = []
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *names, **how: asked.append(how) or real(*names, **how)
    )
    load(source="aokvqa", revision=COMMIT)
    [how] = asked
    listed = ["README.md", "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "train-0.parquet"]
    kept = list(huggingface_hub.utils.filter_repo_objects(listed, allow_patterns=how["allow_patterns"]))
    assert kept == ["data/train-00000-of-00001.parquet", "train-0.parquet"]
    assert (how["repo_type"], how["revision"]) == ("dataset", COMMIT)


def test_a_split_that_was_fetched_in_part_is_refused(hub, load):
    hub(AOKVQA.hub_name, "train", okvqa_rows(range(2)), num_shards=2)
    with pytest.raises(DataError, match="1 of its 2 Parquet files are in the cache"):
        load(source="aokvqa")


def test_aokvqa_hub_test_split_has_nulls(hub, load):
    secret = {"correct_choice_idx": None, "rationales": None, "direct_answers": None}
    row = secret | {"question_id": "q", "question": "What?", "choices": ["a", "b"]}
    hub(AOKVQA.hub_name, "test", [row | {"image": {"bytes": png(), "path": None}}])
    [task] = load(source="aokvqa", split="test")
    assert (task.answer, task.rationale) == (None, "")


def test_corrupt_hub_image_is_one_sentence(hub, load):
    row = {"question_id": "q", "question": "What?", "choices": ["a", "b"], "correct_choice_idx": 0, "rationales": ["x"]}
    hub(AOKVQA.hub_name, "train", [row | {"image": {"bytes": b"junk", "path": None}}])
    with pytest.raises(DataError, match=r"image of row 0 of .*, split train cannot be read"):
        load(source="aokvqa")


@needs_shared
def test_real_direct_answers(load):
    """The official list marks 70 of 1,145 questions as difficult, none of them among those whose images are here."""
    rows = json.loads((SHARED / "aokvqa" / "aokvqa_v1p0_val.json").read_text())
    path = str(SHARED / "aokvqa" / "aokvqa_v1p0_val_with_images.json")
    tasks = {task.id: task for task in load(source="aokvqa_da", path=path, split="validation")}
    assert len(tasks) == 8
    assert all(len(task.accepted) == 10 for task in tasks.values())
    section = TasksSection(source="aokvqa_da", path=str(SHARED / "aokvqa"), split="validation")
    assert len(list_direct(section)) == len(rows) - 70 == 1_075


@needs_shared
def test_real_scienceqa_extract(load):
    path = os.path.relpath(SHARED / "scienceqa")
    train = load(source="scienceqa", path=path, split="train")
    validation = load(source="scienceqa", path=path, split="validation")
    assert (len(train), len(validation)) == (39, 19)
    assert sum(task.subject == "LAN" for task in train + validation) == 10
    assert all(task.answer is not None for task in train + validation)
    with pytest.raises(DataError, match="split test, holds no question that can be drawn"):
        load(source="scienceqa", path=path, split="test")


@needs_shared
def test_real_aokvqa_extract(load, caplog):
    path = SHARED / "aokvqa" / "aokvqa_v1p0_val_with_images.json"
    tasks = load(source="aokvqa", path=str(path), split="validation")
    assert len(tasks) == len({task.id for task in tasks}) == len({task.images[0].sha256 for task in tasks}) == 8
    with pytest.raises(DataError, match=r"is in none of images.*or name a list of those you have"):
        load(source="aokvqa", path=str(path.parent), split="validation")
