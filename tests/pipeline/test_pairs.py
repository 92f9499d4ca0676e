import json

import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Features, load_dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import DataError
from pipeline.images import ImageStore
from pipeline.pairs import build_pairs, limit_pairs, split_pairs
from pipeline.publish import pairs_digest, publish_pairs, render_card
from pipeline.recipe import load_recipe
from pipeline.records import (
    CheckpointRef,
    ImageRef,
    Judgment,
    PreferencePair,
    Response,
    SamplingParams,
    StageCount,
    Task,
)

CHECKPOINT = CheckpointRef(name="base", digest="sha256:aa", kind="base")
SAMPLING = SamplingParams(temperature=0.5, max_tokens=8, n=8, seed=0)
JUDGED = StageCount(stage="judge", requested=50, ok=47, refused=3, reasons={"refusal": 2, "content_filter": 1})
PAIRED = StageCount(stage="pair", requested=6, ok=5, refused=1, reasons={"tie": 1})


def make_task(name, image=None):
    image = image or ImageRef(sha256=name, path=f"images/{name}.png", width=4, height=4)
    return Task(id=name, question="q?", choices=("a", "b"), answer=0, image=image, source="nano", split="train")


def make_group(task, scores, texts=None):
    responses, judgments = [], {}
    for index, score in enumerate(scores):
        key = f"{task.id}/{index}"
        response = Response(
            key=key,
            group=task.id,
            task=task.id,
            index=index,
            checkpoint=CHECKPOINT,
            prompt="thought_specific",
            sampling=SAMPLING,
            text=texts[index] if texts else f"text {index}",
        )
        responses.append(response)
        if score is not None:
            judgments[key] = Judgment(key=key, response=key, task=task.id, judge="verifier/1", score=score)
    return responses, judgments


def test_best_against_worst_and_the_first_of_equals():
    task = make_task("t")
    responses, judgments = make_group(task, [0.5, 1.0, 0.0, 1.0, 0.0])
    (pair,) = build_pairs([task], responses, judgments).pairs
    assert (pair.chosen_key, pair.rejected_key) == ("t/1", "t/2")
    assert (pair.chosen_score, pair.rejected_score, pair.policy) == (1.0, 0.0, "sha256:aa")


def test_ties_same_texts_and_unjudged_tasks_are_dropped_and_counted():
    tasks = [make_task(name) for name in ("tie", "same", "lone", "none", "good")]
    groups = [
        make_group(tasks[0], [0.5, 0.5]),
        make_group(tasks[1], [1.0, 0.0], ["x", "x"]),
        make_group(tasks[2], [1.0, None]),
        ([], {}),
        make_group(tasks[4], [1.0, 0.0]),
    ]
    responses = [response for group, _ in groups for response in group]
    judgments = {key: judgment for _, group in groups for key, judgment in group.items()}
    pair_set = build_pairs(tasks, responses, judgments)
    assert [pair.task for pair in pair_set.pairs] == ["good"]
    assert (pair_set.count.requested, pair_set.count.refused, pair_set.count.failed) == (5, 2, 2)


def test_what_says_the_same_as_the_best_is_never_rejected():
    task = make_task("t")
    (pair,) = build_pairs([task], *make_group(task, [1.0, 0.0, 0.5, 0.25], ["x", "x", "y", "z"])).pairs
    assert (pair.chosen, pair.rejected, pair.rejected_score) == ("x", "z", 0.25)


def test_spaces_alone_make_no_pair():
    task = make_task("t")
    assert not build_pairs([task], *make_group(task, [1.0, 0.0], ["x y", " x\ny "])).pairs
    (pair,) = build_pairs([task], *make_group(task, [1.0, 0.0, 0.5], ["x", "x\n", "y"])).pairs
    assert (pair.chosen, pair.rejected) == ("x", "y")


