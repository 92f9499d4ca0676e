import json
import re
import tomllib
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Features, load_dataset
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vcot.pipeline.data_card import render_card
from vcot.pipeline.errors import DataError
from vcot.pipeline.fields import Section
from vcot.pipeline.images import ImageStore
from vcot.pipeline.pairs import Judged, PreferencePair, limit_pairs, read_pairs, split_pairs
from vcot.pipeline.pairs import build_pairs as build_couples
from vcot.pipeline.public import public_name
from vcot.pipeline.publish import SplitSize, pairs_digest, publish_pairs
from vcot.pipeline.records import (
    CheckpointRef,
    ImageRef,
    Judgment,
    Response,
    SamplingParams,
    StageCount,
    Task,
    content_key,
)
from vcot.pipeline.sections import PairsSection
from vcot.services.recipes.recipe import load_recipe, render_recipe

CHECKPOINT = CheckpointRef(name="base", digest="sha256:aa", kind="base")
SAMPLING = SamplingParams(temperature=0.5, max_tokens=8, n=8, seed=0)
JUDGED = StageCount(stage="judge", requested=50, ok=47, refused=3, reasons={"refusal": 2, "content_filter": 1})
PAIRED = StageCount(stage="pair", requested=6, ok=5, refused=1, reasons={"tie": 1})


def make_task(name, image=None):
    image = image or ImageRef(sha256=name, path=f"images/{name}.png", width=4, height=4)
    return Task(
        id=name,
        question="q?",
        choices=("a", "b"),
        answer=0,
        images=(image,) if image else (),
        source="nano",
        split="train",
    )


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
            judgments[key] = Judgment(key=f"j-{key}", response=key, task=task.id, judge="verifier/1", score=score)
    return responses, judgments


def judge_group(task, scores):
    responses, judgments = make_group(task, scores)
    return [Judged(each, judgments[each.key].score, "verifier/1") for each in responses]


class Held:
    """Stands for a ledger, by what it holds."""

    def __init__(self, responses):
        self.responses = {response.key: response for response in responses}

    def get(self, _, keys):
        return {key: self.responses[key] for key in keys}


def build_pairs(tasks, responses, judgments, **options):
    """The pairs of whole lists, with their texts."""
    groups = [
        (
            task,
            [
                Judged(r, judgments[r.key].score, judgments[r.key].judge, judgments[r.key].key)
                for r in responses
                if r.task == task.id and r.key in judgments
            ],
        )
        for task in tasks
    ]
    made = build_couples(groups, PairsSection(**options))
    whole = read_pairs(made.pairs, tasks, Held(responses))
    return replace(made, pairs=tuple(whole))


def test_best_against_worst_and_the_first_of_equals():
    task = make_task("t")
    responses, judgments = make_group(task, [0.5, 1.0, 0.0, 1.0, 0.0])
    (pair,) = build_pairs([task], responses, judgments).pairs
    assert (pair.chosen_key, pair.rejected_key) == ("t/1", "t/2")
    assert (pair.chosen_score, pair.rejected_score, pair.policy) == (1.0, 0.0, "sha256:aa")
    assert (pair.chosen_judgment, pair.rejected_judgment) == ("j-t/1", "j-t/2")


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
    count = pair_set.count
    assert (count.stage, count.requested, count.refused, count.failed) == ("pair", 5, 2, 2)
    assert count.reasons == {"tie": 2, "too_few_judged": 2}
    assert (pair_set.num_ties, pair_set.num_left_out) == (2, 0)
    good = build_pairs(tasks[-1:], responses, judgments)
    assert (good.num_ties, good.num_left_out) == (0, 0)


def test_pairs_without_images_are_held_out_by_question():
    tasks = [make_task(f"t{n}").model_copy(update={"images": ()}) for n in range(10)]
    section = PairsSection(policy="margin", max_per_task=2)
    couples = build_couples([(task, judge_group(task, [1.0, 0.5, 0.0])) for task in tasks], section).pairs
    assert len(couples) == 20
    train, validation = split_pairs(couples, 0.2, 0)
    assert (len(train), len(validation)) == (16, 4)
    assert not {pair.task for pair in train} & {pair.task for pair in validation}


