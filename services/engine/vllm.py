"""vLLM servers: one as a child process, from its start to its end, and where one answers.

Model: a server is started for one checkpoint directory and answers on a unix socket in a private (0700) directory, so that
nothing but this process's user can reach its development endpoints, which allow arbitrary calls. It lives under a keeper
(services/engine/lifeline.py) that ends it and its own children when this process goes, `kill -9` included. What it is doing
while it loads is read from its log. A server in a container of its own (`vcot engine`) is the same command on TCP; what
keeps others from its port is then the network that the container is on.

Limits: one host, one engine; checkpoint layouts are vLLM's business.
"""

from __future__ import annotations

import asyncio
import glob
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import httpx

from vcot.pipeline.errors import MachineError, ServerError
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.engine.command import Address, find_build, server_command, server_environment
from vcot.services.engine.lifeline import keeper_command
from vcot.services.engine.logs import bound
from vcot.services.engine.serve_section import ServeSection

Progress = Callable[[str], None]

_GRACE_S = 10.0
_SOCKET = "vllm.sock"
_MAX_SOCKET_PATH = 107
"""Bytes that Linux takes as a unix socket's path."""
_SOCKET_NAME = len("/vcot-12345678/") + 36
"""What follows the folder of the longest socket's path: our own directory, and a UUID, as vLLM's processes name theirs."""
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

    def readable(self, directory: Path) -> Path:
        """The path by which the server reads a checkpoint's directory: vLLM takes *, ? and [ in it for patterns.

        Where it holds one, a link beside the socket. Raises ServerError for a server that would not see that.
        """
        if _is_plain(str(directory)):
            return directory
        if self.socket is None:
            raise ServerError(
                f"vLLM cannot load {directory}, whose path holds *, ? or [, and the server at {self.base_url} is not ours; "
                "move the run to another path"
            )
        link = self.socket.with_name(hashlib.sha256(os.fsencode(directory)).hexdigest()[:12])
        if not link.is_symlink():
            link.symlink_to(directory.absolute())
        return link


def become_server(
    checkpoint: Checkpoint, serve: ServeSection, address: Address, *, devices: str | None, max_lora_rank: int | None
) -> NoReturn:
    """Replace this process by a server of `checkpoint`. Raises MachineError where vLLM is not installed."""
    build = find_build()
    directory = Endpoint(f"http://{address.host}:{address.port}").readable(checkpoint.directory)
    command = server_command(checkpoint, directory, serve, address, build, devices=devices, max_lora_rank=max_lora_rank)
    environment = server_environment(
        build,
        os.environ,
        _socket_folder(),
        serve,
        devices=devices,
        takes_adapters=max_lora_rank is not None,
    )
    os.execve(command[0], command, environment)  # noqa: S606 - a command of our own


def _is_plain(path: str) -> bool:
    return glob.escape(path) == path


def _socket_folder() -> Path:
    """A folder for sockets whose path leaves room for their names: TMPDIR's, else another. Raises MachineError."""
    folders = (tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp")  # noqa: S108 - the last resort
    for folder in filter(os.path.isabs, folders):
        is_short = len(os.fsencode(folder)) + _SOCKET_NAME <= _MAX_SOCKET_PATH
        if is_short and _is_plain(folder) and os.access(folder, os.W_OK | os.X_OK):
            return Path(folder)
    raise MachineError(
        f"no folder for vLLM's sockets: {', '.join(filter(None, folders))} are longer than "
        f"{_MAX_SOCKET_PATH - _SOCKET_NAME} bytes or cannot be written; set TMPDIR to a shorter one"
    )


@dataclass
class VllmServer:
    """A server from start to stop; used by one task."""

    checkpoint: Checkpoint
    serve: ServeSection
    log: Path
    devices: str | None = None
    max_lora_rank: int | None = None
    address: Address | None = None
    """Where it listens on TCP; without it, on a unix socket."""
    _directory: Path | None = None
    _process: asyncio.subprocess.Process | None = None
    _log_start: int = 0
    _began: float = field(default_factory=time.monotonic)

    @property
    def endpoint(self) -> Endpoint:
        """Where it answers once started."""
        if self._directory is None:
            raise RuntimeError("the server was not started")
        if self.address is not None:
            return Endpoint(f"http://{self.address.host}:{self.address.port}")
        return Endpoint("http://vllm", self._directory / _SOCKET)

    async def start(self, progress: Progress) -> None:
        """Start and wait until it answers, saying what it does. Raises ServerError, with the log's end, where it fails."""
        build = find_build()
        self._directory = Path(tempfile.mkdtemp(prefix="vcot-", dir=_socket_folder()))
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._began = time.monotonic()
        command = server_command(
            self.checkpoint,
            self.endpoint.readable(self.checkpoint.directory),
            self.serve,
            self.address or self._directory / _SOCKET,
            build,
            devices=self.devices,
            max_lora_rank=self.max_lora_rank,
        )
        environment = server_environment(
            build,
            os.environ,
            self._directory,
            self.serve,
            devices=self.devices,
            takes_adapters=self.max_lora_rank is not None,
        )
        bound(self.log)
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
            while True:
                elapsed = time.monotonic() - self._began
                phase = self._phase()
                if phase != said or elapsed - said_at >= _SAY_EVERY_S:
                    progress(f"vLLM: {phase}, {elapsed:.0f} s")
                    said, said_at = phase, elapsed
                if await is_healthy(client):
                    return
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
                log.seek(self._log_start if self._log_start <= self.log.stat().st_size else 0)  # it was set aside
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
