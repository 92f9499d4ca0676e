"""A server that passes all on to another and counts chat completions: which task was asked how often, and answered."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
from aiohttp import web

_MAX_BODY_BYTES = 64 * 2**20
_OF_THE_CONNECTION = frozenset(("host", "connection", "content-length", "transfer-encoding", "content-encoding"))


def identify(content: list[dict[str, Any]]) -> str:
    """What names a task on the wire: its texts and images, in any order."""
    parts = sorted(part["text"] if part["type"] == "text" else part["image_url"]["url"] for part in content)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def identify_text(content: list[dict[str, Any]]) -> str:
    """The same for clients that write an image's file anew: its texts alone."""
    return identify([part for part in content if part["type"] == "text"])


@dataclass
class Meter:
    """Counts by task; `serve` adds to them, `reset` begins anew."""

    identify: Callable[[list[dict[str, Any]]], str] = identify
    """What names a task."""
    asked: Counter[str] = field(default_factory=Counter)
    """Requests."""
    answered: Counter[str] = field(default_factory=Counter)
    """Responses that were handed to the client's connection, all of a request or none."""
    num_tokens: int = 0
    """Of those responses."""
    first_at: float | None = None
    """When the first request came, by `time.perf_counter`."""
    last_at: float | None = None
    """When the last response was handed over."""
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)
    """Set from then on."""

    def reset(self) -> None:
        """Forget what was counted."""
        self.asked.clear()
        self.answered.clear()
        self.num_tokens = 0
        self.first_at = self.last_at = None
        self.has_begun.clear()

    @asynccontextmanager
    async def serve(self, upstream: str) -> AsyncIterator[str]:
        """Yield the URL of a server in front of `upstream`; a client that goes away is gone for the upstream, too."""
        async with aiohttp.ClientSession(
            upstream, auto_decompress=False, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout()
        ) as session:

            async def handle(request: web.Request) -> web.Response:
                return await self._pass_on(request, session)

            app = web.Application(client_max_size=_MAX_BODY_BYTES)
            app.router.add_route("*", "/{path:.*}", handle)
            runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
            await runner.setup()
            try:
                site = web.TCPSite(runner, "127.0.0.1", 0)
                await site.start()
                yield f"http://127.0.0.1:{runner.addresses[0][1]}"
            finally:
                await runner.cleanup()

    async def _pass_on(self, request: web.Request, session: aiohttp.ClientSession) -> web.Response:
        body = await request.read()
        task = self._read_task(body) if request.path.endswith("/chat/completions") else None
        if task is not None:
            self.asked[task] += 1
            self.first_at = self.first_at or time.perf_counter()
            self.has_begun.set()
        async with session.request(request.method, request.path_qs, data=body, headers=_keep(request)) as answer:
            text = await answer.read()
        passed = web.Response(status=answer.status, body=text, headers=_keep(answer))
        if task is not None and answer.status == 200:
            await passed.prepare(request)
            await passed.write_eof()
            completion = orjson.loads(text)
            self.last_at = time.perf_counter()
            self.answered[task] += len(completion["choices"])
            self.num_tokens += completion["usage"]["completion_tokens"]
        return passed

    def _read_task(self, body: bytes) -> str | None:
        """None for a request without messages, which curator sends once to read its limits from the headers."""
        messages = orjson.loads(body)["messages"]
        return self.identify(messages[-1]["content"]) if messages else None


def _keep(message: web.Request | aiohttp.ClientResponse) -> dict[str, str]:
    return {name: value for name, value in message.headers.items() if name.lower() not in _OF_THE_CONNECTION}