def test_pairs_that_share_one_of_several_images_are_on_one_side():
    def about(name, *images):
        refs = tuple(ImageRef(sha256=image, path=image, width=4, height=4) for image in images)
        return make_task(name).model_copy(update={"images": refs})

    tasks = [
        about("a", "1", "2"),
        about("b", "2", "3"),
        about("c", "3"),
        about("d", "4"),
        about("e", "5", "4"),
        about("f", "6"),
    ]
    couples = build_couples([(task, judge_group(task, [1.0, 0.0])) for task in tasks]).pairs
    for seed in range(20):
        sides = [{pair.task for pair in side} for side in split_pairs(couples, 0.3, seed)]
        assert all(
            together <= side or together.isdisjoint(side)
            for together in ({"a", "b", "c"}, {"d", "e"})
            for side in sides
        )


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
    assert not {p.images[0].sha256 for p in train} & {p.images[0].sha256 for p in validation}
    assert split_pairs(pairs[::-1], 0.1, seed=0)[1] == validation[::-1]
    assert split_pairs(pairs, 0.1, seed=1)[1] != validation


@pytest.mark.parametrize(("fraction", "sizes"), [(0.0, (2, 1)), (0.5, (1, 2)), (1.0, (1, 2))])
def test_each_split_has_an_image_whatever_the_fraction(fraction, sizes):
    pairs = [make_pair(make_task(f"t{i}")) for i in range(3)]
    train, validation = split_pairs(pairs, fraction, seed=0)
    assert (len(train), len(validation)) == sizes
    assert [len(split) for split in split_pairs(pairs[:2], fraction, seed=0)] == [1, 1]


def test_at_most_so_many_pairs_are_drawn_by_image_and_the_rest_are_counted():
    tasks = [make_task(f"t{i}", ImageRef(sha256=f"im{i // 2}", path="p", width=1, height=1)) for i in range(20)]
    groups = [make_group(task, [0.5, 0.5] if task.id == "t0" else [1.0, 0.0]) for task in tasks]
    judgments = {key: judgment for _, group in groups for key, judgment in group.items()}
    made = build_pairs(tasks, [response for group, _ in groups for response in group], judgments)
    kept = limit_pairs(made, 8, seed=0)
    assert (len(made.pairs), len(kept.pairs), kept.num_left_out, kept.num_ties) == (19, 8, 11, 1)
    assert (kept.count.requested, kept.count.ok, kept.count.refused) == (20, 8, 12)
    images = [pair.images[0].sha256 for pair in kept.pairs]
    halves = [image for image in set(images) if images.count(image) == 1 and image != "im0"]
    assert len(halves) <= 1, "no more than the last image is cut"
    assert kept.count.reasons == {"tie": 1, "beyond_pairs_num": 11}
    assert kept == limit_pairs(made, 8, seed=0)
    assert kept.pairs != limit_pairs(made, 8, seed=1).pairs
    assert limit_pairs(made, None, seed=0) == limit_pairs(made, 19, seed=0) == made


def test_of_several_pairs_of_a_task_some_may_be_left_out_and_the_task_still_counts():
    tasks = [make_task("t0"), make_task("t1")]
    groups = [make_group(task, [1.0, 0.5, 0.0]) for task in tasks]
    judgments = {key: judgment for _, group in groups for key, judgment in group.items()}
    responses = [response for group, _ in groups for response in group]
    made = build_pairs(tasks, responses, judgments, policy="margin", max_per_task=3)
    assert [pair.task for pair in made.pairs] == ["t0"] * 3 + ["t1"] * 3
    kept = limit_pairs(made, 4, seed=0)
    assert (len(kept.pairs), kept.num_left_out, kept.count.ok, kept.count.reasons) == (4, 2, 2, {})
    kept = limit_pairs(made, 2, seed=0)
    assert (len(kept.pairs), kept.num_left_out, kept.count.ok, kept.count.reasons) == (2, 4, 1, {"beyond_pairs_num": 1})
    train, validation = split_pairs(made.pairs, 0.5, seed=0)
    assert [len({pair.images[0].sha256 for pair in part}) for part in (train, validation)] == [1, 1]


