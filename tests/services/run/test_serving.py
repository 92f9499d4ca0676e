import asyncio
import fcntl
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

import httpx
import pytest

from bench.engine import children
from tests.services.engine.test_vllm import processes
from tests.services.fake_vllm import install_stub, write_checkpoint
from vcot.pipeline.client import ChatClient
from vcot.pipeline.errors import CheckpointError, MachineError, RequestError, ServerError
from vcot.pipeline.files import write_record
from vcot.pipeline.records import SamplingParams
from vcot.pipeline.report import Said
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.cli import commands
from vcot.services.cli.terminal import Terminal
from vcot.services.gateway.admin import fetch_state, live_checkpoint, register, rest, retire, swap_to, try_out
from vcot.services.gateway.http import heap
from vcot.services.gateway.swap import rollout
from vcot.services.run.announcement import Serving, find_gateway, is_served, only_gateway
from vcot.services.run.directory import Run, open_run
from vcot.services.run.rounds import list_rounds
from vcot.services.run.serving import _persist, _serve, running_gateway
from vcot.services.run.session import Session
from vcot.services.run.steps import eval_stage, load_scores, sample_stage, swap_stage


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose vLLM is the fake one, in a process of its own."""
    install_stub(tmp_path / "stub")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"), prepend=os.pathsep)
    base = write_checkpoint(tmp_path / "base", "seed", 1.0, kind="base")
    with open_run(tmp_path / "run", "nano", [f"model.source={base}", "serve.port=0"]) as opened:
        return opened


async def gone(pid: int) -> bool:
    """Wait until that process, which need not be our child, has ended."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        ready, _, _ = await asyncio.to_thread(select.select, [process], [], [], 15)
    finally:
        os.close(process)
    return bool(ready)


async def expect_second_refused(run: Run, url: str) -> None:
    command = [sys.executable, "-m", "vcot.services.run.serving", str(run.directory)]
    second = await asyncio.create_subprocess_exec(*command, stdout=-1, stderr=-1)
    out, _ = await second.communicate()
    assert second.returncode == 2
    assert f"is served already at {url} by process" in out.decode()


