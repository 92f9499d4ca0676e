"""A vLLM server that someone else runs: waited for, asked, reloaded in place; never started or stopped.

It must be reachable by the gateway only, and be started by `vcot engine`, or with

    VLLM_SERVER_DEV_MODE=1 ... --served-model-name vcot

(and, to sleep while something trains, `--enable-sleep-mode`; to take adapters, `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True ...
--enable-lora --max-lora-rank N`), and see the checkpoints' directories under the same paths as the gateway does.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import httpx

from vcot.pipeline.errors import ServerError
from vcot.services.engine.vllm import HEALTH_TIMEOUT_S, Endpoint, Progress
from vcot.services.gateway.admin import PROXY_STATUSES, is_absent, told
from vcot.services.gateway.http.answers import REQUEST_ID

_POLL_S = 0.5
_SAY_EVERY_S = 10.0
_REMEDY = "take it away, and give the address of vLLM itself (serve.upstreams, `vcot replicas add`)"


@dataclass(frozen=True)
class RemoteServer:
    """Implements vcot.services.gateway.fleet.replica.Server."""

    url: str
    start_timeout_s: float
    checkpoint: None = None
    """What it holds is for the canary to say."""

    @property
    def endpoint(self) -> Endpoint:
        """Where it answers."""
        return Endpoint(self.url)

    async def start(self, progress: Progress) -> None:
        """Wait until it answers. Raises ServerError where that takes too long, and at once where it is no vLLM."""
        began = said_at = time.monotonic()
        progress(f"waiting for vLLM at {self.url}")
        async with self.endpoint.client(HEALTH_TIMEOUT_S) as client:
            while not await _is_vllm(client, self.url):
                now = time.monotonic()
                if now - began > self.start_timeout_s:
                    raise ServerError(
                        f"vLLM at {self.url} did not answer within serve.start_timeout_s = {self.start_timeout_s:.0f} s; "
                        "start it, or take it out of serve.upstreams"
                    )
                if now - said_at >= _SAY_EVERY_S:
                    progress(f"waiting for vLLM at {self.url}, {now - began:.0f} s")
                    said_at = now
                await asyncio.sleep(_POLL_S)

    async def wait(self) -> ServerError:
        """Its end is seen from outside only (services/gateway/fleet/health.py)."""
        await asyncio.Event().wait()
        raise AssertionError

    async def stop(self) -> None:
        """It is not ours to stop."""


async def _is_vllm(client: httpx.AsyncClient, url: str) -> bool:
    """Whether a vLLM server says there that it is well. Raises ServerError where something else answers."""
    try:
        health = await client.get("/health")
    except httpx.HTTPError as error:
        if is_absent(error):
            return False
        raise ServerError(f"what answers at {url} speaks no HTTP ({error}); {_REMEDY}") from None
    if REQUEST_ID in health.headers and health.content:  # vLLM's answer is empty
        raise ServerError(f"{url} is a gateway, and no vLLM server; {_REMEDY}")
    if health.status_code in PROXY_STATUSES:
        return False
    if health.status_code != 200 or health.content:
        raise ServerError(f"no vLLM server answers: {told(health)}; {_REMEDY}")
    return True
