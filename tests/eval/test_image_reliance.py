"""Image reliance: what is shown instead of the image, and what the loss says."""

import io
import random
import time

import pytest
from PIL import Image
from rich.console import Console

from vcot.eval.image_reliance import (
    ask_instead,
    build_reliance,
    choose_images,
    crop_middle,
    deal_images,
    describe_reliance,
    render_reliance,
)
from vcot.pipeline.errors import DataError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.records import CheckpointRef, ImageRef, SamplingParams, Score, Task
from vcot.pipeline.sample import Plan, show_images

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


def test_many_questions_with_two_answers_are_dealt_at_once():
    tasks = [task(number, answer=number % 2) for number in range(2000)]
    began = time.process_time()
    dealt = deal_images(tasks)
    assert time.process_time() - began < 8, "it took three times that, and four times as long for twice as many"
    answers = {each.images: each.answer for each in tasks}
    assert all(answers[dealt[each.id]] != each.answer for each in tasks)


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


@pytest.mark.parametrize(("images", "answers"), [("aaceea", "100101"), ("aafeea", "101001"), ("adaaec", "110000")])
def test_an_image_that_half_of_the_questions_share_is_dealt_to_the_others(images, answers):
    named = enumerate(zip(images, answers, strict=True))
    tasks = [task(n, image=image * 64, answer=int(answer)) for n, (image, answer) in named]
    dealt = deal_images(tasks)
    assert all(dealt[each.id][0].sha256 != each.picture for each in tasks)


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
    for part in render_reliance(build_reliance({"true": true, "options_only": other, "question_only": other}, [BASE])):
        console.print(part)
    text = " ".join(console.file.getvalue().split())
    assert "zero_shot 0.4 options 100.0 0.0 +100.0" in text
    assert "…" not in text


def test_the_cropped_image_is_the_middle_in_the_images_size_and_made_once(tmp_path):
    store, picture = ImageStore(tmp_path), Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (10, 5, 30, 15))
    ref = store.put_png(picture)
    question = task(1).model_copy(update={"images": (ref,)})
    [cropped] = choose_images([question], "cropped", store)["t1"]
    with Image.open(tmp_path / cropped.path) as image:
        assert (image.size, image.getcolors()) == ((40, 20), [(800, (0, 0, 255))])
    (tmp_path / ref.path).unlink()
    assert choose_images([question], "cropped", store)["t1"] == (cropped,), "the original is not read again"
    (tmp_path / cropped.path).unlink()
    with pytest.raises(DataError, match="is gone from the run"):
        choose_images([question], "cropped", store)
    assert crop_middle(Image.new("RGB", (1, 3))).size == (1, 3)


def test_text_only_baselines_take_away_the_image_and_then_the_question(tmp_path):
    sampling, store = SamplingParams(temperature=0.4, max_tokens=8, seed=3), ImageStore(tmp_path)
    tasks = [
        task(1, question="What colour?"),
        task(2, question="Who?", choices=(), gold="cab", answer=None),
        task(3, question="Why?").model_copy(update={"images": ()}),
    ]
    own = [*Plan([tasks[0], tasks[2]], "cot", BASE, sampling), *Plan([tasks[1]], "short_answer", BASE, sampling)]
    question, options = (ask_instead(own, tasks, shown, store) for shown in ("question_only", "options_only"))
    assert [(request.task.id, request.task.images) for request in question] == [("t1", ()), ("t2", ())]
    assert question[0].text == own[0].text
    assert [(request.task.id, request.task.images) for request in options] == [("t1", ()), ("t3", ())]
    assert "What colour?" not in options[0].text
    assert "(A) red (B) blue" in options[0].text
    assert {request.sampling.seed for request in (own[0], question[0], options[0])} == {own[0].sampling.seed}
    assert len({request.key for request in (*own, *question, *options)}) == 7


def test_the_sentences_say_what_is_lost_and_what_the_text_gives_away():
    true = [score(n, "correct") for n in range(100)]
    half = [score(n, "correct" if n < 60 else "incorrect", answer="A" if n < 60 else "B") for n in range(100)]
    [said] = describe_reliance(build_reliance({"true": true, "question_only": half, "blank": half}, [BASE]))
    assert said.startswith(
        "base loses accuracy without its image in 2 of 2 comparisons, at most 40.0 points (question_only"
    )
    assert "With question_only it is right in 60.0 %, where a guess is in 25.0 % (cot at 0.4)" in said
    assert "With blank" not in said
    unread = [score(n, "no_answer", answer=None) for n in range(100)]
    rows = build_reliance({"true": true, "blank": half, "question_only": unread}, [BASE])
    assert [row.no_answer for row in rows] == [0, 1]
    assert "With question_only most answers cannot be read" in describe_reliance(rows)[0]
    [said] = describe_reliance(build_reliance({"true": half, "blank": half}, [BASE]))
    assert said == "base loses no accuracy without its image that could be told from noise."