async def expect_kept(url: str) -> None:
    """A connection that was idle for longer than OpenAI's SDK keeps one is answered on."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for idle_s in (0.0, 5.5):
        await asyncio.sleep(idle_s)
        writer.write(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        await reader.readuntil(b"\r\n\r\n")
        await reader.read(1000)
    writer.close()


async def expect_small(url: str) -> None:
    """The gateway's process carries no library of the model side."""
    maps = Path(f"/proc/{(await fetch_state(url)).pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "pyarrow" not in maps


async def test_a_gateway_is_started_swapped_and_stopped(run: Run, tmp_path: Path) -> None:
    said: list[str] = []
    tuned = write_checkpoint(tmp_path / "tuned", "tuned", 2.0)
    async with running_gateway(run, said.append) as gateway:
        assert gateway.started_here
        assert (await live_checkpoint(gateway.url)).name == "base"
        kept = asyncio.create_task(expect_kept(gateway.url))
        assert (await register(gateway.url, tuned)).name == "tuned"
        assert (await swap_to(gateway.url, "policy", "tuned")).live.name == "tuned"
        assert (await swap_to(gateway.url, "policy", "tuned")).pause_s == 0
        with pytest.raises(CheckpointError, match="tuned is live and cannot be retired"):
            await retire(gateway.url, "tuned")
        await register(gateway.url, write_checkpoint(tmp_path / "spare", "spare", 3.0))
        assert (await retire(gateway.url, "spare")).name == "spare"
        with pytest.raises(CheckpointError, match="did you mean tuned"):
            await swap_to(gateway.url, "policy", "tunde")
        await expect_second_refused(run, gateway.url)
        await expect_small(gateway.url)
        await kept
        async with running_gateway(run, said.append) as same:
            assert same == type(same)(gateway.url, started_here=False)
        assert (await live_checkpoint(gateway.url)).name == "tuned"
    assert "starting the gateway" in said
    assert not (run.directory / "serving.json").exists()
    with pytest.raises(ServerError, match="is it running"):
        await live_checkpoint(gateway.url)
    async with running_gateway(run, said.append) as again:  # what was live is live again
        assert (await live_checkpoint(again.url)).name == "tuned"


async def test_a_trial_whose_client_was_killed_ends_by_itself(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, where a minute can be made shorter."""
    monkeypatch.setattr(rollout, "end_forgotten_trials", partial(rollout.end_forgotten_trials, idle_s=0.5))
    monkeypatch.setattr(heap, "settle", lambda: None)
    up = asyncio.Event()
    serving = asyncio.create_task(_serve(run, lambda said: up.set() if "is live" in said else None, owned=False))
    async with asyncio.timeout(30):
        await up.wait()
        url = Serving.model_validate_json(run.path("serving.json").read_text()).url
        tried = await try_out(url, write_checkpoint(tmp_path / "made", "made", 3.0))
        assert (await fetch_state(url)).live == tried.live
        while (await live_checkpoint(url)).name != "base":  # noqa: ASYNC110 - another task's state
            await asyncio.sleep(0.05)
        assert (await fetch_state(url)).num_restarts == 0
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


@pytest.fixture
def small(run: Run) -> Run:
    """With little to ask."""
    sizes = ["tasks.num_tasks=4", "sample.k=2", "eval.num_tasks=6", "eval.temperatures=[0.4]", "eval.prompts=['cot']"]
    with open_run(run.directory, None, sizes, save=True) as opened:
        return opened


async def measure(session: Session, checkpoint: Checkpoint) -> str:
    """What the checkpoint says."""
    return await session.measure(checkpoint, lambda client: measure_with(client, checkpoint))


async def measure_with(client: ChatClient, checkpoint: Checkpoint) -> str:
    ask = [{"role": "user", "content": "hello"}], SamplingParams(temperature=1.0, max_tokens=3, seed=0)
    completion = await client.complete(checkpoint.ref.name, *ask, expect=checkpoint.ref.digest)
    return completion.choices[0].text


@asynccontextmanager
async def asking(url: str) -> AsyncIterator[list[tuple[int, str]]]:
    """Status and checkpoint of the answers to others, who ask for `policy` all the time meanwhile."""
    answers: list[tuple[int, str]] = []
    body = {"model": "policy", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}

    async def keep_asking() -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            while True:
                answer = await client.post(f"{url}/v1/chat/completions", json=body)
                answers.append((answer.status_code, answer.headers.get("x-vcot-checkpoint", "")))

    task = asyncio.create_task(keep_asking())
    try:
        yield answers
        count = len(answers)
        while len(answers) < count + 5:  # noqa: ASYNC110 - another task's
            await asyncio.sleep(0.01)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("replicas", [1, 2])
async def test_measuring_moves_no_alias_and_nobody_else_meets_it(small: Run, tmp_path: Path, replicas: int) -> None:
    """`vcot eval base` and `vcot sample` while others use the policy: not one answer of the base to them."""
    with open_run(small.directory, None, [f"serve.replicas={replicas}"]) as run:
        async with running_gateway(run, lambda _: None) as gateway:
            await register(gateway.url, write_checkpoint(tmp_path / "tuned", "tuned", 2.0))
            await swap_to(gateway.url, "policy", "tuned")
            before = await fetch_state(gateway.url)
            async with asking(gateway.url) as answers, Session(run, Terminal()) as session:
                await commands.evaluate(session, ["base"])
                await sample_stage(list_rounds(session)[-1])
                assert session.counts[-1].ok == 8
            after = await fetch_state(gateway.url)
    assert {name for status, name in answers if status == 200} == {"tuned"}
    assert {status for status, _ in answers} <= ({200} if replicas == 2 else {200, 503})
    assert answers[-1] == (200, "tuned")
    assert (after.aliases, after.live) == (before.aliases, before.live)
    assert [replica.num_restarts for replica in after.replicas] == [0] * replicas


@pytest.mark.parametrize("replicas", [1, 2])
async def test_what_two_replicas_hold_is_evaluated_at_once_and_with_one_in_turn(
    small: Run, tmp_path: Path, replicas: int
) -> None:
    """Either way each is asked all of it, and what is live stays."""
    with open_run(small.directory, None, [f"serve.replicas={replicas}"]) as run:
        async with running_gateway(run, lambda _: None) as gateway, Session(run, Terminal()) as session:
            while len([r for r in (await fetch_state(gateway.url)).replicas if r.serves]) < replicas:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            base, told = session.base, list[str]()
            tuned = session.registry.register(write_checkpoint(tmp_path / "tuned", "tuned", 2.0))
            session.report = lambda event: told.append(event.text) if isinstance(event, Said) else None
            await eval_stage(session, [base, tuned], "test")
            assert {count.stage for count in session.counts} == {"eval base", "eval tuned"}
            assert all(count.ok == count.requested > 0 for count in session.counts)
            assert ("base, tuned are served side by side" in told) == (replicas == 2)
            assert (await live_checkpoint(gateway.url)).name == "base"
            scores = load_scores(session, [base, tuned], "test")["true"]
            assert {score.checkpoint for score in scores} == {base.ref.digest, tuned.ref.digest}


async def test_the_loops_swap_is_a_step_of_its_own(
    small: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of its own gateway; one that serves another run is left as it is."""
    async with running_gateway(small, lambda _: None) as gateway, Session(small, Terminal()) as session:
        tuned = session.registry.register(write_checkpoint(tmp_path / "tuned", "tuned", 2.0))
        with open_run(
            tmp_path / "other", "nano", [f"model.source={tmp_path / 'base'}", f"serve.url={gateway.url}"]
        ) as other:
            async with Session(other, Terminal()) as guest:
                await swap_stage(guest, tuned)
        assert "left as it was" in capsys.readouterr().err
        assert (await live_checkpoint(gateway.url)).name == "base"
        for said in ("tuned is live at", "it does already"):
            await swap_stage(session, tuned)
            err = capsys.readouterr().err
            assert said in err
            assert "by vLLM" not in err, "nothing is started"
        assert (await live_checkpoint(gateway.url)).name == "tuned"


async def test_a_trial_that_an_operator_ends_is_begun_again(
    small: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the swap did stays."""
    async with running_gateway(small, lambda _: None) as gateway, Session(small, Terminal()) as session:
        made = session.registry.inspect(write_checkpoint(tmp_path / "made", "made", 3.0))  # not registered
        await register(gateway.url, write_checkpoint(tmp_path / "tuned", "tuned", 2.0))
        turns: list[str] = []

        async def ask(client: ChatClient) -> str:
            if not turns:
                await swap_to(gateway.url, "policy", "tuned")
            turns.append("")
            return await measure_with(client, made)

        assert (await session.measure(made, ask), len(turns)) == ("yes", 2)
        assert "made is not served any more" in capsys.readouterr().err
        state = await fetch_state(gateway.url)
        assert (state.aliases["policy"], state.live and state.live.name) == ("tuned", "tuned")


async def test_two_commands_that_measure_over_one_gateway_take_turns(
    small: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (write_checkpoint(tmp_path / name, name, weight) for name, weight in (("one", 2.0), ("two", 3.0)))
    async with running_gateway(small, lambda _: None) as gateway:
        with open_run(
            tmp_path / "other", "nano", [f"model.source={tmp_path / 'base'}", f"serve.url={gateway.url}"]
        ) as other:
            async with Session(small, Terminal()) as mine, Session(other, Terminal()) as theirs:
                theirs.trials = replace(theirs.trials, poll_s=0.05)
                one, two = mine.registry.inspect(first), theirs.registry.inspect(second)

                async def ask(client: ChatClient) -> str:
                    waiting = asyncio.create_task(measure(theirs, two))
                    while "one is on trial for another" not in capsys.readouterr().err:  # noqa: ASYNC110 - what is said
                        await asyncio.sleep(0.02)
                    assert await measure_with(client, one) == "yes"
                    tasks.append(waiting)
                    return "done"

                tasks: list[asyncio.Task[str]] = []
                assert await mine.measure(one, ask) == "done"
                assert await tasks[0] == "yes"
                both = await asyncio.gather(measure(mine, mine.base), measure(theirs, theirs.base))
                assert both == ["yes", "yes"]  # of one checkpoint at once
        assert (await live_checkpoint(gateway.url)).name == "base"


@pytest.mark.slow
async def test_a_command_that_is_stopped_while_a_trial_begins_holds_nobody_up(small: Run, tmp_path: Path) -> None:
    first, second = (write_checkpoint(tmp_path / name, name, weight) for name, weight in (("one", 2.0), ("two", 3.0)))
    async with running_gateway(small, lambda _: None) as gateway:
        settings = [f"model.source={tmp_path / 'base'}", f"serve.url={gateway.url}"]
        with open_run(tmp_path / "other", "nano", settings) as other:
            async with Session(small, Terminal()) as mine, Session(other, Terminal()) as theirs:
                one, two = theirs.registry.inspect(first), mine.registry.inspect(second)
                for delay_s in (0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16):
                    trials = replace(theirs.trials, owner=f"stopped after {delay_s}")
                    stopped = asyncio.create_task(trials.measure(one, lambda _: asyncio.sleep(60)))
                    await asyncio.sleep(delay_s)
                    stopped.cancel()
                    await asyncio.wait([stopped])
                    async with asyncio.timeout(20):
                        assert await measure(mine, two) == "yes"


@pytest.fixture
def stopping(run: Run) -> Run:
    with open_run(run.directory, None, ["serve.while_training=stop"]) as opened:
        return opened


async def test_a_run_trains_without_its_server_and_starts_none_for_that(stopping: Run) -> None:
    async with Session(stopping, Terminal()) as session:
        async with session.at_rest():
            assert not (stopping.directory / "serving.json").exists()
        url = await session.gateway.open()
        async with session.at_rest():
            assert (await fetch_state(url)).phase == "resting"
            assert not processes(str(session.base.directory)), "the server is gone"
        assert (await live_checkpoint(url)).name == "base"
        with pytest.raises(ServerError, match="trainer"):
            async with session.at_rest():
                raise ServerError("the trainer ended with 1")
        assert await measure(session, session.base) == "yes"  # the next that asks need not wait for the lease


async def test_a_command_that_finds_servers_at_rest_wakes_them(stopping: Run) -> None:
    """Whoever had them rest is gone, since one command works on a run at a time."""
    async with running_gateway(stopping, lambda _: None) as gateway:
        async with Session(stopping, Terminal()) as session:
            assert session.gateway.find() == gateway.url
        await rest(gateway.url, "stop", 60.0)
        assert (await fetch_state(gateway.url)).live is None
        async with running_gateway(stopping, lambda _: None) as same:
            assert (await live_checkpoint(same.url)).name == "base"


async def test_a_rest_whose_command_was_killed_is_ended_by_the_gateway(stopping: Run) -> None:
    async with running_gateway(stopping, lambda _: None) as gateway:
        await rest(gateway.url, "stop", 0.2)
        async with asyncio.timeout(30):
            while (await fetch_state(gateway.url)).phase != "live":  # noqa: ASYNC110 - another process's state
                await asyncio.sleep(0.05)
        assert any("asks for it no more" in warning for warning in (await fetch_state(gateway.url)).warnings)


async def test_what_keeps_its_server_is_not_held_up(run: Run) -> None:
    """As every run on a CPU, where a start takes long and nothing is gained."""
    async with Session(run, Terminal()) as session:
        url = await session.gateway.open()
        async with session.at_rest():
            assert (await live_checkpoint(url)).name == "base"


async def test_the_steps_of_a_run_bear_its_key(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCOT_API_KEYS", "other,secret")
    async with Session(run, Terminal()) as session:
        with pytest.raises(RequestError, match="HTTP 401"):
            await measure(session, session.base)
        monkeypatch.setenv("VCOT_API_KEY", "secret")
        assert await measure(session, session.base) == "yes"


async def test_a_gateway_ends_with_a_parent_that_is_killed(run: Run) -> None:
    code = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom vcot.services.run.directory import open_run\n"
        "from vcot.services.run.serving import running_gateway\n"
        "async def main():\n"
        "    with open_run(Path(sys.argv[1])) as run:\n"
        "        async with running_gateway(run, lambda _: None) as gateway:\n"
        "            print(gateway.url, flush=True)\n"
        "            await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(run.directory), stdout=-1)
    assert parent.stdout is not None
    url = (await parent.stdout.readline()).decode().strip()
    gateway = (await fetch_state(url)).pid
    parent.kill()
    await parent.wait()
    assert await gone(gateway)
    assert not (run.directory / "serving.json").exists()


async def test_a_gateway_that_is_killed_leaves_no_server_and_no_lock(run: Run) -> None:
    async with running_gateway(run, lambda _: None) as gateway:
        pid = (await fetch_state(gateway.url)).pid
        os.kill(pid, signal.SIGKILL)
        assert await gone(pid)
    assert (run.directory / "serving.json").exists()  # stale, and known to be
    async with running_gateway(run, lambda _: None) as again:
        assert again.started_here


async def test_a_port_in_use_is_said_before_anything_is_loaded(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            open_run(run.directory, None, [f"serve.port={port}"]) as busy,
            pytest.raises(MachineError, match=rf"port {port} on 127\.0\.0\.1 cannot be used.*serve\.port"),
        ):
            async with running_gateway(busy, lambda _: None):
                pass
    assert not (run.directory / "logs" / "vllm.log").exists()
    assert not (run.directory / "serving.json").exists()


def test_who_looks_whether_a_run_is_served_keeps_no_gateway_from_starting(run: Run) -> None:
    assert not is_served(run)
    assert not (run.directory / "serving.lock").exists(), "to look makes no file"
    with (run.directory / "serving.lock").open("w") as looked:
        fcntl.flock(looked, fcntl.LOCK_SH)
        assert not is_served(run)
        threading.Timer(0.1, lambda: fcntl.flock(looked, fcntl.LOCK_UN)).start()
        with only_gateway(run):
            assert is_served(run)


async def test_in_the_place_of_a_gateway_that_ends_another_is_started(run: Run) -> None:
    """It holds the run still, and may or may not be announced yet."""
    for announced in (False, True):
        with run.path("serving.lock").open("w") as ending:
            fcntl.flock(ending, fcntl.LOCK_EX)
            if announced:
                write_record(run.path("serving.json"), Serving(url="http://127.0.0.1:1", pid=1))
            said: list[str] = []

            def hear(message: str, ending: IO[str] = ending, said: list[str] = said) -> None:
                said.append(message)
                fcntl.flock(ending, fcntl.LOCK_UN)

            async with running_gateway(run, hear) as gateway:
                assert gateway.started_here
                assert (await live_checkpoint(gateway.url)).name == "base"
        assert said[:2] == ["waiting for the gateway", "starting the gateway"]


HOLDER = """
import asyncio, sys
from pathlib import Path
from vcot.services.run.directory import open_run
from vcot.services.run.serving import running_gateway

async def hold():
    with open_run(Path(sys.argv[1])) as run:
        async with running_gateway(run, lambda _: None):
            print("up", flush=True)
            await asyncio.sleep(600)

asyncio.run(hold())
"""


@pytest.mark.parametrize("delay_s", [0, 0.1, 0.3])
async def test_a_command_right_after_one_that_was_killed_goes_on(run: Run, delay_s: float) -> None:
    """A server that takes a while to end keeps the killed command's gateway up for as long."""
    killed = await asyncio.create_subprocess_exec(sys.executable, "-c", HOLDER, str(run.directory), stdout=-1)
    assert killed.stdout is not None
    assert await killed.stdout.readline() == b"up\n"
    killed.kill()
    await killed.wait()
    await asyncio.sleep(delay_s)
    async with running_gateway(run, lambda _: None) as gateway:
        assert gateway.started_here
        await asyncio.sleep(1)
        assert (await live_checkpoint(gateway.url)).name == "base"


async def test_a_gateway_whose_command_was_killed_is_not_used_even_before_it_knows(run: Run) -> None:
    """The keeper, which would tell it, is stopped: as on a busy machine, for a moment."""
    killed = await asyncio.create_subprocess_exec(sys.executable, "-c", HOLDER, str(run.directory), stdout=-1)
    assert killed.stdout is not None
    assert await killed.stdout.readline() == b"up\n"
    gateway = Serving.model_validate_json(run.path("serving.json").read_bytes())
    keeper = int(Path(f"/proc/{gateway.pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert find_gateway(run) == gateway.url
    os.kill(keeper, signal.SIGSTOP)
    killed.kill()
    await killed.wait()
    try:
        assert await live_checkpoint(gateway.url)
        assert is_served(run)
        assert find_gateway(run) is None
    finally:
        os.kill(keeper, signal.SIGCONT)
    async with running_gateway(run, lambda _: None) as again:
        assert again.started_here


async def test_serving_again_waits_for_the_gateway_that_ends(run: Run) -> None:
    """One that was announced is told at once, with where it is (expect_second_refused)."""
    with run.path("serving.lock").open("w") as ending:
        fcntl.flock(ending, fcntl.LOCK_EX)
        threading.Timer(1.5, lambda: fcntl.flock(ending, fcntl.LOCK_UN)).start()
        with only_gateway(run):
            assert is_served(run)


async def test_a_host_that_is_not_ours_is_said(run: Run) -> None:
    with (
        open_run(run.directory, None, ["serve.host=192.0.2.99"]) as elsewhere,
        pytest.raises(MachineError, match=r"192\.0\.2\.99"),
    ):
        async with running_gateway(elsewhere, lambda _: None):
            pass


async def test_a_server_that_does_not_start_gives_its_log(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_STUB_MODE", "die")
    with pytest.raises(ServerError, match=r"ended with status 3 while loading weights.*no such layer"):
        async with running_gateway(run, lambda _: None):
            pass


async def test_a_missing_checkpoint_is_the_users_error(run: Run, tmp_path: Path) -> None:
    with (
        open_run(tmp_path / "other", "nano", [f"model.source={tmp_path}/none", "serve.port=0"]) as missing,
        pytest.raises(CheckpointError, match="no directory"),
    ):
        async with running_gateway(missing, lambda _: None):
            pass


async def test_a_bug_in_the_housekeeping_ends_neither_it_nor_the_gateway() -> None:
    calls = 0
    goes_on = asyncio.Event()

    async def work() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyError("x")
        goes_on.set()

    task = asyncio.create_task(_persist(work, pause_s=0.0))
    await asyncio.wait_for(goes_on.wait(), 5)
    assert not task.done()
    task.cancel()


async def test_no_key_is_in_vllms_environment_in_a_command_line_or_in_a_file(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (
        "VCOT_API_KEYS",
        "VCOT_ADMIN_KEY",
        "VCOT_API_KEY",
        "OPENAI_API_KEY",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "VLLM_API_KEY",
    )
    keys = {name: f"secret-{name.lower()}" for name in names}
    for name, key in keys.items():
        monkeypatch.setenv(name, key)
    async with running_gateway(run, lambda _: None) as gateway, httpx.AsyncClient(trust_env=False) as http:
        state = await fetch_state(gateway.url)
        for key in (*keys.values(), "secret-wrong"):
            body = {"model": "policy", "messages": [{"role": "user", "content": "hello"}]}
            url, bearer = f"{gateway.url}/v1/chat/completions", {"authorization": f"Bearer {key}"}
            await http.post(url, json=body, headers=bearer)
            await http.post(f"{gateway.url}/admin/swap", json={}, headers=bearer)
        below = list(descendants(state.pid))
        assert below
        for pid in below:
            assert b"secret-" not in Path(f"/proc/{pid}/environ").read_bytes()
        for pid in (state.pid, *below):
            assert b"secret-" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    files = [path for path in run.directory.rglob("*") if path.is_file()]
    assert any(path.name == "gateway.log" and path.stat().st_size for path in files)
    assert not [path for path in files if b"secret-" in path.read_bytes()]


def descendants(pid: int) -> Iterator[int]:
    for child in children(pid):
        yield child
        yield from descendants(child)
