"""One vLLM server as the gateway sees it: where requests go, and the calls that change what it holds or ask how it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import orjson

from vcot.pipeline.errors import ServerError
from vcot.pipeline.manifest import Canary
from vcot.services.engine.command import SERVED_NAME
from vcot.services.engine.vllm import Endpoint
from vcot.services.gateway.swap.calibration import Calibration
from vcot.services.gateway.swap.canary_check import CanaryAnswer, canary_request, long_request, parse_canary
from vcot.services.gateway.swap.claim import Claim, Owner
from vcot.services.gateway.swap.fingerprint import Fingerprint

_JSON = {"content-type": "application/json"}
_CONTROL_TIMEOUT = httpx.Timeout(600.0, connect=10.0)
PULSE_TIMEOUT_S = 10.0
_NEEDED = (
    "VLLM_SERVER_DEV_MODE=1, to sleep --enable-sleep-mode, and for adapters --enable-lora and "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
)
_STARTED = re.compile(rb"^process_start_time_seconds (\S+)", re.MULTILINE)
_HITS = re.compile(rb"^vllm:prefix_cache_hits_total(?:\{[^}]*\})? (\S+)", re.MULTILINE)
_TOKENS = re.compile(rb"^vllm:(?:prompt|generation)_tokens_total(?:\{[^}]*\})? (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Pulse:
    """What a server's own metrics say of it."""

    started: bytes | None
    """When its process began; another value is another process."""
    num_tokens: float | None
    """Prompt and generated tokens so far; None where it does not count them."""


def parse_pulse(metrics: bytes) -> Pulse:
    """Read vLLM's /metrics."""
    started, tokens = _STARTED.search(metrics), _TOKENS.findall(metrics)
    return Pulse(started[1] if started else None, sum(map(float, tokens)) if tokens else None)


