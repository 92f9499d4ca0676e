"""docs/extending.md, as a reader would follow it: a data set, a prompt, judges and a pair policy that stand elsewhere."""

import json
import sys
import tomllib
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from tests.pages import list_blocks, read_block
from tests.services.fake_vllm import write_checkpoint
from vcot.pipeline.client import DIGEST_HEADER, EXPECT_HEADER, ChatClient
from vcot.pipeline.errors import DataError, RecipeError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges import find_judge, judgment_keys
from vcot.pipeline.judges.model import ModelJudge
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.pairs import Judged, build_pairs
from vcot.pipeline.prompts import render_prompt, render_second
from vcot.pipeline.records import CheckpointRef, Response, SamplingParams, Task
from vcot.pipeline.sample import Plan, sample
from vcot.pipeline.sections import JudgeSection, PairsSection, TasksSection
from vcot.pipeline.sources import key_tasks, load_tasks
from vcot.services.recipes.recipe import load_recipe
from vcot.services.run.directory import open_run
from vcot.services.run.rounds import list_rounds
from vcot.services.run.session import Session
from vcot.services.run.steps import judge_stage, pair_stage

TASK = Task(id="t", question="q?", choices=("a", "b"), answer=0, source="s", split="train")
HEADINGS = ("A data set", "A prompt", "A judge", "A pair policy")
MODULES = {"clocks": ("A data set", 0), "looking": ("A prompt", 0), "signs": ("A prompt", 1), "brevity": ("A judge", 0),
           "faithful": ("A judge", 1), "margin": ("A pair policy", 0)}  # fmt: skip
SAID = {
    "What time is it?": ["A face with hands. Answer: (A)", "Hands, a face, and much more to be told of. Answer: (A)",
                         "Noon, I think. Answer: (B)"],
    "What does the sign say?": ["Red. Answer: (B)", "Red, with letters. Answer: (B)", "I do not know."],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The page's files, in a folder of their own that is the current one."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name, (heading, number) in MODULES.items():
        (folder / f"{name}.py").write_text(list_blocks(heading, "python")[number])
    (folder / "clocks.json").write_text(read_block("A data set", "json"))
    (folder / "after_signs.txt").write_text(read_block("A prompt", "text"))
    for number, colour in ((1, "white"), (2, "red")):
        Image.new("RGB", (8, 8), colour).save(folder / f"{number}.jpg")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    yield folder
    for name in MODULES:
        sys.modules.pop(name, None)


def flags():
    sections = [tomllib.loads(read_block(heading, "toml")) for heading in HEADINGS]
    return [
        f"{section}.{name}={json.dumps(value)}"
        for block in sections
        for section, fields in block.items()
        for name, value in fields.items()
    ]


async def answer(request):
    """A model with fixed answers to each question."""
    body = json.loads(request.content)
    text = next(part["text"] for part in body["messages"][0]["content"] if part["type"] == "text")
    said = next(answers for asked, answers in SAID.items() if asked in text)
    choices = [
        {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": said[i]}}
        for i in range(body["n"])
    ]
    completion = {
        "id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices,
        "usage": {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11},
    }  # fmt: skip
    return httpx2.Response(200, json=completion, headers={DIGEST_HEADER: request.headers[EXPECT_HEADER]})


@pytest.mark.parametrize("heading", HEADINGS)
def test_each_is_short(heading):
    assert all(len(code.splitlines()) < 30 for code in list_blocks(heading, "python"))


async def test_the_page_is_followed_word_for_word(folder, tmp_path):
    """Its files make the preference pairs of a run, with a model that is faked at the transport."""
    base = write_checkpoint(tmp_path / "base", "base", 1.0, kind="base")
    settings = [f"model.source={base}", "sample.k=3", "tasks.num_tasks=", *flags()]
    with open_run(tmp_path / "run", "nano", settings) as run:
        async with Session(run, lambda _: None) as session:
            [current] = list_rounds(session)
            transport = httpx2.MockTransport(answer)
            async with ChatClient("http://fake/v1", "key", max_connections=2, transport=transport) as client:
                options = {"max_concurrency": 2, "on_progress": lambda _: None}
                await sample(current.requests(), client, run.ledger, run.images, **options)
            await judge_stage(current)
            await pair_stage(current)
            told = {task.id: task for task in current.tasks}
            made = list(current.pairs.read(current.pairs.pair_set.pairs))
    assert told.keys() == {"clocks/1", "clocks/2"}
    found = {pair.task: (pair.chosen, pair.rejected, pair.judge) for pair in made}
    assert found == {
        "clocks/1": (SAID["What time is it?"][0], SAID["What time is it?"][2], "brevity/1"),
        "clocks/2": (SAID["What does the sign say?"][0], SAID["What does the sign say?"][2], "brevity/1"),
    }
    assert made[0].prompt.startswith("Question: What")
    assert made[0].prompt.endswith("Describe what you see. Then write Answer: and the option.")


def test_a_prompt_of_two_turns_reads_its_text_file_and_asks_anew_when_that_changes(folder):
    assert render_second("signs:READ_SIGNS", TASK, "STOP").startswith(
        "Question: q?\nOptions: (A) a (B) b\nWords in the image: STOP\nWrite"
    )
    checkpoint = CheckpointRef(name="base", digest="sha256:a", kind="base")
    plan = Plan([TASK], "signs:READ_SIGNS", checkpoint, SamplingParams(temperature=0.5, max_tokens=8, n=2, seed=0))
    [before] = plan
    with (folder / "after_signs.txt").open("a") as file:
        file.write("Be brief.")
    sys.modules.pop("signs")
    [after] = plan
    assert (before.first_key, before.key != after.key) == (after.first_key, True)


def load(folder):
    return load_tasks(
        TasksSection(source="clocks:CLOCKS", path="clocks.json"), folder / "run", ImageStore(folder / "run")
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"right": 2}, "clocks.json, row 0: task clocks/1: answer 2 is not an index into 2 choices"),
        ({"id": "2"}, "clocks.json, row 1: id clocks/2 occurs twice"),
        ({"question": None}, "clocks.json, row 0: question = None: input should be a valid string"),
        ({"image": "3.jpg"}, "3.jpg"),
    ],
)
def test_what_is_wrong_in_the_data_is_told_with_its_place(folder, changes, said):
    first, second = json.loads((folder / "clocks.json").read_text())
    (folder / "clocks.json").write_text(json.dumps([first | changes, second]))
    with pytest.raises(DataError, match=said):
        load(folder)


