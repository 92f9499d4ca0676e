"""The gate before the real vLLM: a policy passes, merged and as an adapter, and a server that is started wrong does not."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from unittest.mock import AsyncMock

import httpx2
import pytest

from bench.parity import draw_pairs, train
from vcot.pipeline.client import DIGEST_HEADER, ChatClient
from vcot.pipeline.errors import RequestError, SwapError
from vcot.pipeline.identity import compute_digest, read_manifest
from vcot.pipeline.records import CheckpointRef
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.cli.terminal import Terminal
from vcot.services.engine import vllm
from vcot.services.engine.command import SERVED_NAME
from vcot.services.engine.vllm import VllmServer
from vcot.services.gateway.admin import fetch_state, swap_to
from vcot.services.run import parity_gate
from vcot.services.run.directory import open_run
from vcot.services.run.parity import ask_served, check_defaults
from vcot.services.run.parity_gate import parity_stage
from vcot.services.run.session import Session
from vcot.training.merge.merging import merge_job
from vcot.training.protocol.agreement import read_probe
from vcot.training.protocol.job import TrainJob

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]
RECIPE = ("train.target_modules=language-model", "serve.port=0")
"""Servers of such a recipe take adapters."""


@pytest.fixture(scope="module")
async def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainJob, Path]:
    """A few steps of DPO on nano's language model."""
    folder = tmp_path_factory.mktemp("parity")
    return await train(draw_pairs(folder), 1e-4, 0.5, folder)


@pytest.fixture
def merged(trained: tuple[TrainJob, Path], tmp_path: Path) -> Path:
    job, directory = trained
    merge_job(job, directory, tmp_path / "merged")
    return tmp_path / "merged"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with open_run(tmp_path_factory.mktemp("run") / "run", "nano", RECIPE) as run:
        session = Session(run, Terminal())
        assert session.base.ref.kind == "base"
        yield session


async def test_policy_passes_merged_and_as_an_adapter_and_another_is_never_registered(
    session: Session, trained: tuple[TrainJob, Path], merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, directory = trained
    adapter = job.model_copy(update={"merge": job.merge.model_copy(update={"serve_as": "adapter"})})
    merge_job(adapter, directory, tmp_path / "adapter")

    async def live() -> tuple[CheckpointRef | None, str]:
        state = await fetch_state(await session.gateway.open())
        return state.live, state.aliases["policy"]

    base = (session.base.ref, session.base.ref.name)
    async with session:
        checkpoints = [session.registry.inspect(path) for path in (merged, tmp_path / "adapter")]
        for interruption in (RequestError("no answer", scope="item", reason="empty"), asyncio.CancelledError()):
            with monkeypatch.context() as patch:
                patch.setattr(parity_gate, "check_defaults", AsyncMock(side_effect=interruption))
                with pytest.raises(type(interruption)):
                    await parity_stage(session, checkpoints)
            assert session.registry.list() == [session.base]  # nothing is known of it
            if not isinstance(interruption, asyncio.CancelledError):  # which ends the command, and its gateway with it
                assert await live() == base

        for report in await parity_stage(session, checkpoints):
            assert max(report.max_abs_logp.values()) < 1e-4 < report.differs_from_base
            assert report.retention.kept == pytest.approx(1, abs=1e-3)
        assert session.registry.list() == [session.base, *checkpoints]
        assert await live() == base  # to ask changes nothing
        await swap_to(await session.gateway.open(), "policy", checkpoints[1].ref.name)
        policy = (session.base.ref, checkpoints[1].ref.name)  # an adapter beside its base

        # A probe of other weights: what is served is not what was trained.
        liar = shutil.copytree(merged, tmp_path / "liar")
        probe = json.loads((liar / "probe.json").read_text())
        (liar / "probe.json").write_text(json.dumps(probe | {"stored": probe["base"], "policy": probe["base"]}))
        manifest = json.loads((liar / "checkpoint.json").read_text())
        manifest["checkpoint"]["name"] = "liar"
        (liar / "config.json").write_text((liar / "config.json").read_text() + " ")
        manifest["checkpoint"]["digest"] = compute_digest(liar)
        (liar / "checkpoint.json").write_text(json.dumps(manifest))
        with pytest.raises(
            SwapError, match=r"liar is not served as it was trained: a log-prob .*; it is not registered"
        ):
            await parity_stage(session, [session.registry.inspect(liar)])
        assert session.registry.list() == [session.base, *checkpoints]
        assert await live() == policy

        # What was served rightly once and is no more goes from the registry, too, as soon as no alias means it.
        session.parity_path(checkpoints[1].ref).unlink()
        with monkeypatch.context() as patch:
            patch.setattr(parity_gate, "check_defaults", AsyncMock(side_effect=SwapError("it is sampled otherwise")))
            gateway = await session.gateway.open()
            await swap_to(gateway, "prod", checkpoints[1].ref.name)
            with pytest.raises(SwapError, match=r"otherwise; .* cannot be retired while policy, prod means it"):
                await parity_stage(session, checkpoints)
            assert await live() == policy
            for alias in ("policy", "prod"):
                await swap_to(gateway, alias, "base")
            with pytest.raises(SwapError, match=r"it is sampled otherwise; .* is retired"):
                await parity_stage(session, checkpoints)
        assert session.registry.list() == [session.base, checkpoints[0]]
        assert await live() == base


class Stamped(httpx2.AsyncHTTPTransport):
    """Straight to vLLM, past the gateway whose stamp the client asks for."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        response.headers[DIGEST_HEADER] = request.headers["x-vcot-expect"]
        return response


@asynccontextmanager
async def serving(directory: Path, tmp_path: Path) -> AsyncIterator[ChatClient]:
    with open_run(tmp_path / "direct", "nano") as run:
        server = VllmServer(Checkpoint(directory, read_manifest(directory)), run.recipe.serve, tmp_path / "vllm.log")
        try:
            await server.start(lambda _: None)
            transport = Stamped(uds=str(server.endpoint.socket))
            async with ChatClient("http://vllm/v1", "none", max_connections=4, transport=transport) as client:
                yield client
        finally:
            await server.stop()


async def test_server_that_is_started_wrong_turns_the_gate_red(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another chat template than trained, and sampling settings from the model's generation config."""
    command = vllm.server_command

    def careless(*arguments: object, **options: object) -> list[str]:
        words = command(*arguments, **options)
        at = words.index("--generation-config")
        return [*words[:at], *words[at + 2 :]]

    monkeypatch.setattr(vllm, "server_command", careless)
    config = json.loads((merged / "generation_config.json").read_text())
    (merged / "generation_config.json").write_text(json.dumps(config | {"temperature": 0.1, "top_k": 2}))
    template = (merged / "chat_template.jinja").read_text()
    (merged / "chat_template.jinja").write_text("{{- bos_token }}" + template)
    probe = read_probe(merged)
    assert probe is not None
    served_as = probe.checkpoint.model_copy(update={"name": SERVED_NAME})
    async with serving(merged, tmp_path) as client:
        with pytest.raises(SwapError, match=r"is not asked as it was trained: from token 2 .*a BOS more or less"):
            await ask_served(client, served_as, probe, max_concurrency=4)
        with pytest.raises(SwapError, match=r"took from the model's generation_config\.json"):
            await check_defaults(client, served_as, probe)
