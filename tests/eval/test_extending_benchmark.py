"""docs/extending.md, as a reader would follow it: its files stand outside the repository, and are evaluated."""

import json
import tomllib

import httpx2
import pytest
from PIL import Image

from tests.pages import read_block
from tests.services.fake_vllm import write_checkpoint
from vcot.pipeline.client import DIGEST_HEADER, EXPECT_HEADER, ChatClient
from vcot.pipeline.sample import sample
from vcot.services.cli import commands
from vcot.services.cli.terminal import Terminal
from vcot.services.run import results
from vcot.services.run.directory import open_run
from vcot.services.run.session import Session

SAID = {"What time is it?": "The answer is (ten past two).", "What does the sign say?": "The answer is (B)"}


def block(language):
    return read_block("A benchmark", language)


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """The page's files, and its recipe as flags."""
    (tmp_path / "clocks_and_signs.py").write_text(block("python"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "clocks_and_signs.json").write_text(block("json"))
    for number, colour in ((1, "white"), (2, "red")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{number:012d}.jpg")
    monkeypatch.chdir(tmp_path)
    return [f"eval.{name}={json.dumps(value)}" for name, value in tomllib.loads(block("toml"))["eval"].items()]


async def answer(request):
    """A model that says the time in words, and the sign by its letter."""
    body = json.loads(request.content)
    text = next(part["text"] for part in body["messages"][0]["content"] if part["type"] == "text")
    message = {"role": "assistant", "content": next(said for asked, said in SAID.items() if asked in text)}
    choices = [{"index": 0, "finish_reason": "stop", "message": message}]
    usage = {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    completion = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": choices,
        "usage": usage,
    }
    return httpx2.Response(200, json=completion, headers={DIGEST_HEADER: request.headers[EXPECT_HEADER]})


async def ask(session):
    """What `vcot eval` asks, of a model that is faked at the transport."""
    requests, run = session.questions("validation").requests(session.base.ref), session.run
    async with ChatClient("http://fake/v1", "key", max_connections=2, transport=httpx2.MockTransport(answer)) as client:
        options = {"max_concurrency": 2, "on_progress": lambda _: None}
        count = await sample(requests, client, run.ledger, run.images, **options)
    assert count.ok == count.requested == 2 * 2 * 2


def test_it_is_short():
    assert len(block("python").splitlines()) < 30


async def test_the_page_is_followed_word_for_word(flags, tmp_path, capsys):
    base = write_checkpoint(tmp_path / "base", "base", 1.0, kind="base")
    with open_run(tmp_path / "run", "nano", [f"model.source={base}", "eval.num_tasks=", *flags]) as run:
        async with Session(run, Terminal()) as session:
            await ask(session)
            await commands.evaluate(session, ["base"])
            found = json.loads((results.find_folder(run, [session.base]) / results.RESULTS).read_text())
    told = capsys.readouterr()
    assert "base: 2 clocks questions of validation" in told.err
    table = " ".join(told.out.split())
    assert "Avg clocks signs unread cut failed n" in table
    assert "chance 50.0 50.0 50.0" in table
    assert len(found["results"]) == 4
    for row in found["results"]:
        accuracy = {column: interval["value"] for column, interval in row["accuracy"].items()}
        assert accuracy == {"Avg": 0.5, "clocks": 1, "signs": 0}
        assert (row["no_answer"], row["num_failed"]) == (0, 0)