def test_a_source_of_files_asks_for_its_path(folder):
    with pytest.raises(DataError, match="clocks:CLOCKS is read from files; set its path"):
        key_tasks(TasksSection(source="clocks:CLOCKS"))


def edit(folder, name):
    with (folder / f"{name}.py").open("a") as file:
        file.write("# changed\n")


def test_a_changed_file_is_never_taken_for_its_former_version(folder, tmp_path):
    section = TasksSection(source="clocks:CLOCKS", path="clocks.json")
    [task, _] = load(folder)
    ref = CheckpointRef(name="base", digest="sha256:aa", kind="base")
    sampling = load_recipe("nano").sample.params()

    def list_keys():
        [request] = Plan([task], "looking:LOOK_FIRST", ref, sampling)
        response = Response(
            key="r", group="g", task=task.id, index=0, checkpoint=ref, prompt="cot", sampling=sampling, text="x"
        )
        judge = find_judge(JudgeSection(kind="brevity:Brevity"), ImageStore(tmp_path))
        return [key_tasks(section), request.key, *judgment_keys(judge, task, [response])]

    before = list_keys()
    assert list_keys() == before
    for number, name in enumerate(["clocks", "looking", "brevity"]):
        edit(folder, name)
        now = list_keys()
        assert [one != other for one, other in zip(before, now, strict=True)] == [i == number for i in range(3)]
        before = now


def test_a_data_set_that_was_moved_is_the_same(folder):
    before = key_tasks(TasksSection(source="clocks:CLOCKS", path="clocks.json"))
    (folder / "elsewhere").mkdir()
    (folder / "clocks.json").rename(folder / "elsewhere" / "list.json")
    assert key_tasks(TasksSection(source="clocks:CLOCKS", path="elsewhere/list.json")) == before


async def test_a_judge_that_is_a_model_asks_what_the_page_says_and_reads_its_number(folder, tmp_path):
    seen, replies = [], ["3", "three"]

    def upstream(request):
        seen.append(json.loads(request.content))
        message = {"role": "assistant", "content": replies.pop(0)}
        completion = {
            "id": "x", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101},
        }  # fmt: skip
        return httpx2.Response(200, json=completion)

    [task, _] = load(folder)
    section = JudgeSection(kind="faithful:Faithful", model="m", base_url="http://judge/v1")
    judge = find_judge(section, ImageStore(folder / "run"))
    assert isinstance(judge, ModelJudge)
    judge.transport = httpx2.MockTransport(upstream)
    response = Response(
        key="r", group="g", task=task.id, index=0, checkpoint=CheckpointRef(name="b", digest="d", kind="base"),
        prompt="cot", sampling=load_recipe("nano").sample.params(), text="It is noon.",
    )  # fmt: skip
    async with judge:
        read, unread = [await judge.score(task, response) for _ in range(2)]
    assert (judge.name, read.score, read.usage.num_tokens) == ("faithful/1:m", 3, 101)
    assert (unread.score, unread.refused, unread.reason, unread.usage.num_tokens) == (None, True, "unreadable", 101)
    assert "Response: It is noon." in seen[0]["messages"][0]["content"][1]["text"]
    assert "response_format" not in seen[0]


