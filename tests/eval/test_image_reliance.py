"""Image reliance: what is shown instead of the image, and what the loss says."""

import io
import random

import pytest
from PIL import Image
from rich.console import Console

from eval.image_reliance import build_reliance, choose_images, deal_images, render_reliance
from pipeline.errors import DataError
from pipeline.images import ImageStore
from pipeline.records import CheckpointRef, ImageRef, SamplingParams, Score, Task
from pipeline.sample import Plan, show_images

BASE = CheckpointRef(name="base", digest="sha256:aa", kind="base")


def task(number, image=None, answer=0, **fields):
    ref = ImageRef(sha256=image or f"{number:064d}", path="x.png", width=56, height=42)
    values = {"choices": ("red", "blue"), "question": "?", "source": "nano", "split": "test"}
    return Task(id=f"t{number}", images=(ref,), answer=answer, **(values | fields))


def score(number, value, index=0, answer="A", **fields):
    values = {"checkpoint": BASE.digest, "prompt": "cot", "temperature": 0.4, "target": "A", "num_choices": 4}
    return Score(
        key=f"{number}-{index}", task=f"t{number}", index=index, subject="NAT", image=f"i{number}", value=value,
        answer=answer, **(values | fields),
    )  # fmt: skip


def test_another_questions_image_is_dealt_once_never_its_own_and_with_another_answer():
    tasks = [task(n, image=f"{n // 3:064d}", answer=n % 2) for n in range(60)]
    dealt = deal_images(tasks)
    own = {t.id: t.picture for t in tasks}
    assert sorted(image.sha256 for (image,) in dealt.values()) == sorted(own.values())
    assert all(dealt[name][0].sha256 != sha for name, sha in own.items())
    assert dealt == deal_images(random.Random(0).sample(tasks, 60))


def test_partners_have_another_answer_as_long_as_there_is_one():
    tasks = [task(n, answer=int(n < 20)) for n in range(40)]
    answer_of = {t.picture: t.answer for t in tasks}
    dealt = deal_images(tasks)
    assert all(answer_of[dealt[t.id][0].sha256] != t.answer for t in tasks)
    assert len(deal_images([task(n) for n in range(5)])) == 5


def test_a_question_gets_as_many_images_as_its_own_and_one_without_gets_none(tmp_path):
    one, two, none = (
        [task(n) for n in range(4)],
        [pair_of(n) for n in range(10, 14)],
        task(20).model_copy(update={"images": ()}),
    )
    dealt = deal_images([none, *two, *one])
    assert {name: len(images) for name, images in dealt.items()} == {t.id: len(t.images) for t in (*one, *two)}
    assert all(not set(dealt[t.id]) & set(t.images) for t in (*one, *two))
    blank = choose_images([none, two[0]], "blank", ImageStore(tmp_path))
    assert {name: len(images) for name, images in blank.items()} == {two[0].id: 2}


def pair_of(number):
    return task(number).model_copy(update={"images": (*task(number).images, *task(number + 100).images)})


@pytest.mark.parametrize("images", ["a", "aaab"])
def test_questions_about_one_image_have_no_other(images):
    with pytest.raises(DataError, match="leave `other` out"):
        deal_images([task(n, image=image * 64) for n, image in enumerate(images)])


def test_a_blank_image_has_the_images_size_and_one_grey(tmp_path):
    store = ImageStore(tmp_path)
    (blank,) = choose_images([task(1)], "blank", store)["t1"]
    with Image.open(tmp_path / blank.path) as image:
        assert (image.size, image.getcolors()) == ((56, 42), [(56 * 42, (128, 128, 128))])
    assert choose_images([task(1)], "true", store)["t1"] == task(1).images


def test_only_the_image_changes_and_the_key_with_it():
    sampling = SamplingParams(temperature=0.4, max_tokens=8, seed=3)
    [request] = Plan([task(1)], "cot", BASE, sampling)
    first, second = (show_images(request, task(n).images) for n in (2, 3))
    assert (first.text, first.sampling, first.checkpoint) == (request.text, request.sampling, request.checkpoint)
    assert first.task.images == task(2).images
    assert len({request.key, first.key, second.key}) == 3


def test_reliance_is_paired_and_counts_changed_answers():
    true = [score(n, "correct") for n in range(100)] + [score(100, None, error="timed out")]
    blank = [score(n, "correct" if n < 30 else "incorrect", answer="A" if n < 30 else "B") for n in range(99)]
    [row] = build_reliance({"true": true, "blank": [*blank, score(100, "correct")]}, [BASE])
    assert (row.shown, row.num_questions) == ("blank", 99)
    assert row.true.value == 1
    assert row.accuracy.value == pytest.approx(30 / 99)
    assert row.reliance.value == row.changed.value == pytest.approx(69 / 99)
    assert row.reliance.low > 0.5
    assert row.p_holm < 0.001


def test_a_model_that_ignores_the_image_relies_on_nothing():
    true = [score(n, "correct" if n % 2 else "incorrect", index=i) for n in range(50) for i in range(2)]
    rows = build_reliance({"true": true, "blank": true, "other": true}, [BASE])
    assert [(row.shown, row.reliance.value, row.changed.value) for row in rows] == [("blank", 0, 0), ("other", 0, 0)]
    assert rows[0].p_holm == 1


def test_table_fits_eighty_columns():
    true = [score(n, "correct", prompt="zero_shot") for n in range(40)]
    other = [score(n, "incorrect", prompt="zero_shot", answer=None) for n in range(40)]
    console = Console(file=io.StringIO(), width=80)
    console.print(render_reliance(build_reliance({"true": true, "other": other}, [BASE])))
    text = " ".join(console.file.getvalue().split())
    assert "zero_shot 0.4 other 100.0 0.0 +100.0" in text
    assert "…" not in text