def test_too_little_to_split_is_said():
    with pytest.raises(DataError, match=r"1 preference pair\(s\) on 1 image.*sample more tasks"):
        split_pairs([make_pair(make_task("t"))], 0.1, seed=0)


def make_card(train, validation, **changes):
    recipe = changes.pop("recipe", load_recipe("nano"))
    told = {"questions": recipe.tasks, "policy": recipe.pairs.policy, "recipe": render_recipe(recipe, public=True)}
    fields = told | {"model": "nano", "judged": JUDGED, "paired": PAIRED, "digest": "ab" * 32,
              "prompts": {"Asked of the sampled model": "Look."}, "contamination": None, "cost": None}  # fmt: skip
    sizes = changes.pop("sizes", {"train": SplitSize(3, 1000, 500), "validation": SplitSize(1, 10, 5)})
    fields["tasks"] = [make_task(name) for name in dict.fromkeys(pair.task for pair in (*train, *validation))]
    return render_card(train, validation, sizes, **(fields | changes))


def test_the_card_counts_questions_and_pairs_by_data_set():
    tasks = [
        make_task("t"),
        make_task("u").model_copy(update={"source": "table", "choices": (), "answer": None, "images": ()}),
    ]
    card = make_card([make_pair(tasks[0])], [make_pair(tasks[0])], tasks=tasks)
    rows = [line for line in card.splitlines() if line.startswith(("| nano |", "| table |"))]
    assert rows == ["| nano | 1 | 1 | 1 | 1 | 1.0 | 2 |", "| table | 1 | 0 | 0 | 0 | 1.0 | 0 |"]


def test_the_card_of_a_mixture_names_each_licence():
    parts = '[{source = "aokvqa"}, {source = "scienceqa", hint = true}]'
    recipe = load_recipe("nano", ["tasks.source=mix", f"tasks.parts={parts}"])
    pair = make_pair(make_task("t"))
    card = make_card([pair], [pair], recipe=recipe)
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "other"
    assert header["source_datasets"] == ["HuggingFaceM4/A-OKVQA", "derek-thomas/ScienceQA"]
    assert "| questions | aokvqa + scienceqa, each after its hint |" in card
    assert "| other, as-a-okvqa-and-coco, https://github.com/allenai/aokvqa; cc-by-nc-sa-4.0 |" in card


def test_the_published_data_set_is_what_datasets_reads(tmp_path):
    store = ImageStore(tmp_path)
    tasks = [make_task(f"t{i}", store.put_png(Image.new("RGB", (4, 4), (i, 0, 0)))) for i in range(5)]
    pairs = [make_pair(task) for task in tasks]
    train, validation = split_pairs(pairs, 0.2, seed=0)
    folder = tmp_path / "pairs" / pairs_digest(train, validation)[:12]
    publish_pairs(train, validation, store, folder, card=lambda sizes: make_card(train, validation, sizes=sizes))
    card = (folder / "README.md").read_text("utf-8")
    data = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {name: split.num_rows for name, split in data.items()} == {"train": 4, "validation": 1}
    row = data["train"][0]
    assert row["images"][0].getpixel((0, 0))[1:] == (0, 0)
    assert [part["type"] for part in row["prompt"][0]["content"]] == ["image", "text"]
    assert row["chosen"] == [{"role": "assistant", "content": [{"type": "text", "text": "text 0"}]}]
    assert row["rejected"][0]["content"][0]["text"] == "text 1"

    made = [(p.chosen_key, p.rejected_key, p.chosen_judgment, p.rejected_judgment) for p in train]
    named = ("chosen_response", "rejected_response", "chosen_judgment", "rejected_judgment")
    assert [tuple(row[name] for name in named) for row in data["train"]] == made
    assert made[0][2].startswith("j-")

    schema = pq.read_schema(folder / "train.parquet")
    written = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert '"List"' not in json.dumps(written), "datasets 3 does not know it"
    assert written["images"] == [{"_type": "Image"}]
    assert Features.from_arrow_schema(schema) == data["train"].features
    metadata = yaml.safe_load(card.split("---")[1])
    assert Features._from_yaml_list(metadata["dataset_info"]["features"]) == Features.from_arrow_schema(schema)
    assert (metadata["license"], metadata["language"], metadata["size_categories"]) == ("apache-2.0", ["en"], ["n<1K"])
    info = DatasetInfosDict.from_directory(str(folder))["default"]
    assert {name: split.num_examples for name, split in info.splits.items()} == {"train": 4, "validation": 1}
    assert info.splits["train"].num_bytes == pytest.approx(pq.read_table(folder / "train.parquet").nbytes, rel=0.01)
    assert info.download_size == sum(path.stat().st_size for path in folder.glob("*.parquet"))


