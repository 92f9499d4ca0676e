"""Visual Genome's questions, from the official files and in the hub's columns."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vcot.pipeline.errors import DataError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources import load_tasks

QAS = {
    1: [
        {
            "qa_id": 10,
            "image_id": 1,
            "question": "What is on the road?",
            "answer": "A bus.",
            "a_objects": [],
            "q_objects": [],
        },
        {"qa_id": 11, "image_id": 1, "question": "When was this taken?", "answer": "During the day.", "q_objects": []},
    ],
    2: [{"qa_id": 12, "image_id": 2, "question": "Who is there?", "answer": "Nobody"}],
}
EXPECTED = {
    ("visual_genome/10", "What is on the road?", "A bus"),
    ("visual_genome/11", "When was this taken?", "During the day"),
    ("visual_genome/12", "Who is there?", "Nobody"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """The official layout."""
    root = tmp_path / "vg"
    for part, number in (("VG_100K", 1), ("VG_100K_2", 2)):
        (root / part).mkdir(parents=True)
        (root / part / f"{number}.jpg").write_bytes(jpeg(number))
    (root / "question_answers.json").write_text(json.dumps([{"id": number, "qas": qas} for number, qas in QAS.items()]))
    return root


def jpeg(number):
    buffer = io.BytesIO()
    Image.new("RGB", (8 * number, 6), "red").save(buffer, "JPEG")
    return buffer.getvalue()


def load(path, tmp_path, **fields):
    section = TasksSection(source="visual_genome", path=path and str(path), **fields)
    return load_tasks(section, tmp_path / "run", ImageStore(tmp_path / "run"))


def test_the_official_files_are_read(folder, tmp_path):
    tasks = load(folder, tmp_path)
    assert {(task.id, task.question, task.gold) for task in tasks} == EXPECTED
    assert {task.id: task.images[0].width for task in tasks}["visual_genome/12"] == 16
    assert all((task.choices, task.answer, task.source) == ((), None, "visual_genome") for task in tasks)


def test_the_hubs_columns_are_read(folder, tmp_path):
    rows = [
        {"image": {"bytes": jpeg(number), "path": None}, "image_id": number, "qas": qas[:1]}
        for number, qas in QAS.items()
    ]
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub" / "train-0.parquet")
    tasks = load(tmp_path / "hub", tmp_path)
    assert {(task.id, task.question, task.gold) for task in tasks} < EXPECTED
    assert {task.id: task.images[0].width for task in tasks} == {"visual_genome/10": 8, "visual_genome/12": 16}


def test_only_drawn_questions_need_their_image(folder, tmp_path):
    (folder / "VG_100K_2" / "2.jpg").unlink()
    assert {
        task.images[0].width
        for task in load(folder, tmp_path, filter={"max_words": 5, "gold": "some"}, num_tasks=1, seed=1)
    }
    with pytest.raises(
        DataError, match=r"image 1: 2\.jpg is in none of VG_100K, .*; unpack Visual Genome's images there"
    ):
        load(folder, tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": 1}, "holds a JSON dict, not a list"),
        ([{"qas": []}], "image 0: field id is missing"),
        ([{"id": 1, "qas": [{"qa_id": 1, "question": "", "answer": "a"}]}], r"image 0: qas\.0\.question = ''"),
        ([{"id": 1, "qas": [QAS[1][0], QAS[1][0] | {"answer": "A car."}]}], "id visual_genome/10 occurs twice"),
    ],
)
def test_a_fault_is_one_sentence(folder, tmp_path, content, said):
    (folder / "question_answers.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=said):
        load(folder, tmp_path)


def test_there_is_one_split_and_no_copy_on_the_hub(folder, tmp_path):
    with pytest.raises(DataError, match="has no split test, only train"):
        load(folder, tmp_path, split="test")
    with pytest.raises(DataError, match="visual_genome is read from files; set its path"):
        load(None, tmp_path)