def picked(policy, folder, monkeypatch):
    (folder / "picks.py").write_text(policy)
    monkeypatch.syspath_prepend(folder)
    [task, _] = load(folder)
    ref = CheckpointRef(name="b", digest="d", kind="base")
    responses = [
        Response(
            key=f"r{i}",
            group="g",
            task=task.id,
            index=i,
            checkpoint=ref,
            prompt="cot",
            sampling=load_recipe("nano").sample.params(),
            text=text,
        )
        for i, text in enumerate(["one", "two", "one "])
    ]
    judged = [Judged(r, s, "j/1") for r, s in zip(responses, (1.0, 0.5, 0.0), strict=True)]
    try:
        return build_pairs([(task, judged)], PairsSection(policy="picks:pick"))
    finally:
        sys.modules.pop("picks", None)


@pytest.mark.parametrize(
    ("picks", "said"),
    [
        ("judged[0], judged[2]", "which say the same"),
        ("judged[1], judged[0]", "of which the chosen one scores 0.5, and the rejected one 1"),
        ("judged[0], None", "which are not the task's"),
    ],
)
def test_a_policy_that_picks_no_pair_is_told(folder, monkeypatch, picks, said):
    with pytest.raises(
        DataError, match=rf"pairs.policy picks:pick picked two responses to task clocks/\d, {said}; mend"
    ):
        picked(f"def pick(task, may_be_chosen, judged, section):\n    return [({picks})]\n", folder, monkeypatch)


def test_a_policy_that_gives_no_list_of_pairs_is_told(folder, monkeypatch):
    with pytest.raises(
        DataError, match=r"picks:pick gave no list of pairs \(chosen, rejected\) for task clocks/\d; mend"
    ):
        picked("pick = lambda task, may_be_chosen, judged, section: judged[:2]\n", folder, monkeypatch)


@pytest.mark.parametrize(
    ("gives", "reason"), [("'tie'", "tie"), ("'odd'", "odd"), ("[]", "no_pair"), ("''", "no_pair")]
)
def test_a_policy_that_finds_no_pair_is_counted_by_its_reason(folder, monkeypatch, gives, reason):
    found = picked(f"pick = lambda *_: {gives}\n", folder, monkeypatch)
    assert (found.pairs, found.count.refused, found.count.reasons) == ((), 1, {reason: 1})


@pytest.mark.parametrize(
    ("module", "code", "found", "said"),
    [
        ("nameless", "from vcot.pipeline.judges import Judge\nclass J(Judge):\n    async def score(self, *_, **__): ...\n",
         lambda store: find_judge(JudgeSection(kind="nameless:J"), store), "judge nameless:J has no name"),
        ("textless", "from vcot.pipeline.prompts import Prompt\nP = Prompt(template='Answer.', split=str)\n",
         lambda store: render_prompt("textless:P", TASK), "has no place for the question; write <question> there"),
        ("odd", "S = 3\n", lambda store, folder=Path("run"): load_tasks(TasksSection(source="odd:S"), folder, store),
         r"source odd:S is an object of type int, and must be a vcot\.Source"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said(folder, tmp_path, module, code, found, said):
    (folder / f"{module}.py").write_text(code)
    with pytest.raises(RecipeError, match=said):
        found(ImageStore(tmp_path))
    sys.modules.pop(module, None)


def test_the_ledger_opens_without_what_wrote_into_it(folder, tmp_path):
    """A run that was made with a prompt of one's own is read where that module is not installed."""
    ref = CheckpointRef(name="b", digest="d", kind="base")
    response = Response(
        key="ab" * 32, group="cd" * 32, task="t", index=0, checkpoint=ref, prompt="gone:PROMPT",
        sampling=load_recipe("nano").sample.params().model_copy(update={"n": 1}), text="x",
    )  # fmt: skip
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.put([response])
    assert ledger.get(Response, [response.key])[response.key].prompt == "gone:PROMPT"
