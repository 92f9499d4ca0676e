"""A-OKVQA and ScienceQA as the hub holds them, and in their official layouts, from the real extracts in ../shared/data.

The real rows come first; where more are needed, real annotations are shown with drawn images.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, ImageDraw

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")
OKVQA_FIELDS = (
    "question_id",
    "question",
    "choices",
    "correct_choice_idx",
    "direct_answers",
    "difficult_direct_answer",
    "rationales",
)
SCIENCE_FIELDS = (
    "question",
    "choices",
    "answer",
    "hint",
    "task",
    "grade",
    "subject",
    "topic",
    "category",
    "skill",
    "lecture",
    "solution",
)
README = b"---\nlicense: apache-2.0\n---\n\nA data set.\n"


def aokvqa_files(data: Path, num_rows: int) -> dict[str, bytes]:
    """`HuggingFaceM4/A-OKVQA`: training questions in two shards, a few of the other splits; test has no answers."""
    rows = list(_aokvqa_rows(data, num_rows + 8))
    secret = [row | {"correct_choice_idx": None, "direct_answers": None, "rationales": []} for row in rows[-4:]]
    half = num_rows // 2
    shards = {"train": [rows[:half], rows[half:num_rows]], "validation": [rows[num_rows:-4]], "test": [secret]}
    return _parquet(shards)


def scienceqa_files(data: Path, num_rows: int) -> dict[str, bytes]:
    """`derek-thomas/ScienceQA`: its test questions are those of the extract's train and val, with images or not."""
    rows = [row for _, row in _scienceqa_rows(data)]
    return _parquet({"train": [rows[-6:-3]], "validation": [rows[-3:]], "test": [rows[:num_rows]]})


def write_official_aokvqa(data: Path, folder: Path, num_rows: int) -> Path:
    """`aokvqa_v1p0_train.json` and `train2017/<12 digits>.jpg`: the same questions as on the hub."""
    images = folder / "train2017"
    images.mkdir(parents=True)
    rows = []
    for number, row in enumerate(_aokvqa_rows(data, num_rows)):
        (images / f"{number:012}.jpg").write_bytes(row["image"]["bytes"])
        fields = {name: row[name] for name in OKVQA_FIELDS}
        rows.append(
            fields | {"split": "train", "image_id": number, "direct_answers": json.loads(row["direct_answers"])}
        )
    (folder / "aokvqa_v1p0_train.json").write_text(json.dumps(rows))
    return folder


def write_official_scienceqa(data: Path, folder: Path, num_rows: int) -> Path:
    """`problems.json`, `pid_splits.json`, `images/test/<pid>/image.png`: the same questions as on the hub."""
    problems, pids = {}, []
    for pid, row in list(_scienceqa_rows(data))[:num_rows]:
        pids.append(pid)
        problems[pid] = {name: row[name] for name in SCIENCE_FIELDS} | {"split": "test", "image": None}
        if row["image"] is not None:
            image = folder / "images" / "test" / pid / "image.png"
            image.parent.mkdir(parents=True)
            image.write_bytes(row["image"]["bytes"])
            problems[pid]["image"] = image.name
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": [], "val": [], "test": pids}))
    return folder


def _aokvqa_rows(data: Path, count: int) -> Iterator[Row]:
    real = {row["question_id"]: row for row in json.loads((data / "aokvqa_v1p0_val_with_images.json").read_text())}
    more = json.loads((data / "aokvqa_v1p0_val.json").read_text())
    rows = [*real.values(), *(row for row in more if row["question_id"] not in real)]
    for number, row in enumerate(rows[:count]):
        photo = data / "images" / f"{row['image_id']:012}.jpg"
        content = photo.read_bytes() if photo.is_file() else _draw(number)
        fields = {name: row[name] for name in OKVQA_FIELDS}
        yield (
            {"image": {"bytes": content, "path": None}} | fields | {"direct_answers": json.dumps(row["direct_answers"])}
        )


def _scienceqa_rows(data: Path) -> Iterator[tuple[str, Row]]:
    """Each with its pid; the subjects take turns, so that a few rows hold all three."""
    problems = json.loads((data / "problems.json").read_text())
    by_subject: dict[str, list[str]] = {}
    for pid, problem in problems.items():
        by_subject.setdefault(problem["subject"], []).append(pid)
    turns = [(turn, pid) for pids in by_subject.values() for turn, pid in enumerate(pids)]
    for _, pid in sorted(turns, key=lambda turn: turn[0]):
        problem, image = problems[pid], None
        if problem["image"]:
            folder = "val" if problem["split"] == "val" else "train"
            image = {
                "bytes": (data / "images" / folder / pid / problem["image"]).read_bytes(),
                "path": problem["image"],
            }
        yield pid, {"image": image} | {name: problem[name] for name in SCIENCE_FIELDS}


def _parquet(splits: Mapping[str, Sequence[list[Row]]]) -> dict[str, bytes]:
    files = {"README.md": README}
    for split, shards in splits.items():
        for number, rows in enumerate(shards):
            buffer = io.BytesIO()
            datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(buffer)
            files[f"data/{split}-{number:05}-of-{len(shards):05}-0123456789abcdef.parquet"] = buffer.getvalue()
    return files


def _draw(number: int) -> bytes:
    """A photo's stand-in: another one for each number, of a photo's shape."""
    image = Image.new("RGB", (480 + 16 * (number % 5), 360), ((37 * number) % 256, (91 * number) % 256, 160))
    draw = ImageDraw.Draw(image)
    for step in range(5):
        left, top = (67 * number + 97 * step) % 400, (41 * number + 53 * step) % 280
        draw.ellipse(
            (left, top, left + 30 + 10 * step, top + 60), fill=((60 * step + number) % 256, 200 - 30 * step, 40)
        )
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
