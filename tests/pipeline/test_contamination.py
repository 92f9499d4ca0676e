"""What counts as a training question that is in the evaluation set, too, and what does not."""

import io
import time

import numpy as np
import pytest
from PIL import Image

from vcot.pipeline.contamination import MAX_DISTANCE, MAX_SHOWN, find_contamination, hash_picture
from vcot.pipeline.records import ImageRef, Task

LONG = "Which of the two dogs that lie on the porch looks older than the other"


def make_task(name, question="What is it?", choices=("a cat", "a dog"), image=None):
    ref = image and ImageRef(sha256=image, path=f"{image}.png", width=4, height=4)
    return Task(
        id=name, question=question, choices=choices, answer=0, images=(ref,) if ref else (), source="s", split="train"
    )


def make_photo(seed, size=(240, 180)):
    """Smooth shades, as photographs have, another for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encode(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def distance(one, other):
    return (hash_picture(one) ^ hash_picture(other)).bit_count()


@pytest.mark.parametrize("seed", range(5))
def test_a_picture_that_was_scaled_or_encoded_anew_is_alike_and_another_is_not(seed):
    photo = make_photo(seed)
    assert distance(encode(photo), encode(photo.resize((336, 336)))) <= MAX_DISTANCE
    assert distance(encode(photo), encode(photo, "JPEG", quality=60)) <= MAX_DISTANCE
    assert distance(encode(photo), encode(make_photo(seed, (1600, 1200)), "JPEG", quality=90)) <= MAX_DISTANCE
    assert distance(encode(photo), encode(make_photo(seed + 100))) > 2 * MAX_DISTANCE


def test_the_same_image_is_found_also_where_pictures_are_drawn():
    trained, asked = [make_task("t", image="a"), make_task("u", image="b")], [make_task("e", image="a")]
    found = find_contamination(trained, asked, None)
    assert (found.touched["same image"], found.is_clean) == (1, False)
    assert [(match.trained, match.asked, match.kind) for match in found.worst] == [("t", "e", "same image")]
    assert find_contamination(trained[1:], asked, None).is_clean


@pytest.mark.parametrize(("apart", "is_found"), [(1, True), (MAX_DISTANCE, True), (MAX_DISTANCE + 1, False)])
def test_a_picture_is_alike_up_to_a_distance_and_drawings_are_not_compared(apart, is_found):
    hashes = {"a": 0, "b": 2**apart - 1, "c": 2**64 - 1}
    trained, asked = [make_task("t", "x", image="c"), make_task("u", "y", image="a")], [make_task("e", image="b")]
    found = find_contamination(trained, asked, hashes)
    assert found.touched["alike picture"] == is_found
    assert [(match.trained, match.asked, match.distance) for match in found.worst] == [("u", "e", apart)] * is_found
    assert find_contamination(trained, asked, None).is_clean


def test_a_copy_is_no_alike_picture_beside():
    found = find_contamination([make_task("t", "x", image="a")], [make_task("e", image="a")], {"a": 7})
    assert found.touched == {"same image": 1, "alike picture": 0, "alike text": 0}


@pytest.mark.parametrize(
    ("trained", "asked", "is_found"),
    [
        (("What is it?", ("red", "blue")), ("what is it", ("Blue", "red")), True),
        (("What is it?", ("red", "blue")), ("What is it?", ("red", "green")), False),
        ((LONG, ("left", "right")), (LONG.upper() + "?", ("right", "left")), True),
        ((LONG, ("left", "right")), (f"{LONG}?", ("this", "that")), True),
        ((LONG, ("left", "right")), ("In your opinion, " + LONG, ("no", "yes")), False),
        ((LONG, ("left", "right")), (LONG.replace("lie", "sit"), ("left", "right")), False),
    ],
)
def test_texts_are_alike_by_their_eight_grams_and_short_ones_by_being_the_same(trained, asked, is_found):
    found = find_contamination([make_task("o", "Why?"), make_task("t", *trained)], [make_task("e", *asked)], {})
    assert found.touched["alike text"] == is_found
    assert [match.trained for match in found.worst] == ["t"] * is_found
    assert find_contamination([make_task("t", *trained)], [make_task("e", *asked)], None).is_clean, "of a template"


def test_of_texts_that_are_as_near_the_same_is_named_by_every_command():
    """Each of 30 holds another of the question's 32 8-grams. A set of texts has another order in each process."""
    words = [f"w{number}" for number in range(37)]
    trained = [make_task(f"t{start}", " ".join(words[start : start + 8])) for start in range(30)]
    found = find_contamination(trained, [make_task("e", " ".join(words), ("x", "y"))], {})
    assert [(match.trained, match.share) for match in found.worst] == [("t0", 30 / 32)]


def test_the_closest_are_shown_first_and_all_are_counted():
    hashes = {f"t{i}": i << 10 for i in range(20)} | {f"e{i}": i << 10 | (2 ** (4 - i % 5) - 1) for i in range(20)}
    trained = [make_task(f"t{i}", f"trained {i}", image=f"t{i}") for i in range(20)]
    asked = [make_task(f"e{i}", f"asked {i}", image=f"e{i}") for i in range(20)]
    found = find_contamination(trained, asked, hashes)
    assert found.touched["alike picture"] == 20
    assert [match.distance for match in found.worst] == sorted(match.distance for match in found.worst)
    assert (len(found.worst), found.worst[0].distance) == (MAX_SHOWN, 0)
    assert found.summary == "of 20 evaluation questions, by match with one of 20 for training: 20 alike picture"


def test_what_is_clean_is_said():
    found = find_contamination([make_task("t", "x")], [make_task("e", "y")], {})
    assert found.summary == "none of 1 evaluation questions is among the 1 for training"
    assert find_contamination([], [make_task("e")], {}).is_clean
    assert find_contamination([make_task("t")], [], {}).is_clean


def test_the_papers_size_is_compared_in_seconds():
    rng = np.random.default_rng(0)
    words = np.array(["w" + str(i) for i in range(3000)])

    def make(kind, num):
        return [make_task(f"{kind}{i}", " ".join(rng.choice(words, 12)), image=f"{kind}{i}") for i in range(num)]

    trained, asked = make("t", 17_056), make("e", 2_017)
    values = rng.integers(0, 2**63, len(trained) + len(asked), dtype=np.uint64).tolist()
    hashes = dict(zip((task.id for task in (*trained, *asked)), values, strict=True))
    began = time.monotonic()
    assert find_contamination(trained, asked, hashes).is_clean
    assert time.monotonic() - began < 20
