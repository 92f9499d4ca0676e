"""A small run to view: two tasks of hostile texts among ordinary ones, errors of every kind, a policy and its evaluation."""

import asyncio
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.services.fake_vllm import write_checkpoint
from tests.services.run.test_rounds import answer
from vcot.pipeline.prompts import split_thought
from vcot.pipeline.records import Response, Usage
from vcot.pipeline.report import ignore
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.run.directory import open_run
from vcot.services.run.rounds import list_rounds
from vcot.services.run.session import Session
from vcot.services.run.steps import judge_stage
from vcot.services.view.index import FOLDER
from vcot.services.view.indexing import bring_up_to_date, refresh_overview
from vcot.services.view.shown import ViewedRun
from vcot.services.view.viewer import create_app

HOST = "http://127.0.0.1:8400"
TOKEN = "let-me-in"
K = 3
SIZES = (f"sample.k={K}", "tasks.num_tasks=12", "eval.num_tasks=9", "eval.temperatures=[0.4]")
HOSTILE = (
    "<script>document.title = 'hacked'</script>",
    '"><img src=x onerror="document.title=\'hacked\'">',
    "' onfocus='document.title=1' autofocus='",
    "</textarea></title></style><svg onload=document.title='hacked'>",
    "<!--live--> {{ 7 * 7 }} {% raw %} ${7*7} javascript:alert(1)",
    "\u202egnorw\u202c right \u2066isolated\u2069 \x00null\x07bell\x1b[31mred",
    "&lt;b&gt; &amp; <b>bold</b>",
)


@dataclass
class Made:
    """The run, and what is known of it."""

    directory: Path
    base: Checkpoint
    policy: Checkpoint

    def shown(self, number=0):
        return ViewedRun(number, self.directory)

    def index(self):
        """The same, with its index up to date."""
        asyncio.run(bring_up_to_date(self.directory, self.directory / FOLDER))
        return self.shown()

    def summarise(self):
        """The same, with its overview."""
        self.index()
        asyncio.run(refresh_overview(self.directory, self.directory / FOLDER))
        return self.shown()

    def client(self, *others):
        """Who was let in, to a viewer of the run and others."""
        client = TestClient(create_app([self.shown(), *others], TOKEN), base_url=HOST)
        client.get("/", params={"token": TOKEN})
        return client

    @contextmanager
    def writing(self):
        """As long as a command holds the run."""
        with open_run(self.directory, access="alone") as run:
            yield run

    def change(self, do):
        """Work on the run as a command does."""

        async def work():
            with open_run(self.directory, access="alone") as run:
                async with Session(run, ignore) as session:
                    return do(session)

        return asyncio.run(work())


def respond(request, index, text=None, **fields):
    thought, final = split_thought(request.prompt, text) if text is not None else (None, None)
    return Response(
        key=request.response_keys()[index], group=request.key, task=request.task.id, index=index,
        checkpoint=request.checkpoint, prompt=request.prompt, sampling=request.sampling, text=text, thought=thought,
        answer=final, usage=Usage(prompt_tokens=9, completion_tokens=20) if index == 0 else None, **fields,
    )  # fmt: skip


def hostile_text(request, index):
    return f"{HOSTILE[index % len(HOSTILE)]} {HOSTILE[(index + 3) % len(HOSTILE)]}\n<R> The answer is (A). {HOSTILE[5]}"


async def make_run(folder):
    base = write_checkpoint(folder / "base", "base", 1.0, kind="base")
    with open_run(folder / "run", "nano", [f"model.source={base}", *SIZES], access="alone") as run:
        async with Session(run, ignore) as session:
            base = session.base
            (current,) = list_rounds(session)
            requests = list(current.requests())
            answer(session, requests[4:], lambda task, index: index == 0)
            ledger = run.ledger
            ledger.put([respond(requests[0], index, hostile_text(requests[0], index)) for index in range(K)])
            refusal = {"error": "it is too long", "reason": "too_long", "refused": True}
            ledger.put([respond(requests[1], index, **refusal) for index in range(K)])
            fault = {"error": f"<b>no</b> answer {HOSTILE[0]}", "reason": "overloaded"}
            ledger.put([respond(requests[2], index, **fault) for index in range(K)])
            await judge_stage(current)
            policy = session.registry.register(write_checkpoint(run.path("checkpoints", "dpo-x"), "dpo-x", 2.0))
            questions = session.questions("test")
            order = {task.id: number for number, task in enumerate(questions.tasks)}
            answer(session, questions.requests(base.ref), lambda task, _: order[task.id] < 6)
            answer(session, questions.requests(policy.ref), lambda task, _: order[task.id] >= 3)
    return Made(folder / "run", base, policy)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The run as commands left it."""
    return asyncio.run(make_run(tmp_path_factory.mktemp("viewed")))


@pytest.fixture(scope="module")
def made(prepared):
    """The run with its index and overview, for tests that leave it as it is."""
    prepared.summarise()
    return prepared


@pytest.fixture
def own(prepared, tmp_path):
    """A copy of it without an index, for a test that goes on with it."""
    shutil.copytree(prepared.directory, tmp_path / "run", ignore=shutil.ignore_patterns(FOLDER))
    return replace(prepared, directory=tmp_path / "run")


__all__ = ["HOST", "HOSTILE", "SIZES", "TOKEN", "Made", "make_run", "respond"]