def test_a_response_that_was_cut_off_is_never_chosen_unless_asked_for():
    task = make_task("t")
    responses, judgments = make_group(task, [1.0, 0.5, 0.0])
    cut = [response.model_copy(update={"finish_reason": "length"}) for response in responses]
    (pair,) = build_pairs([task], [cut[0], *responses[1:]], judgments).pairs
    assert (pair.chosen_score, pair.rejected_score) == (0.5, 0.0)
    (pair,) = build_pairs([task], [cut[0], *responses[1:]], judgments, choose_cut=True).pairs
    assert pair.chosen_score == 1.0
    (pair,) = build_pairs([task], [*responses[:2], cut[2]], judgments).pairs
    assert pair.rejected_score == 0.0, "it may be rejected"
    none = build_pairs([task], cut, judgments)
    assert (none.pairs, none.count.reasons) == ((), {"all_cut_off": 1})
    assert build_pairs([task], [*cut[:2], responses[2]], judgments).count.reasons == {"tie": 1}


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=8))
def test_a_pair_always_spans_the_scores_or_does_not_exist(scores):
    task = make_task("t")
    pairs = build_pairs([task], *make_group(task, scores)).pairs
    assert [(p.chosen_score, p.rejected_score) for p in pairs] == (
        [(max(scores), min(scores))] if max(scores) > min(scores) else []
    )


def make_pair(task):
    return build_pairs([task], *make_group(task, [1.0, 0.0])).pairs[0]


def test_no_image_is_in_both_splits_and_the_fraction_is_kept():
    tasks = [make_task(f"t{i}", ImageRef(sha256=f"im{i // 2}", path="p", width=1, height=1)) for i in range(200)]
    pairs = [make_pair(task) for task in tasks]
    train, validation = split_pairs(pairs, 0.1, seed=0)
    assert (len(train), len(validation)) == (180, 20)
    assert not {p.image.sha256 for p in train} & {p.image.sha256 for p in validation}
    assert split_pairs(pairs[::-1], 0.1, seed=0)[1] == validation[::-1]
    assert split_pairs(pairs, 0.1, seed=1)[1] != validation


def test_at_most_so_many_pairs_are_drawn_by_image_and_the_rest_are_counted():
    tasks = [make_task(f"t{i}", ImageRef(sha256=f"im{i // 2}", path="p", width=1, height=1)) for i in range(20)]
    groups = [make_group(task, [0.5, 0.5] if task.id == "t0" else [1.0, 0.0]) for task in tasks]
    judgments = {key: judgment for _, group in groups for key, judgment in group.items()}
    made = build_pairs(tasks, [response for group, _ in groups for response in group], judgments)
    kept = limit_pairs(made, 8, seed=0)
    assert (len(made.pairs), len(kept.pairs), kept.num_left_out, kept.num_ties) == (19, 8, 11, 1)
    assert (kept.count.requested, kept.count.ok, kept.count.refused) == (20, 8, 12)
    images = [pair.image.sha256 for pair in kept.pairs]
    halves = [image for image in set(images) if images.count(image) == 1 and image != "im0"]
    assert len(halves) <= 1, "no more than the last image is cut"
    assert kept == limit_pairs(made, 8, seed=0)
    assert kept.pairs != limit_pairs(made, 8, seed=1).pairs
    assert limit_pairs(made, None, seed=0) == limit_pairs(made, 19, seed=0) == made


def test_too_little_to_split_is_said():
    with pytest.raises(DataError, match=r"1 preference pair\(s\) on 1 image.*sample more tasks"):
        split_pairs([make_pair(make_task("t"))], 0.1, seed=0)


def make_card(train, validation, **changes):
    fields = {"recipe": load_recipe("nano"), "model": "nano", "judged": JUDGED, "paired": PAIRED}
    return render_card(train, validation, **(fields | changes))


