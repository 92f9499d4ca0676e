"""A proxy before vLLM that does what a broken engine does: loads other files than it is told, or says done and does not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from aiohttp import web

from bench.engine import open_session
from vcot.services.engine.vllm import Endpoint


@dataclass
class Between:
    """The proxy before the engine. Its fields say what it does wrong."""

    socket: Path
    instead: dict[str, Path] = field(default_factory=dict)
    """What is loaded in place of a directory of that name."""
    skipped: frozenset[str] = frozenset()
    """Calls that it answers by itself."""
    url: str = ""
    _session: aiohttp.ClientSession | None = None

    async def pass_on(self, request: web.Request) -> web.Response:
        body, path = await request.read(), request.path
        if path in self.skipped:
            return web.json_response({"success": True})
        if path in ("/collective_rpc", "/v1/load_lora_adapter") and self.instead:
            for right, wrong in self.instead.items():
                body = body.replace(right.encode(), str(wrong).encode())
        assert self._session is not None
        headers = {"content-type": "application/json"}
        try:
            async with self._session.request(request.method, request.path_qs, data=body, headers=headers) as answered:
                kind = answered.headers.get("content-type", "").partition(";")[0] or "application/json"
                return web.Response(body=await answered.read(), status=answered.status, content_type=kind)
        except aiohttp.ClientError:
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=502)

    async def reach(self, socket: Path) -> None:
        """From now on, the engine there."""
        old, self.socket = self._session, socket
        self._session = open_session(Endpoint("http://vllm", socket))
        if old is not None:
            await old.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{tail:.*}", self.pass_on)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        await self.reach(self.socket)
        try:
            yield
        finally:
            await runner.cleanup()
            assert self._session is not None
            await self._session.close()
