"""One vLLM server as the gateway sees it: where requests go, and the development calls that change its weights.

aiohttp's client, since every image passes here and it is several times cheaper than httpx for bodies of 100 KB.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson

from pipeline.errors import ServerError
from pipeline.records import Canary
from services.gateway.canary import CanaryAnswer, canary_request, parse_canary
from services.vllm import SERVED_NAME, Endpoint

_JSON = {"content-type": "application/json"}
_ANSWER_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10)
_CONTROL_TIMEOUT = aiohttp.ClientTimeout(total=600, sock_connect=10)
UNREACHABLE = (aiohttp.ClientError, TimeoutError, OSError)
"""What the client raises when a server is not there, or goes away."""


class Upstream:
    """An open connection pool to one server. An async context manager."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._session: aiohttp.ClientSession | None = None
        self._control_session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = self._endpoint.session(_ANSWER_TIMEOUT)
        # vLLM closes a connection on which a development call failed: none is used twice.
        self._control_session = self._endpoint.session(_CONTROL_TIMEOUT, keep_alive=False)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for session in (self._session, self._control_session):
            if session is not None:
                await session.close()

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> Any:
        """A request on the way to the model; an async context manager that gives aiohttp's response."""
        return _opened(self._session).post(path, data=body, headers={**_JSON, **headers})

    async def reload(self, directory: Path) -> None:
        """Load the weights of `directory` into the running engine, in place. Raises ServerError."""
        await self._control("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}})

    async def flush_caches(self) -> None:
        """Forget whatever was computed with earlier weights. Raises ServerError."""
        answer = await self._control("/reset_prefix_cache")
        if answer.get("success") is not True:
            raise ServerError("vLLM did not reset its prefix cache: blocks are still held by requests")
        await self._control("/reset_mm_cache")
        await self._control("/reset_encoder_cache")

    async def ask(self, canary: Canary) -> CanaryAnswer:
        """The canary's answer. Raises ServerError."""
        return parse_canary(await self._control("/v1/chat/completions", canary_request(canary, SERVED_NAME)))

    async def _control(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = orjson.dumps(body) if body is not None else b""
        try:
            async with _opened(self._control_session).post(path, data=data, headers=_JSON) as response:
                text = await response.read()
        except UNREACHABLE as error:
            raise ServerError(f"vLLM did not answer {path}: {error!r}") from None
        if response.status != 200:
            raise ServerError(f"vLLM answered {path} with {response.status}: {text[:300].decode('utf-8', 'replace')}")
        answer = orjson.loads(text) if text else {}
        return answer if isinstance(answer, dict) else {}


def _opened(session: aiohttp.ClientSession | None) -> aiohttp.ClientSession:
    if session is None:
        raise RuntimeError("the upstream is not open")
    return session