def test_the_published_data_set_is_what_datasets_reads(tmp_path):
    store = ImageStore(tmp_path)
    tasks = [make_task(f"t{i}", store.put_png(Image.new("RGB", (4, 4), (i, 0, 0)))) for i in range(5)]
    pairs = [make_pair(task) for task in tasks]
    train, validation = split_pairs(pairs, 0.2, seed=0)
    card = make_card(train, validation)
    folder = tmp_path / "pairs" / pairs_digest(train, validation)[:12]
    publish_pairs(train, validation, store, folder, card=card)
    data = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {name: split.num_rows for name, split in data.items()} == {"train": 4, "validation": 1}
    row = data["train"][0]
    assert row["images"][0].getpixel((0, 0))[1:] == (0, 0)
    assert [part["type"] for part in row["prompt"][0]["content"]] == ["image", "text"]
    assert row["chosen"] == [{"role": "assistant", "content": [{"type": "text", "text": "text 0"}]}]
    assert row["rejected"][0]["content"][0]["text"] == "text 1"

    schema = pq.read_schema(folder / "train.parquet")
    written = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert '"List"' not in json.dumps(written), "datasets 3 does not know it"
    assert written["images"] == [{"_type": "Image"}]
    assert Features.from_arrow_schema(schema) == data["train"].features
    metadata = yaml.safe_load(card.split("---")[1])
    assert Features._from_yaml_list(metadata["dataset_info"]["features"]) == Features.from_arrow_schema(schema)
    assert (metadata["license"], metadata["language"], metadata["size_categories"]) == ("apache-2.0", ["en"], ["n<1K"])


def test_the_card_says_nothing_about_the_machine():
    overrides = [
        "judge.base_url=http://10.0.0.7/v1",
        "judge.api_key_env=MY_KEY",
        "eval.path=/home/me/sqa",
        "serve.port=8123",
    ]
    pair = make_pair(make_task("t"))
    card = make_card([pair], [pair], recipe=load_recipe("paper", overrides), model="/home/me/llava")
    assert not [word for word in ("10.0.0.7", "MY_KEY", "/home", "[serve]", "8123") if word in card]
    assert "temperature = 0.5" in card
    assert "| sampled from | llava (" in card
    assert yaml.safe_load(card.split("---")[1])["license_link"] == "https://github.com/allenai/aokvqa"


def test_the_card_says_what_is_not_among_the_rows_and_why():
    card = make_card([make_pair(make_task("t"))], [])
    assert "| responses judged | 47 of 50; the others: 2 refusal, 1 content filter |" in card
    assert "| questions that gave a pair | 5 of 6; the others: 1 tie |" in card


def test_the_digest_is_of_the_rows_not_of_where_images_lie():
    pair = make_pair(make_task("t"))
    moved = pair.model_copy(update={"image": pair.image.model_copy(update={"path": "elsewhere.png"})})
    other = pair.model_copy(update={"chosen": "other"})
    assert pairs_digest([pair], []) == pairs_digest([moved], [])
    assert len({pairs_digest([pair], []), pairs_digest([], [pair]), pairs_digest([other], [])}) == 3


def test_every_field_of_a_published_pair_is_in_the_digest():
    assert set(PreferencePair.model_fields) == set(make_pair(make_task("t")).model_dump())


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "other"}, {"prompt": "other"}, {"chosen": "other"}, {"rejected": "other"}, {"chosen_score": 7.0},
        {"rejected_score": -1.0}, {"judge": "other"}, {"policy": "sha256:bb"}, {"chosen_key": "o"}, {"rejected_key": "o"},
        {"image": ImageRef(sha256="other", path="p", width=4, height=4)},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_the_digest_of_pairs_holds_every_column(changes):
    pair = make_pair(make_task("t"))
    other = pair.model_copy(update=changes)
    assert pairs_digest([pair], []) != pairs_digest([other], [])
    assert pairs_digest([pair], []) != pairs_digest([], [pair])
    moved = pair.model_copy(update={"image": pair.image.model_copy(update={"path": "elsewhere.png"})})
    assert pairs_digest([pair], []) == pairs_digest([moved], [])
