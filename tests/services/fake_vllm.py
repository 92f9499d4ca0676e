"""A vLLM server in miniature, on a unix socket: it has weights, and caches that keep what old weights computed.

What a real one does with a careless swap, this one does, too: a cached prefix or a cached image answers with the weights
that it was computed with, a request that spans a reload mixes weights token by token, a reload that fails half-way leaves
rubbish, and a failed development call closes its connection.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import struct
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from pipeline.checkpoints import compute_digest, write_manifest
from pipeline.errors import ServerError
from pipeline.records import Canary, CheckpointManifest, CheckpointRef
from services.checkpoints import Checkpoint
from services.vllm import Endpoint

CANARY_PROMPT = "What is it?"
CANARY_IMAGE = "aW1hZ2U="
NUM_TOKENS = 3


def write_checkpoint(
    directory: Path,
    name: str,
    weight: float,
    *,
    canary_weight: float | None = None,
    shape: int = 1,
    kind: str = "merged",
) -> Path:
    """A checkpoint directory whose only weight is `weight`; its canary is that of `canary_weight`, if it should lie."""
    directory.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": [shape], "data_offsets": [0, 4 * shape]}}).encode()
    data = struct.pack("<Q", len(header)) + header + struct.pack("<f", weight) * shape
    (directory / "model.safetensors").write_bytes(data)
    (directory / "config.json").write_text("{}")
    ref = CheckpointRef(name=name, digest=compute_digest(directory), kind=kind)
    write_manifest(directory, CheckpointManifest(checkpoint=ref, canary=make_canary(canary_weight or weight)))
    return directory


def make_canary(weight: float) -> Canary:
    """How a server with `weight` answers the fixed question."""
    logprobs = tuple(_logprob(weight, weight, weight) for _ in range(NUM_TOKENS))
    return Canary(
        image_png_base64=CANARY_IMAGE,
        prompt=CANARY_PROMPT,
        tokens=("yes",) * NUM_TOKENS,
        logprobs=logprobs,
        tolerance=1e-3,
    )


def read_weight(directory: Path) -> float:
    """The weight in a checkpoint's file."""
    data = (directory / "model.safetensors").read_bytes()
    return struct.unpack("<f", data[-4:])[0]


def _logprob(prefix: float, image: float, weight: float) -> float:
    return -(prefix + 10 * image + 100 * weight)


