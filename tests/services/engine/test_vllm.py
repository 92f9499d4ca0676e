import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.services.fake_vllm import install_stub, write_checkpoint
from vcot.pipeline.errors import CheckpointError, MachineError, ServerError
from vcot.services.checkpoints.registry import Checkpoint, Registry
from vcot.services.cli import server_commands
from vcot.services.engine import vllm
from vcot.services.engine.command import Address, find_build, server_command, server_environment
from vcot.services.engine.lifeline import keeper_command
from vcot.services.engine.serve_section import ServeSection
from vcot.services.engine.vllm import Endpoint, VllmServer
from vcot.services.run.directory import open_run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Registry(tmp_path / "run").register(write_checkpoint(tmp_path / "tuned", "tuned", 2.0))


@pytest.fixture
def server(tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> VllmServer:
    install_stub(tmp_path / "stub")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    return VllmServer(checkpoint, ServeSection(dtype="float32"), tmp_path / "logs" / "vllm.log")


def processes(mark: str) -> list[int]:
    """Process ids whose command line holds `mark`; zombies have none."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark in (entry / "cmdline").read_bytes().decode("utf-8", "replace"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return [pid for pid in found if pid != os.getpid()]


def until(is_so: Callable[[], bool], limit_s: float = 10.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)
    return is_so()


SOCKETS = Path("/private")


def plain_command(
    checkpoint: Checkpoint, serve: ServeSection, build: Literal["cpu", "cuda"] = "cpu", **options: Any
) -> list[str]:
    return server_command(checkpoint, checkpoint.directory, serve, Path("/s"), build, **options)


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_command_for_a_cpu(checkpoint: Checkpoint) -> None:
    serve = ServeSection(dtype="float32", max_model_len=512, max_in_flight=8, kv_cache_gib=0.5)
    command = server_command(checkpoint, checkpoint.directory, serve, Path("/private/s"), "cpu")
    assert option(command, "--dtype") == "float32"
    assert option(command, "--uds") == "/private/s"
    assert option(command, "--generation-config") == "vllm"
    assert option(command, "--chat-template-content-format") == "openai", "in parts, as in training"
    assert json.loads(option(command, "--limit-mm-per-prompt")) == {"image": 1, "video": 0, "audio": 0}
    assert option(command, "--max-model-len") == "512"
    assert option(command, "--max-num-batched-tokens") == str(8 * 512), "the images of all in flight fit into one step"
    assert option(command, "--kv-cache-memory-bytes") == str(2**29)
    assert {"--enforce-eager", "--no-enable-chunked-prefill"} < set(command)
    assert "--chat-template" not in command
    assert not {"--port", "--host"} & set(command)
    assert option(command, "--allowed-media-domains") == "none.invalid"
    serve = ServeSection(allowed_image_hosts=("img.org:8443",))
    assert option(plain_command(checkpoint, serve), "--allowed-media-domains") == "img.org"


def test_the_command_for_a_gpu(checkpoint: Checkpoint) -> None:
    mended = Checkpoint(checkpoint.directory, checkpoint.manifest, Path("/mended.jinja"))
    serve = ServeSection(gpu_memory_utilization=0.45)
    command = server_command(mended, mended.directory, serve, Path("/s"), "cuda")
    assert command[1:6] == ["-P", "-m", "vllm.entrypoints.cli.main", "serve", str(mended.directory)]
    assert option(command, "--gpu-memory-utilization") == "0.45"
    assert option(command, "--chat-template") == "/mended.jinja"
    assert not {"--enforce-eager", "--no-enable-chunked-prefill", "--kv-cache-memory-bytes"} & set(command)


@pytest.mark.parametrize("way", ["auto", "sleep", "stop", "keep"])
def test_sleep_mode_is_asked_for_where_it_is_wanted_and_there(checkpoint: Checkpoint, way: str) -> None:
    serve = ServeSection(while_training=way)
    assert ("--enable-sleep-mode" in plain_command(checkpoint, serve, "cuda")) == (way in ("auto", "sleep"))
    assert "--enable-sleep-mode" not in plain_command(checkpoint, serve, "cpu"), "the CPU build refuses it"


def test_devices_and_adapters_are_asked_for_where_they_are_wanted(checkpoint: Checkpoint) -> None:
    serve = ServeSection()
    assert not {"--enable-lora", "--tensor-parallel-size"} & set(plain_command(checkpoint, serve, "cuda"))
    command = plain_command(checkpoint, serve, "cuda", devices="2,3", max_lora_rank=12)
    assert (option(command, "--tensor-parallel-size"), option(command, "--max-lora-rank")) == ("2", "16")
    assert "--enable-lora" in command
    given = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in server_environment("cuda", given, SOCKETS, ServeSection())
    result = server_environment("cuda", given, SOCKETS, ServeSection(), devices="2,3", takes_adapters=True)
    assert (result["CUDA_VISIBLE_DEVICES"], result["VLLM_ALLOW_RUNTIME_LORA_UPDATING"]) == ("2,3", "True")


def test_the_environment_keeps_what_the_user_set_for_speed_only() -> None:
    given = {
        "OMP_NUM_THREADS": "7",
        "MALLOC_ARENA_MAX": "8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "VLLM_SERVER_DEV_MODE": "0",
    }
    given |= {"VLLM_MEDIA_URL_ALLOW_REDIRECTS": "1", "VLLM_ATTENTION_BACKEND": "TORCH_SDPA"}
    result = server_environment("cpu", given, SOCKETS, ServeSection())
    assert (result["OMP_NUM_THREADS"], result["MALLOC_ARENA_MAX"]) == ("7", "8")
    assert server_environment("cpu", {}, SOCKETS, ServeSection())["MALLOC_ARENA_MAX"] == "2"
    assert result["VLLM_ATTENTION_BACKEND"] == "TORCH_SDPA"
    assert result["VLLM_SERVER_DEV_MODE"] == "1"
    assert result["VLLM_NO_USAGE_STATS"] == "1"
    assert "PYTHONDONTWRITEBYTECODE" not in result, "without .pyc files each process compiles 15 s of imports anew"
    assert result["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert result["VLLM_MAX_IMAGE_PIXELS"] == "50000000"
    assert "OMP_NUM_THREADS" not in server_environment("cuda", {}, SOCKETS, ServeSection())


@pytest.mark.parametrize("build", ["cpu", "cuda"])
def test_a_server_is_given_no_key_of_any_name(build: Literal["cpu", "cuda"]) -> None:
    named = ("VCOT_API_KEYS", "VCOT_ADMIN_KEY", "VCOT_API_KEY", "OPENAI_API_KEY", "VLLM_API_KEY", "HF_TOKEN")
    named += ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "S3_SECRET_ACCESS_KEY", "SOME_JUDGES_KEY", "GITHUB_TOKEN")
    needed = {"PATH": "/bin", "HOME": "/h", "LD_LIBRARY_PATH": "/l", "CUDA_HOME": "/c", "NCCL_SOCKET_IFNAME": "lo"}
    result = server_environment(build, dict.fromkeys(named, "secret") | needed, SOCKETS, ServeSection())
    assert "secret" not in result.values()
    assert needed.items() <= result.items()


def test_a_proxy_is_passed_only_where_images_are_fetched() -> None:
    """Its address may hold a password."""
    given = {"https_proxy": "http://user:password@proxy:3128", "SSL_CERT_FILE": "/ca.pem"}
    assert not given.items() & server_environment("cuda", given, SOCKETS, ServeSection()).items()
    assert (
        given.items()
        <= server_environment("cuda", given, SOCKETS, ServeSection(allowed_image_hosts=("img.org",))).items()
    )


@pytest.mark.parametrize("build", ["cpu", "cuda"])
def test_nothing_of_the_server_listens_off_this_machine(build: Literal["cpu", "cuda"]) -> None:
    result = server_environment(
        build, {"VLLM_HOST_IP": "10.0.0.7", "GLOO_SOCKET_IFNAME": "eth0"}, SOCKETS, ServeSection()
    )
    assert (result["VLLM_HOST_IP"], result["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")


def test_a_missing_vllm_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda _: None)
    with pytest.raises(MachineError, match="make setup"):
        find_build()


async def test_start_answers_on_a_private_socket_and_stop_leaves_nothing(server: VllmServer) -> None:
    said: list[str] = []
    await server.start(said.append)
    socket = server.endpoint.socket
    assert socket is not None
    assert socket.parent.stat().st_mode & 0o777 == 0o700
    assert said[0].startswith("vLLM: ")
    assert processes(str(socket))
    await server.stop()
    await server.stop()
    assert not processes(str(socket))
    assert not socket.parent.exists()


async def test_a_server_that_dies_while_loading_shows_why(
    server: VllmServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_STUB_MODE", "die")
    server.log.parent.mkdir()
    server.log.write_text("RuntimeError: of an earlier start\n")
    with pytest.raises(ServerError) as caught:
        await server.start(lambda _: None)
    first, *rest = str(caught.value).splitlines()
    assert first == (
        "vLLM with checkpoint tuned ended with status 3 while loading weights (ValueError: no such layer); "
        f"its log is {tmp_path}/logs/vllm.log, and ends:"
    )
    assert len(rest) == 3
    assert "earlier" not in str(caught.value)


async def test_a_server_that_hangs_is_ended_with_all_that_it_started(
    server: VllmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_STUB_MODE", "hang")
    server.serve = ServeSection(start_timeout_s=0.5)
    with pytest.raises(ServerError, match=r"was not ready after serve.start_timeout_s = 0 s|= 1 s"):
        await server.start(lambda _: None)
    assert not processes(str(server.endpoint.socket))


async def test_the_death_of_a_running_server_is_noticed(server: VllmServer) -> None:
    await server.start(lambda _: None)
    (victim,) = [pid for pid in processes(f"--uds\0{server.endpoint.socket}") if b"lifeline" not in cmdline(pid)]
    os.kill(victim, signal.SIGKILL)
    error = await asyncio.wait_for(server.wait(), 10)
    assert "died with status 137" in str(error)
    await server.stop()


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


ORPHANS = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", sys.argv[1]], start_new_session=True)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("victim", ["parent", "keeper"])
def test_nothing_outlives_a_parent_that_is_killed(tmp_path: Path, victim: str) -> None:
    """The command starts a child in a session of its own: both must go."""
    mark = str(tmp_path / "mark")
    inner = keeper_command([sys.executable, "-c", ORPHANS, mark], 1.0)
    parent_code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)\n"
        "print(p.stdout.readline().decode(), flush=True)\n"
        "print(p.pid, flush=True)\n"
        "p.wait(); time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_code, *inner], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline().strip() == "ready"
    parent.stdout.readline()
    keeper = int(parent.stdout.readline())
    assert until(lambda: len(processes(mark)) >= 3)
    os.kill(parent.pid if victim == "parent" else keeper, signal.SIGKILL)
    if victim == "keeper":  # the kernel ends the command; what it detached from itself is beyond reach then
        assert until(
            lambda: not any(ORPHANS.encode() in cmdline_or_empty(pid) for pid in processes(mark) if pid != parent.pid)
        )
        for pid in processes(mark):
            os.kill(pid, signal.SIGKILL)
        parent.kill()
    assert until(lambda: not processes(mark))
    parent.wait()
    parent.stdout.close()


def cmdline_or_empty(pid: int) -> bytes:
    try:
        return cmdline(pid)
    except OSError:
        return b""


def test_a_command_that_ignores_being_asked_is_killed(tmp_path: Path) -> None:
    mark = str(tmp_path / "mark")
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    stubborn = f"import signal, time; {ignore}; print('ready', flush=True); time.sleep(600)"
    command = keeper_command([sys.executable, "-c", stubborn, mark], 0.2)
    keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert keeper.stdout is not None
    assert keeper.stdin is not None
    keeper.stdout.readline()
    keeper.stdin.close()
    assert keeper.wait(10) == 128 + signal.SIGKILL
    keeper.stdout.close()
    assert not processes(mark)


def test_the_keeper_has_the_commands_status() -> None:
    keeper = subprocess.Popen(keeper_command([sys.executable, "-c", "raise SystemExit(3)"], 1.0), stdin=subprocess.PIPE)
    assert keeper.wait(10) == 3
    assert keeper.stdin is not None
    keeper.stdin.close()


def test_a_server_of_adapters_leaves_lm_head_as_it_is(checkpoint: Checkpoint) -> None:
    """vLLM 0.32's own choice wraps it, and then a request for `prompt_logprobs` ends the engine."""
    words = plain_command(checkpoint, ServeSection(), max_lora_rank=64)
    targets = words[words.index("--lora-target-modules") + 1 :]
    assert "q_proj" in targets
    assert "lm_head" not in targets


def test_on_a_cpu_the_last_slot_for_adapters_stays_empty(checkpoint: Checkpoint) -> None:
    """Its kernels apply that one to the base's tokens in a batch with an adapter's (`bgmv_*` index slots with -1)."""
    slots = [
        int(option(plain_command(checkpoint, ServeSection(), build, max_lora_rank=64), "--max-loras"))
        for build in ("cuda", "cpu")
    ]
    assert slots == [2, 8]  # of at most seven adapters that aliases mean at once


def test_a_server_of_its_own_is_the_same_command_on_tcp(checkpoint: Checkpoint) -> None:
    serve = ServeSection()
    on_tcp = server_command(checkpoint, checkpoint.directory, serve, Address("0.0.0.0", 8000), "cuda")
    on_socket = plain_command(checkpoint, serve, "cuda")
    at = on_tcp.index("--host")
    assert on_tcp[at : at + 4] == ["--host", "0.0.0.0", "--port", "8000"]
    assert [*on_tcp[:at], "--uds", "/s", *on_tcp[at + 4 :]] == on_socket


@pytest.mark.parametrize("is_prepared", [False, True])
def test_an_engine_only_reads_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_prepared: bool) -> None:
    directory = tmp_path / "run"
    base = write_checkpoint(tmp_path / "base", "seed", 1.0, kind="base")
    with open_run(directory, "nano", [f"model.source={base}"]) as run:
        if is_prepared:
            Registry(directory).base(run.recipe.model)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda _, command, __: became.append(command))
    if is_prepared:
        server_commands.engine(directory, "0.0.0.0", 8000, 0)
        assert option(became[0], "--model") == str(base)
    else:
        with pytest.raises(CheckpointError, match="run `vcot prepare` first"):
            server_commands.engine(directory, "0.0.0.0", 8000, 0)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