NAMES = ("tasks.source", "sample.prompt", "judge.kind", "pairs.policy", "eval.benchmark")
"""Of objects: a built-in, or a module and what it defines; no path."""


def secrets_in(section, where, found):
    """A recipe's section with a secret in every text that a user may write, and the secrets."""
    changes = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        place = f"{where}.{name}".lstrip(".")
        if isinstance(value, Section):
            changes[name] = secrets_in(value, place, found)
        elif field.annotation in (str, str | None) and place not in NAMES:
            found[place] = f"secret-{place}"
            changes[name] = f"/home/{found[place]}/known"
        elif place in ("serve.allowed_image_hosts", "serve.extra_args", "serve.upstreams", "serve.devices"):
            found[place] = f"secret-{place}"
            changes[name] = (found[place],)
    return section.model_copy(update=changes)


def test_no_file_of_the_data_set_says_anything_about_the_machine(tmp_path):
    secrets = {}
    recipe = secrets_in(load_recipe("paper", ["serve.port=54321"]), "", secrets)
    assert {"name", "judge.base_url", "judge.model", "train.accelerate_config", "serve.host", "eval.path"} <= set(
        secrets
    )
    store = ImageStore(tmp_path / "secret-run")
    task = make_task("t", store.put_png(Image.new("RGB", (4, 4))))
    pair = make_pair(task).model_copy(update={"judge": f"pointwise/1:{recipe.judge.model}"})
    folder = tmp_path / "secret-run" / "pairs"
    publish_pairs(
        [pair], [pair], store, folder,
        card=lambda sizes: make_card([pair], [pair], sizes=sizes, recipe=recipe, model=recipe.model.source),
    )  # fmt: skip
    for path in folder.iterdir():
        content = path.read_bytes()
        assert b"secret" not in content, path
        assert b"54321" not in content
        assert str(tmp_path).encode() not in content
    card = (folder / "README.md").read_text()
    assert pq.read_table(folder / "train.parquet")["judge"].to_pylist() == ["pointwise/1:known"]
    assert "| judge | pointwise/1:known |" in card
    assert "| sampled from | known (" in card
    assert "temperature = 0.5" in card
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["license_link"] == "https://github.com/allenai/aokvqa"
    assert metadata["source_datasets"] == ["HuggingFaceM4/A-OKVQA"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
        ("gpt-4o-mini", "gpt-4o-mini"),
        ("/srv/models/llava/", "llava"),
        ("~/llava", "llava"),
        ("runs/me/llava", "llava"),
        (r"C:\me\llava", "llava"),
        ("https://user:key@10.0.0.7/v1?key=x", "(an address)"),
    ],
)
def test_of_a_path_only_the_last_name_is_public(value, shown):
    assert public_name(value) == shown


