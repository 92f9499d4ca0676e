"""`vcot run` beside a `vcot serve`, with serve.while_training = stop: no real vLLM is there while the real trainer is."""

import asyncio
import sys
from pathlib import Path

import openai
import pytest

from tests.e2e.test_serving import ask, client, descendants
from vcot.services.gateway.admin import fetch_state, swap_to
from vcot.services.run.directory import open_run
from vcot.services.run.serving import GatewayHandle, running_gateway
from vcot.training.protocol.job import STATUS, TrainStatus, read_record

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = [
    "serve.port=0",
    "serve.while_training=stop",
    "tasks.num_tasks=24",
    "eval.num_tasks=12",
    "eval.temperatures=[0.8]",
    "train.epochs=1",
    "train.learning_rate=1e-3",
    "train.num_evaluations=1",
]
ENGINE = b"vllm.entrypoints"


async def watch(gateway: GatewayHandle, run: Path, process: asyncio.subprocess.Process) -> tuple[set[str], list[int]]:
    """The gateway's phases while the trainer works, and the engines that were seen then."""
    phases, engines = set[str](), list[int]()
    while process.returncode is None:
        if any(is_training(path) for path in run.glob(f"training/*/{STATUS}")):
            state = await fetch_state(gateway.url)
            phases.add(state.phase)
            engines += descendants(state, ENGINE)
            if not phases - {"resting"}:
                async with client(gateway) as api:
                    with pytest.raises(openai.InternalServerError, match="the servers rest"):
                        await ask(api)
        await asyncio.sleep(0.2)
    return phases, engines


def is_training(path: Path) -> bool:
    return read_record(path, TrainStatus).state == "running"


async def test_one_machine_serves_and_trains_in_turn(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", "nano", SMALL) as run:
        async with running_gateway(run, lambda _: None) as gateway, client(gateway) as api:
            before = await ask(api, model="base")
            assert descendants(await fetch_state(gateway.url), ENGINE)
            command = [sys.executable, "-m", "vcot.services.cli", "run", "--run", str(run.directory)]
            process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
            assert process.stderr is not None
            reading = asyncio.create_task(process.stderr.read())
            phases, engines = await watch(gateway, run.directory, process)
            said = (await reading).decode()
            assert process.returncode == 0, said
            assert (phases, engines) == ({"resting"}, [])
            assert "at rest while this trains: vllm-0 (stop)" in said
            assert said.index("back from the rest") < said.index("log-probs agree within")
            await swap_to(gateway.url, "policy", "base")
            assert await ask(api, model="base") == before
            assert (await fetch_state(gateway.url)).num_restarts == 0