@pytest.mark.parametrize(("number", "devices"), [(0, "0,1"), (1, "2,3"), (2, "0,1")])
def test_an_engine_takes_the_devices_of_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, devices: str
) -> None:
    base = write_checkpoint(tmp_path / "base", "seed", 1.0, kind="base")
    with open_run(tmp_path / "run", "nano", [f"model.source={base}", "serve.devices=['0,1', '2,3']"]) as run:
        Registry(run.directory).base(run.recipe.model)
    became: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(vllm, "find_build", lambda: "cuda")
    monkeypatch.setattr(os, "execve", lambda _, command, environment: became.append((command, environment)))
    server_commands.engine(tmp_path / "run", "127.0.0.1", 8000, number)
    command, environment = became[0]
    assert option(command, "--tensor-parallel-size") == "2"
    assert environment["CUDA_VISIBLE_DEVICES"] == devices


def test_added_options_come_before_ours_which_count(checkpoint: Checkpoint) -> None:
    command = plain_command(checkpoint, ServeSection(extra_args=("--max-num-seqs", "64")))
    assert option(command, "--max-num-seqs") == "64"
    assert command.index("--max-num-seqs") < command.index("--served-model-name")


async def test_a_long_temporary_folder_is_no_place_for_a_socket(
    server: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux takes 107 bytes, and vLLM would say so after 20 s of imports."""
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    await server.start(lambda _: None)
    assert server.endpoint.socket is not None
    assert not server.endpoint.socket.is_relative_to(long)
    assert server.endpoint.socket.parent.stat().st_mode & 0o777 == 0o700
    await server.stop()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(MachineError, match="set TMPDIR to a shorter one"):
        await server.start(lambda _: None)


async def test_a_path_that_vllm_takes_for_a_pattern_is_given_by_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_stub(tmp_path / "stub")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    odd = write_checkpoint(tmp_path / "run [v2]*" / "tuned", "tuned", 2.0)
    checkpoint = Registry(tmp_path / "run").register(odd)
    server = VllmServer(checkpoint, ServeSection(dtype="float32"), tmp_path / "logs" / "vllm.log")
    await server.start(lambda _: None)
    assert not processes(str(odd))
    link = server.endpoint.readable(odd)
    assert (link.resolve(), "[" in str(link)) == (odd, False)
    assert server.endpoint.readable(tmp_path) == tmp_path
    await server.stop()
    assert odd.is_dir()
    with pytest.raises(ServerError, match="move the run to another path"):
        Endpoint("http://vllm:8000").readable(odd)