HOSTILE = (
    "</td><script>alert(1)</script>",
    "a | b\n---\nlicense: mit\n---\n# Heading",
    "{{ 7 * 7 }}{% for x in y %}",
    "\x1b[31mred\x1b[0m\x07",
    "\u202eevil\u2066\u200b",
    "```\n[x](javascript:alert(1)) ![i](http://x/y.png)",
    "--- \r\nlicense: mit\r---\u2028---\x85---\x0c---",
    "w" * 5000,
    "[a]: http://x 'y' \\ $e=mc^2$ ~~s~~ &lt;",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_stay_texts_in_the_card(text):
    recipe = load_recipe("paper")
    recipe = recipe.model_copy(
        update={
            "name": text,
            "judge": recipe.judge.model_copy(update={"model": text}),
            "model": recipe.model.model_copy(update={"name": text, "revision": text}),
        }
    )
    pair = make_pair(make_task("t")).model_copy(update={"judge": f"pointwise/1:{text}"})
    count = JUDGED.model_copy(update={"reasons": {text: 3}})
    card = make_card([pair], [pair], recipe=recipe, model=text, judged=count)
    assert (
        DatasetCard(card).data.to_dict()
        == DatasetCard(make_card([pair], [pair], recipe=load_recipe("paper"))).data.to_dict()
    )
    body = card.split("\n# Preference pairs", 1)[1]
    table, rest = body.split("## Recipe", 1)
    table = table.partition("## Questions")[0] + table.partition("## Scores")[2]
    _, toml, after = re.split(r"^```(?:toml)?$", rest, flags=re.MULTILINE)
    assert after.strip() == ""
    assert tomllib.loads(toml)["judge"]["model"] == public_name(text)
    assert len(card.splitlines()) == len(card.split("\n")) - 1, "no other line ends"
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 12
    assert all(row.count("|") == 3 and len(row) < 3000 for row in rows)
    assert not set("<>[]`*") & set("".join(rows))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]", card)


def test_the_card_says_what_is_not_among_the_rows_and_why():
    card = make_card([make_pair(make_task("t"))], [])
    assert "| responses judged | 47 of 50; the others: 2 refusal, 1 content filter |" in card
    assert "| questions that gave a pair | 5 of 6; the others: 1 tie |" in card


def test_the_digest_is_of_the_rows_not_of_where_images_lie():
    pair = make_pair(make_task("t"))
    moved = pair.model_copy(update={"images": (pair.images[0].model_copy(update={"path": "elsewhere.png"}),)})
    other = pair.model_copy(update={"chosen": "other"})
    assert pairs_digest([pair], []) == pairs_digest([moved], [])
    assert len({pairs_digest([pair], []), pairs_digest([], [pair]), pairs_digest([other], [])}) == 3


def test_the_digest_of_pairs_that_were_made_with_one_image_and_without_keys_of_judgments_stays():
    pair = make_pair(make_task("t"))
    former = pair.model_dump(mode="json", exclude={"images", "chosen_judgment", "rejected_judgment"})
    former["image"] = pair.images[0].model_dump(exclude={"path"})
    assert pairs_digest([pair], []) == content_key(rows=[[former], []])


def test_every_field_of_a_published_pair_is_in_the_digest():
    assert set(PreferencePair.model_fields) == set(make_pair(make_task("t")).model_dump())


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "other"}, {"prompt": "other"}, {"chosen": "other"}, {"rejected": "other"}, {"chosen_score": 7.0},
        {"rejected_score": -1.0}, {"judge": "other"}, {"policy": "sha256:bb"}, {"chosen_key": "o"}, {"rejected_key": "o"},
        {"images": (ImageRef(sha256="other", path="p", width=4, height=4),)}, {"images": ()},
        {"images": (ImageRef(sha256="t", path="p", width=4, height=4),) * 2},
    ],
    ids=str,
)  # fmt: skip
def test_the_digest_of_pairs_holds_every_column(changes):
    pair = make_pair(make_task("t"))
    other = pair.model_copy(update=changes)
    assert pairs_digest([pair], []) != pairs_digest([other], [])
    assert pairs_digest([pair], []) != pairs_digest([], [pair])
    moved = pair.model_copy(update={"images": (pair.images[0].model_copy(update={"path": "elsewhere.png"}),)})
    assert pairs_digest([pair], []) == pairs_digest([moved], [])
