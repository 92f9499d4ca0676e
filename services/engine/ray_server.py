"""A vLLM server on a node of a Ray cluster: Ray finds the node, and the gateway supervises it as it does one of its own.

Model: an actor holds the GPUs that the server takes, and runs it on the node that Ray chose, on TCP; it ends with this
process, and the server with it. Whoever wants a server again (services/gateway/fleet/replica.py) makes another actor, which
Ray puts where there is room: so what a lost node did is done elsewhere.

Limits: run directory and checkpoints lie under the same paths on all nodes (shared storage), vcot is installed there, and
nobody but the gateway may reach the nodes' ports: a server's development endpoints allow arbitrary calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vcot.pipeline.errors import MachineError, ServerError
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.engine.command import Address
from vcot.services.engine.installing import tell_install
from vcot.services.engine.serve_section import ServeSection
from vcot.services.engine.vllm import Endpoint, Progress, VllmServer

_POLL_S = 1.0
_SAY_EVERY_S = 10.0
_STOP_S = 15.0
_CONNECTING = threading.Lock()


class Host:
    """The actor: one server on its node, from its start to its end."""

    def __init__(self, server: VllmServer, has_gpus: bool) -> None:
        self._server = replace(server, devices=os.environ.get("CUDA_VISIBLE_DEVICES") if has_gpus else None)
        self._said = ""

    async def start(self) -> str:
        """Where the server answers, once it does. Raises ServerError and MachineError."""
        import ray

        address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._server = replace(self._server, address=Address(address, _free_port(address)))
        await self._server.start(self._hear)
        return self._server.endpoint.base_url

    def _hear(self, message: str) -> None:
        self._said = message

    async def said(self) -> str:
        """What it does while it starts."""
        return self._said

    async def wait(self) -> str:
        """How it died, once it has."""
        return str(await self._server.wait())

    async def stop(self) -> None:
        """End it."""
        await self._server.stop()


def _free_port(address: str) -> int:
    with socket.create_server((address, 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass
class RayServer:
    """Implements vcot.services.gateway.fleet.replica.Server; used by one task."""

    checkpoint: Checkpoint
    serve: ServeSection
    log: Path
    """On the storage that the nodes share."""
    max_lora_rank: int | None = None
    _actor: Any = None
    _is_placed: bool = False
    """Whether the actor is on a node, where a server may run."""
    _url: str | None = None

    @property
    def endpoint(self) -> Endpoint:
        """Where it answers once started."""
        if self._url is None:
            raise RuntimeError("the server was not started")
        return Endpoint(self._url)

    async def start(self, progress: Progress) -> None:
        """Have Ray place it, and wait until it answers. Raises ServerError, and MachineError where no cluster is there."""
        ray = await asyncio.to_thread(connect, str(self.serve.ray_address))
        gpus = self.serve.gpus_per_replica
        server = VllmServer(self.checkpoint, self.serve, self.log, max_lora_rank=self.max_lora_rank)
        host = ray.remote(Host).options(num_cpus=1, num_gpus=gpus, scheduling_strategy="SPREAD", max_concurrency=8)
        self._actor = host.remote(server, gpus > 0)
        starting = asyncio.ensure_future(_outcome(self._actor.start.remote()))
        try:
            await self._until_started(starting, progress, f"a node with {gpus} GPUs free" if gpus else "a free node")
            self._url = starting.result()
            self._is_placed = True
        except BaseException:
            starting.cancel()
            await self.stop()
            raise

    async def _until_started(self, starting: asyncio.Future[str], progress: Progress, what: str) -> None:
        """Raises ServerError where no node is found in time; the server itself knows how long it may take."""
        began = said_at = time.monotonic()
        said = ""
        asked = asyncio.ensure_future(_outcome(self._actor.said.remote()))  # answered as soon as a node is found
        try:
            while not (await asyncio.wait({starting}, timeout=_POLL_S))[0]:
                now = time.monotonic()
                if asked.done():
                    self._is_placed = True
                    message = asked.result() or "starting"
                    asked = asyncio.ensure_future(_outcome(self._actor.said.remote()))
                elif not self._is_placed:
                    message = f"waiting for {what} of the Ray cluster"
                    if now - began > self.serve.start_timeout_s:
                        raise ServerError(
                            f"the Ray cluster had no {what.removeprefix('a ')} within serve.start_timeout_s = "
                            f"{self.serve.start_timeout_s:.0f} s; see `ray status`, and lower serve.replicas or add nodes"
                        )
                if message != said or now - said_at >= _SAY_EVERY_S:
                    progress(message)
                    said, said_at = message, now
        finally:
            asked.cancel()

    async def wait(self) -> ServerError:
        """Wait until a started server has died, or its node; says how."""
        try:
            return ServerError(await _outcome(self._actor.wait.remote()))
        except ServerError as error:
            return error

    async def stop(self) -> None:
        """End it, and give its resources back; repeating it changes nothing."""
        actor, self._actor = self._actor, None
        if actor is None:
            return
        import ray

        if self._is_placed:
            with contextlib.suppress(ServerError, TimeoutError):  # it is gone, or is ended with its actor
                async with asyncio.timeout(_STOP_S):
                    await _outcome(actor.stop.remote())
        await asyncio.to_thread(ray.kill, actor)


async def _outcome(call: Any) -> str:
    """What an actor's method gives. Raises ServerError for what it raised, and where the actor is gone."""
    import ray

    try:
        return str(await call)
    except ray.exceptions.RayTaskError as error:
        raise ServerError(str(error.cause)) from None
    except ray.exceptions.RayError as error:
        raise ServerError(f"its node of the Ray cluster is gone ({type(error).__name__})") from None


def connect(address: str) -> Any:
    """Ray, connected to the cluster once for this process. Raises MachineError where it is not installed or not there."""
    os.environ.setdefault(
        "RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1"
    )  # it would take SIGTERM from whoever stops in order
    try:
        import ray
    except ImportError:
        raise MachineError(
            f"Ray is not installed, which serve.ray_address asks for; run {tell_install('ray')}"
        ) from None
    with _CONNECTING:
        if not ray.is_initialized():
            try:
                _look(address)
                ray.init(address=address, namespace="vcot", log_to_driver=False, logging_level=logging.ERROR)
            except (OSError, ValueError, RuntimeError) as error:
                raise MachineError(
                    f"no Ray cluster answers at serve.ray_address = {address!r} ({str(error)[:200]}); start one with "
                    "`ray start --head`, or give its HOST:PORT"
                ) from None
    return ray


def _look(address: str) -> None:
    """Raise OSError at once where nothing listens, which Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host:
        socket.create_connection((host, int(port)), timeout=10).close()
