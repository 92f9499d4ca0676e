"""Two real vLLM servers behind one gateway: base and policy are evaluated at once, each by the weights that it names."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bench.engine import make_variant
from vcot.pipeline.client import ChatClient
from vcot.pipeline.records import Response
from vcot.pipeline.report import Event, Said
from vcot.pipeline.sample import sample
from vcot.services.gateway.admin import fetch_state
from vcot.services.run.directory import open_run
from vcot.services.run.serving import running_gateway
from vcot.services.run.session import Session
from vcot.services.run.side_by_side import ask_checkpoints

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]
SIZES = ("eval.num_tasks=30", "eval.temperatures=[0]", 'eval.prompts=["zero_shot"]', "serve.port=0")


async def test_base_and_policy_are_asked_at_once_and_answer_as_each_does_alone(tmp_path: Path) -> None:
    make_variant(tmp_path, "moved", 0.2)
    told: list[str] = []

    def listen(event: Event) -> None:
        told.extend([event.text] if isinstance(event, Said) else [])

    with open_run(tmp_path / "run", "nano", [*SIZES, "serve.replicas=2"]) as run:
        async with running_gateway(run, lambda _: None) as gateway, Session(run, listen) as session:
            while len([each for each in (await fetch_state(gateway.url)).replicas if each.serves]) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            both = [session.base, session.registry.register(tmp_path / "moved")]
            questions = session.questions("test")
            await ask_checkpoints(session, "eval", both, questions)
            assert "base, moved are served side by side" in told
            assert [(count.stage, count.ok) for count in session.counts] == [("eval base", 30), ("eval moved", 30)]

            together = [texts(session, each.ref.digest) for each in both]
            assert together[0] != together[1]
            with open_run(tmp_path / "again", "nano", [*SIZES, f"serve.url={gateway.url}"]) as other:

                async def ask(client: ChatClient) -> None:
                    requests = questions.requests_by_task(both[1].ref)
                    await sample(requests, client, other.ledger, run.images, max_concurrency=4)

                await session.measure(both[1], ask)
                keys = [key for request in questions.requests_by_task(both[1].ref) for key in request.response_keys()]
                alone = other.ledger.get(Response, keys)
            assert [alone[key].text for key in keys] == together[1], (
                "greedy, in float32: what else is asked is no matter"
            )


def texts(session: Session, digest: str) -> list[str | None]:
    ref = next(each.ref for each in session.registry.list() if each.ref.digest == digest)
    keys = [key for request in session.questions("test").requests_by_task(ref) for key in request.response_keys()]
    found = session.run.ledger.get(Response, keys)
    return [found[key].text for key in keys]