class Upstream:
    """The operator's way to one server. An async context manager."""

    def __init__(
        self, endpoint: Endpoint, calibration: Calibration, owner: Owner, lease_s: float, *, is_shared: bool
    ) -> None:
        """`owner`, `lease_s` and `is_shared` are those of its Claim."""
        self.pulse_timeout_s = PULSE_TIMEOUT_S
        """How long a look at its health may take."""
        self.calibration = calibration
        self.fingerprint: Fingerprint | None = None
        """Of what it was last verified to hold."""
        self.claim = Claim(self, owner, lease_s, is_shared)
        self.endpoint = endpoint
        """Where requests go."""
        self._client = endpoint.client(_CONTROL_TIMEOUT)
        self._loras: dict[str, set[int]] = {}
        """By model name, the engine's number of what was loaded for it."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    @property
    def tolerance(self) -> float:
        """How far a log-prob of a canary may be off."""
        return self.calibration.tolerance

    async def reload(self, directory: Path) -> None:
        """Load the weights of `directory` into the running engine, in place. Raises ServerError."""
        path = self.endpoint.readable(directory)
        await self._control("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(path)}})

    async def flush_caches(self) -> None:
        """Forget whatever was computed with earlier weights. Raises ServerError."""
        answer = await self._control("/reset_prefix_cache")
        if answer.get("success") is not True:
            raise ServerError("vLLM did not reset its prefix cache: blocks are still held by requests")
        await self._control("/reset_mm_cache")
        await self._control("/reset_encoder_cache")

    async def version(self) -> str:
        """The weight version, where the claim is written. Raises ServerError."""
        answer = await self._control("/weight_info", method="GET", timeout=self.pulse_timeout_s)
        return str(answer.get("weight_version"))

    async def set_version(self, version: str) -> None:
        """Replace it. Raises ServerError."""
        await self._control("/update_weight_version", {"new_version": version}, timeout=self.pulse_timeout_s)

    async def sleep(self) -> None:
        """Free the GPU's memory: the weights go to the machine's, what was cached is dropped. Raises ServerError."""
        await self._control("/sleep?level=1")

    async def wake_up(self) -> None:
        """Undo that; what is awake stays so. Raises ServerError."""
        if (await self._control("/is_sleeping", method="GET")).get("is_sleeping"):
            await self._control("/wake_up")

    async def load_adapter(self, model: str, directory: Path) -> None:
        """Serve the adapter in `directory` under that model name, beside its base. Raises ServerError."""
        if model in await self._models():
            return
        before = await self._list_loras()
        try:
            await self._control("/v1/load_lora_adapter", {"lora_name": model, "lora_path": str(directory)})
        finally:  # one that vLLM refuses half-way has its slot, too
            self._loras[model] = await self._list_loras() - before

    async def unload_adapter(self, model: str) -> None:
        """Serve it no longer; unloading what is not there changes nothing. Raises ServerError.

        vLLM's own call forgets the name, and its engine keeps the weights in their slot: they are taken out of it here.
        """
        if model in await self._models():
            await self._control("/v1/unload_lora_adapter", {"lora_name": model})
        for number in self._loras.pop(model, ()):
            await self._control("/collective_rpc", {"method": "remove_lora", "args": [number]})

    async def ask(self, canary: Canary, model: str = SERVED_NAME, salt: str | None = None) -> CanaryAnswer:
        """The canary's answer. Raises ServerError."""
        answer = await self._control("/v1/chat/completions", canary_request(canary, model, self.tolerance, salt))
        if answer.get("model") != model:
            raise ServerError(f"vLLM was asked for {model} and answered as {answer.get('model')}")
        return parse_canary(answer)

    async def checksums(self) -> dict[str, str]:
        """SHA-256 of each tensor that it holds, by rank and name; none where it cannot say. Raises ServerError."""
        answer = await self._control("/weight_checker", {"action": "checksum"}, may_fail=True)
        return {str(name): str(digest) for name, digest in answer.get("checksums", {}).items()}

    async def warm(self, canary: Canary) -> None:
        """Fill a few blocks of the prefix cache. Raises ServerError."""
        await self._control("/v1/chat/completions", long_request(canary, SERVED_NAME), may_fail=True)

    async def num_prefix_hits(self) -> float:
        """Tokens so far that came from the prefix cache. Raises ServerError."""
        metrics = (await self._request("GET", "/metrics", b"", _CONTROL_TIMEOUT)).content
        return sum(map(float, _HITS.findall(metrics)))

    async def pulse(self) -> Pulse | None:
        """How it is; None where it does not say in time, or is not well. Raises ServerError where nothing is there."""
        try:
            health = await self._client.get("/health", timeout=self.pulse_timeout_s)
            if health.status_code != 200:
                return None
            return parse_pulse((await self._client.get("/metrics", timeout=self.pulse_timeout_s)).content)
        except httpx.ConnectError as error:
            raise ServerError(
                f"nothing answers at {self.endpoint.socket or self.endpoint.base_url} ({error})"
            ) from None
        except httpx.HTTPError:
            return None

    async def is_sound(self) -> bool:
        """Whether the server itself says that it is well; one that was given up is not."""
        try:
            return not self._client.is_closed and await self.pulse() is not None
        except ServerError:
            return False

    async def _list_loras(self) -> set[int]:
        """The engine's numbers of the adapters that lie in it; none where it cannot say."""
        answer = await self._control("/collective_rpc", {"method": "list_loras"}, may_fail=True)
        return {int(number) for number in re.findall(r"\d+", str(answer.get("results", "")))}

    async def _models(self) -> set[str]:
        listed = await self._control("/v1/models", method="GET")
        return {str(card.get("id")) for card in listed.get("data", ())}

    async def _control(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        method: str = "POST",
        timeout: httpx.Timeout | float = _CONTROL_TIMEOUT,  # noqa: ASYNC109 - of the client
        *,
        may_fail: bool = False,
    ) -> dict[str, Any]:
        data = orjson.dumps(body) if body is not None else b""
        response = await self._request(method, path, data, timeout)
        if response.status_code != 200:
            if may_fail:
                return {}
            hint = f" (it needs {_NEEDED})" if response.status_code == 404 and not path.startswith("/v1/chat") else ""
            said = response.content[:300].decode("utf-8", "replace")
            raise ServerError(f"vLLM answered {path} with {response.status_code}: {said}{hint}")
        try:
            answer = orjson.loads(response.content or b"{}")
        except orjson.JSONDecodeError:  # a sentence
            return {}
        return answer if isinstance(answer, dict) else {}

    async def _request(self, method: str, path: str, data: bytes, timeout: httpx.Timeout | float) -> httpx.Response:  # noqa: ASYNC109
        try:
            return await self._client.request(method, path, content=data, headers=_JSON, timeout=timeout)
        except httpx.HTTPError as error:
            raise ServerError(f"vLLM did not answer {path}: {error!r}") from None
