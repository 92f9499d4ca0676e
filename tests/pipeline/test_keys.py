"""What is built in keeps its keys, or else a run asks and pays for everything anew."""

import sqlite3

import pytest

from tests.pipeline.judges.model_api import Table
from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges import find_judge, judgment_keys
from vcot.pipeline.judges.pairwise import PairwiseJudge
from vcot.pipeline.records import CheckpointRef, ImageRef, Response, SamplingParams, Task
from vcot.pipeline.sample import Plan
from vcot.pipeline.sections import JudgeSection, TasksSection
from vcot.pipeline.sources import key_tasks

CHECKPOINT = CheckpointRef(name="base", digest="sha256:aa", kind="base")
SAMPLING = SamplingParams(temperature=0.5, max_tokens=8, n=2, seed=3)
TASK = Task(
    id="t",
    question="What is it?",
    choices=("a cat", "a dog"),
    answer=1,
    facts=("It is a dog.",),
    source="nano",
    split="train",
    images=(ImageRef(sha256="ab", path="x.png", width=2, height=2),),
)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        (TasksSection(source="nano", num_tasks=3), "45ed7f573084d8e6491d0f867d1090a39b298141b39c74dde24f35fe75f4e1f3"),
        (
            TasksSection(source="unusual", split="test"),
            "04cab178f2f9b9d47df8eb520238aa2de8f13a58ae505243dff694ec180005c7",
        ),
        (
            TasksSection(source="aokvqa", revision="abc", num_tasks=5, seed=1),
            "82b55dff812820075d1f89f111ea27b345d80c5f981e31963b47a2240e933982",
        ),
        (
            TasksSection(source="scienceqa", revision="abc", split="test", hint=True),
            "0c0da48481a91a0e13f47768db9f4a2ff82e85e51c3c6448824d4e69c5187ed9",
        ),
    ],
)
def test_of_tasks(section, key):
    assert key_tasks(section) == key


@pytest.mark.parametrize(
    ("prompt", "key"),
    [
        ("thought_specific", "db4d63dcabf2620590d98d6f36bd55f892ceb7126fb97bdf5f27b974e833830f"),
        ("thought_generic", "df973bf8cc9a1a08880b72aaadd392596f059dc4f29682d2e2b5296ac3bf6a99"),
        ("zero_shot", "c956054c204a13f20545c0559ef6720ee4c108be7e282494e9d5900c3e8e224d"),
        ("cot", "daed7ba915ab9defcf607cd95ad89f0e276c1a0e025a32297f94077fc5fb61b8"),
    ],
)
def test_of_requests(prompt, key):
    [request] = Plan([TASK], prompt, CHECKPOINT, SAMPLING)
    assert request.key == key
    assert request.sampling.seed == int(key[:8], 16) >> 1


@pytest.mark.parametrize(
    ("prompt", "first_key", "key"),
    [
        (
            "two_stage",
            "9cbdd3eec3e75aa1c4c60d2115b102902c17af4b09e4d932330648cf8aaf2391",
            "7bd378eee0c1a9c107e4a9a52fef606ecc44e96dbb4507b83ab8574568e8a91f",
        ),
        (
            "caption_first",
            "a4075da6282a9745d9fd2ad8893ab123bad34fa71d3d1fb2fed6dd9364cf5ce2",
            "f92ba3f8b37467477fcdd5f88133320a96e242014ac015bf3ddb0f89c7fe845d",
        ),
    ],
)
def test_of_requests_of_two_turns(prompt, first_key, key):
    [request] = Plan([TASK], prompt, CHECKPOINT, SAMPLING)
    assert (request.first_key, request.key) == (first_key, key)
    assert request.sampling.seed == int(first_key[:8], 16) >> 1


def test_of_responses():
    [request] = Plan([TASK], "cot", CHECKPOINT, SAMPLING)
    assert request.response_key(1) == "a032d0e89a0a35f4b92895850a7ae35a1fb233bc8d24750ef88bf3d0e4972baa"


def test_of_judgments(tmp_path):
    section = JudgeSection(kind="pointwise", model="gpt-4o-mini")
    response = Response(
        key="r", group="g", task="t", index=0, checkpoint=CHECKPOINT, prompt="cot", sampling=SAMPLING, text="x"
    )
    assert judgment_keys(find_judge(section, ImageStore(tmp_path)), TASK, [response]) == [
        "5b66b428522a26985f122b2e88ec0ecd626811e0e0c08d5841c665c79f14b755"
    ]


@pytest.mark.parametrize(
    ("section", "changes", "key"),
    [
        ({"kind": "pairwise"}, {}, "afd8b9277f3e6dd804992fe4d49bb530f6d73ea05a59aa1d92e6fbde8cb9b18d"),
        ({"image": "blank"}, {}, "427781de30dfa4f96427a13f90124a04acd4ffee2bbaec30f5063e43503217e0"),
        ({"image": "other"}, {}, "508c9f4eb6d390e7f4def0e030411a7c83d3902ffc2f242f2c8bd5c1b6b44dbd"),
        (
            {},
            {"choices": (), "answer": None, "gold": "a dog", "accepted": ("a dog", "dog")},
            "eb04052d92602c332ae5573dc8153a4d28bd19157beae150a7dad10f45d7422a",
        ),
    ],
)
def test_of_judgments_that_go_by_more(tmp_path, section, changes, key):
    judge = find_judge(JudgeSection(**{"kind": "pointwise", "model": "gpt-4o-mini"} | section), ImageStore(tmp_path))
    responses = [
        Response(
            key=key, group="g", task="t", index=0, checkpoint=CHECKPOINT, prompt="cot", sampling=SAMPLING, text="x"
        )
        for key in "rs"
    ]
    assert judgment_keys(judge, TASK.model_copy(update=changes), responses)[1] == key


def test_of_judgments_of_an_answer_in_words_by_what_is_accepted(tmp_path):
    response = Response(
        key="r", group="g", task="t", index=0, checkpoint=CHECKPOINT, prompt="cot", sampling=SAMPLING, text="x"
    )
    judge = find_judge(JudgeSection(kind="pointwise", model="m", gold=True), ImageStore(tmp_path))
    question = TASK.model_copy(update={"choices": (), "answer": None})
    golds = [("cab", ()), ("bus", ()), ("cab", ("cab", "taxi"))]
    tasks = [question.model_copy(update={"gold": gold, "accepted": accepted}) for gold, accepted in golds]
    assert len({judgment_keys(judge, task, [response])[0] for task in tasks}) == 3


async def test_of_replies(tmp_path, monkeypatch):
    """Of which a verdict is made: what was answered is not asked again, with the first seed or a later one."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    section = JudgeSection(kind="pairwise", model="gpt-4o-mini", image="none", seed=5, max_asks=2)
    table = Table(PairwiseJudge, section, tmp_path, lambda _: "hard to say")
    for _ in range(2):
        await table.judge()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        found = {key.hex() for (key,) in connection.execute("SELECT key FROM replies")}
    connection.close()
    assert found == {
        "000bf51a81033747b6f0fa08f159894ede0ed456b191835d746bff30af129b67",
        "79f4ce9b99b3870de230ada506cdb23a7caed77c451fb3148aaf13c9dca6941b",
        "37d019a31adc374758fc9117f7bc54c47cfb54026085a29d7a4a09b10bd84ab9",
        "6e9c1ab0172a7c895cac5aace3c921505a08fda5f2433d5719dad87503b86999",
    }