@dataclass
class FakeVllm:
    """One life of a server; implements services.gateway.engine.Server."""

    checkpoint: Checkpoint
    fail_start: str = ""
    calls: list[str] = field(default_factory=list)
    request_ids: list[str] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a client has hung up on a request."""
    fail_next_reload: bool = False
    is_rollback_broken: bool = False
    reloads_base_as: float | None = None
    weight: float = 0.0
    prefixes: dict[str, float] = field(default_factory=dict)
    images: dict[str, float] = field(default_factory=dict)
    hold: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared, a request that says `hold` stays in flight after its first token."""
    holding: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when such a request has come so far."""
    died: asyncio.Event = field(default_factory=asyncio.Event)
    _runner: web.AppRunner | None = None
    _directory: Path | None = None

    @property
    def endpoint(self) -> Endpoint:
        assert self._directory is not None
        return Endpoint("http://vllm", self._directory / "s")

    async def start(self, progress: Any) -> None:
        progress("vLLM: importing, 0 s")
        if self.fail_start:
            raise ServerError(self.fail_start)
        self.hold.set()
        self.weight = read_weight(self.checkpoint.directory)
        self._directory = Path(tempfile.mkdtemp())
        await self.listen(self._directory / "s")

    async def listen(self, socket: Path) -> None:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/collective_rpc", self._reload)
        for name in ("prefix", "mm", "encoder"):
            app.router.add_post(f"/reset_{name}_cache", self._reset)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(socket)).start()

    async def wait(self) -> ServerError:
        await self.died.wait()
        return ServerError("vLLM died with status 137")

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _reload(self, request: web.Request) -> web.Response:
        directory = Path((await request.json())["kwargs"]["weights_path"])
        self.calls.append(f"reload {directory.name}")
        if self.fail_next_reload or self.is_rollback_broken:
            self.fail_next_reload = False
            self.weight = float("nan")
            answer = web.json_response({"error": {"message": "Call to collective_rpc method failed"}}, status=500)
            answer.force_close()
            return answer
        self.weight = read_weight(directory)
        if self.reloads_base_as is not None and directory.name == "base":
            self.weight = self.reloads_base_as
        return web.json_response({"results": [None]})

    async def _reset(self, request: web.Request) -> web.Response:
        self.calls.append(request.path)
        if "prefix" in request.path:
            self.prefixes.clear()
        if "encoder" in request.path:
            self.images.clear()
        return web.json_response({"success": True})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        content = body["messages"][0]["content"]
        text = content if isinstance(content, str) else content[1]["text"]
        if "x-request-id" in request.headers:
            self.request_ids.append(request.headers["x-request-id"])
        image = "" if isinstance(content, str) else content[0]["image_url"]["url"]
        if text == "fail":
            return web.json_response({"error": {"message": "no"}}, status=400)
        prefix = self.prefixes.setdefault(text, self.weight)
        seen = self.images.setdefault(image, self.weight)
        try:
            logprobs = [
                await self._token(position, text, prefix, seen) for position in range(body.get("max_tokens", 3))
            ]
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if body.get("stream"):
            return await self._stream(request, body, logprobs)
        tokens = [{"token": "yes", "logprob": value} for value in logprobs]
        choice = {"index": 0, "message": {"content": "yes"}, "finish_reason": "stop", "logprobs": {"content": tokens}}
        return web.json_response({"model": body["model"], "choices": [choice] * body.get("n", 1)})

    async def _token(self, position: int, text: str, prefix: float, image: float) -> float:
        if position == 1 and text.startswith("hold"):
            self.holding.set()
            await self.hold.wait()
        return _logprob(prefix, image, self.weight)

    async def _stream(self, request: web.Request, body: dict[str, Any], logprobs: list[float]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for value in logprobs:
            event = json.dumps(
                {"model": body["model"], "choices": [{"delta": {"content": f"é{value}"}}]}, ensure_ascii=False
            )
            data = f"data: {event}\n\n".encode()
            await response.write(data[:9])  # events come in pieces
            await response.write(data[9:])
        if body["messages"][0]["content"] == "die":
            assert request.transport is not None
            request.transport.abort()
            return response
        await response.write(b"data: [DONE]\n\n")
        return response


STUB = """
import asyncio, os, sys, time
from pathlib import Path
from tests.services.fake_vllm import FakeVllm, read_weight

def argument(name):
    return Path(sys.argv[sys.argv.index(name) + 1])

async def main():
    server = FakeVllm(None)
    server.hold.set()
    server.weight = read_weight(argument("--model"))
    await server.listen(argument("--uds"))
    await asyncio.Event().wait()

mode = os.environ.get("STUB_MODE", "")
print("non-default args: {}", flush=True)
if mode == "die":
    print("(Worker pid=7) INFO 11-22 22:26:03 [cpu.py:68] Starting to load model ...")
    print("(EngineCore pid=7) ERROR 11-22 22:26:03 [core.py:1512] ValueError: no such layer", flush=True)
    sys.exit(3)
if mode == "hang":
    os.fork() or time.sleep(600)
    time.sleep(600)
asyncio.run(main())
"""


def install_stub(folder: Path) -> None:
    """A package `vllm` whose server is the fake one; put `folder` on PYTHONPATH."""
    package = folder / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for path in (folder / "vllm", folder / "vllm" / "entrypoints", package):
        (path / "__init__.py").touch()
    (package / "api_server.py").write_text(STUB)
