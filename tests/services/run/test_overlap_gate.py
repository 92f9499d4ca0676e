"""Training questions that are in the evaluation set, too: refused before anything is asked or trained on, unless allowed."""

import json
import sys

import pytest

from tests.pipeline.test_contamination import encode, make_photo
from tests.services.fake_vllm import write_checkpoint
from tests.services.run.test_rounds import answer
from vcot.pipeline.errors import DataError
from vcot.pipeline.report import Said, Warned
from vcot.services.run.directory import open_run
from vcot.services.run.overlap_gate import check_overlap, read_overlap
from vcot.services.run.rounds import list_rounds
from vcot.services.run.session import Session
from vcot.services.run.steps import judge_stage, pair_stage, sample_stage

SOURCE = """
from vcot.eval.benchmark import Benchmark
from vcot.pipeline.sources.drafts import Draft, Row, digest_files, file_image, read_json, read_row
from vcot.pipeline.sources.source import Source, draw_from, need_path

class Question(Row):
    id: str
    question: str

def list_questions(section):
    path = need_path(section)
    for row in read_json(path, list):
        found = read_row(Question, row, str(path))
        yield Draft(id=found.id, question=found.question, choices=("yes", "no"), answer=0, source="photos",
                    split=section.split, where=str(path), images=(file_image(path.parent / f"{found.id}.img"),))

PHOTOS = Source(load=draw_from(list_questions), digest=lambda section: digest_files([need_path(section)]))
BENCH = Benchmark(name="photos", source="photos:PHOTOS")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set of photographs: six to train on, six of the evaluation, nothing in common."""
    (tmp_path / "photos.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    write_checkpoint(tmp_path / "base", "base", 1.0, kind="base")
    for kind, offset in (("train", 0), ("test", 100)):
        rows = [{"id": f"{kind}{i}", "question": f"Is {kind} number {i} in the picture?"} for i in range(6)]
        (tmp_path / f"{kind}.json").write_text(json.dumps(rows))
        for number, row in enumerate(rows):
            (tmp_path / f"{row['id']}.img").write_bytes(encode(make_photo(offset + number)))
    yield tmp_path
    sys.modules.pop("photos", None)


@pytest.fixture
def begin(folder):
    """Opens the run on it, with flags; gives its session and what it told."""

    def open_session(*flags):
        settings = [
            f"model.source={folder / 'base'}", "tasks.source=photos:PHOTOS", f"tasks.path={folder / 'train.json'}",
            "tasks.num_tasks=", "eval.benchmark=photos:BENCH", f"eval.path={folder / 'test.json'}", "eval.num_tasks=",
            "sample.k=2", *flags,
        ]  # fmt: skip
        told = []
        with open_run(folder / "run", "nano", settings) as run:
            return Session(run, told.append), told

    return open_session


def copy_picture(folder):
    (folder / "train3.img").write_bytes(encode(make_photo(104).resize((500, 400)), "JPEG", quality=70))


def copy_image(folder):
    (folder / "train3.img").write_bytes((folder / "test4.img").read_bytes())


def copy_text(folder):
    rows = json.loads((folder / "train.json").read_text())
    rows[3]["question"] = "Is test number 4 in the picture?"
    (folder / "train.json").write_text(json.dumps(rows))


async def test_what_is_held_out_is_said_so_and_each_picture_is_hashed_once(begin, folder):
    session, told = begin()
    check_overlap(list_rounds(session)[0])
    assert told[-1] == Said("held out: none of 6 evaluation questions is among the 6 for training")
    kept = json.loads((folder / "run" / "pictures.json").read_text())
    assert len(kept["hashes"]) == 12
    for image in (folder / "run" / "images").iterdir():
        image.unlink()
    session, _ = begin()
    check_overlap(list_rounds(session)[0])
    assert read_overlap(list_rounds(session)[0]).is_clean


@pytest.mark.parametrize(
    ("spoil", "kind"), [(copy_picture, "alike picture"), (copy_image, "same image"), (copy_text, "alike text")]
)
async def test_an_overlap_stops_sampling_and_pairing_unless_it_is_allowed(begin, folder, spoil, kind):
    spoil(folder)
    session, _ = begin()
    current = list_rounds(session)[0]
    answer(session, current.requests(), lambda task, index: index == 0)
    await judge_stage(current)
    said = rf"of 6 evaluation .* 1 {kind}; the closest: train3 and test4 \({kind}\).*tasks.allow_overlap=true"
    for stage in (sample_stage, pair_stage):
        with pytest.raises(DataError, match=said):
            await stage(current)
    assert not (folder / "run" / "pairs").exists()
    await session.run.close()
    session, told = begin("tasks.allow_overlap=true")
    current = list_rounds(session)[0]
    await pair_stage(current)
    assert any(isinstance(event, Warned) and "lets it be" in event.text for event in told)
    assert (current.pairs.directory / "train.parquet").is_file()
    assert current.job.pairs_digest == current.pairs.digest
    assert read_overlap(current).touched[kind] == 1


async def test_before_the_pictures_were_hashed_nothing_is_claimed(begin):
    session, _ = begin()
    assert read_overlap(list_rounds(session)[0]) is None


async def test_drawn_questions_are_compared_by_image_alone(tmp_path):
    """Nano's templates and shapes recur by nature: one in three questions has a twin in the evaluation, word for word."""
    base = write_checkpoint(tmp_path / "base", "base", 1.0, kind="base")
    flags = [f"model.source={base}", "tasks.num_tasks=100", "eval.num_tasks=300"]
    with open_run(tmp_path / "run", "nano", flags) as run:
        session = Session(run, lambda _: None)
        current = list_rounds(session)[0]
        check_overlap(current)
        assert read_overlap(current).is_drawn
        assert not (run.directory / "pictures.json").exists()
