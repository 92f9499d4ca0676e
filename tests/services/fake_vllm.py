"""A vLLM server in miniature: it has weights, adapters, and caches that keep what old weights computed.

What a real one does with a careless swap, this one does, too: a cached prefix or a cached image answers with the
weights that it was computed with (an adapter's under its name, the prefix under its path, too), a request that spans a
reload mixes weights token by token, a reload that fails half-way leaves rubbish, an adapter stays across a reload, and
a failed development call closes its connection. `faults` are what goes wrong with the next requests, one each.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from aiohttp import web

from vcot.pipeline.errors import ServerError
from vcot.pipeline.identity import compute_digest, write_manifest
from vcot.pipeline.manifest import Canary, CheckpointManifest
from vcot.pipeline.records import CheckpointRef
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.engine.vllm import Endpoint

CANARY_PROMPT = "What is it?"
CANARY_IMAGE = "aW1hZ2U="
TOKENS = (7, 7, 7)
FAR = 100.0
"""From that weight on it answers with another token."""
MATRIX = "language_model.model.layers.0.self_attn.q_proj.weight"
_CONFIG = Path(__file__).parents[2] / "training" / "checkpoints" / "nano" / "config.json"
PROMPT_TOKENS = tuple(range(9))
_FAULTS = frozenset(
    (
        *("reset", "half", "half-json", "empty", "hang", "422", "500", "502", "503", "429", "429-bare"),
        *("closing", "kill"),
    )
)


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
    write_tensors(directory / "model.safetensors", {"w": (shape,), MATRIX: (8, 8)}, weight)
    shutil.copyfile(_CONFIG, directory / "config.json")
    ref = CheckpointRef(name=name, digest=compute_digest(directory), kind=kind)
    write_manifest(directory, CheckpointManifest(checkpoint=ref, canary=make_canary(canary_weight or weight)))
    return directory


def write_adapter(
    directory: Path,
    name: str,
    delta: float,
    parent: CheckpointRef,
    base_weight: float,
    *,
    canary_weight: float = 0.0,
    module: str = "language_model.layers.0.self_attn.q_proj",
) -> Path:
    """An adapter that adds `delta` to its parent's weight."""
    directory.mkdir(parents=True)
    prefix = f"base_model.model.model.{module}"
    factors = {f"{prefix}.lora_A.weight": (4, 8), f"{prefix}.lora_B.weight": (8, 4)}
    write_tensors(directory / "adapter_model.safetensors", factors, delta)
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    ref = CheckpointRef(name=name, digest=compute_digest(directory), kind="adapter", parent=parent.digest)
    canary = make_canary(canary_weight or base_weight + delta)
    write_manifest(directory, CheckpointManifest(checkpoint=ref, canary=canary))
    return directory


def write_tensors(path: Path, shapes: dict[str, tuple[int, ...]], value: float) -> None:
    """A safetensors file in which every number is `value`."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<f", value) * (offset // 4))


def make_canary(weight: float) -> Canary:
    """How a server with `weight` answers the fixed question."""
    return Canary(
        image_png_base64=CANARY_IMAGE,
        prompt=CANARY_PROMPT,
        prompt_tokens=PROMPT_TOKENS,
        tokens=TOKENS,
        logprobs=(_logprob(weight, weight, weight),) * len(TOKENS),
        leads=(1.0,) * len(TOKENS),
    )


def read_weight(directory: Path, file: str = "model.safetensors") -> float:
    """The weight in a checkpoint's file."""
    return struct.unpack("<f", (directory / file).read_bytes()[-4:])[0]


async def _do_nothing() -> None:
    pass


def _logprob(prefix: float, image: float, weight: float) -> float:
    return -(prefix + 10 * image + 100 * weight)


@dataclass
class FakeVllm:
    """One life of a server; implements vcot.services.gateway.fleet.replica.Server."""

    checkpoint: Checkpoint | None
    fail_start: str | Exception = ""
    """Why it does not start; an exception that is no ServerError is a bug of whoever starts it."""
    bug: Exception | None = None
    """What waiting for its death fails with."""
    calls: list[str] = field(default_factory=list)
    request_ids: list[str] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a client has hung up on a request."""
    fail_next_reload: bool = False
    is_rollback_broken: bool = False
    reloads_base_as: float | None = None
    faults: list[str] = field(default_factory=list)
    """What becomes of the next chat requests: reset, half, half-json, 500, 429, 429-bare, hang, wrong-model, empty."""
    prompt_tokens: tuple[int, ...] = PROMPT_TOKENS
    """How it renders a prompt."""
    ignores_adapters: bool = False
    """Answers under an adapter's name with its base's weights."""
    refuses_adapters: bool = False
    """Answers 500 when it is to load one, whose weights are in its engine by then."""
    mixes_adapters: bool = False
    """Applies an adapter to its base's requests, too, while another request is in flight."""
    loras: set[int] = field(default_factory=set)
    """The numbers of the adapters in its engine, which unloading a name does not take away."""
    keeps_adapters: bool = False
    """Answers 500 when it is to unload one."""
    is_asleep: bool = False
    """Takes requests, and answers none."""
    wakes_with: float | None = None
    """The weight that it wakes with, where that is another than it slept with."""
    is_silent: bool = False
    """Takes connections, and answers nothing on /health."""
    holds_prefixes: bool = False
    """Answers a reset of its prefix cache with 200, and keeps it, as vLLM does while blocks are held."""
    is_sick: bool = False
    """Says on /health that its engine is dead."""
    drifts: bool = False
    """Its API takes an image to be with the engine as soon as someone sends it, and the engine answers with 500 where it is
    not there yet: vLLM, when requests with the same new image come at once."""
    odd: dict[str, str] = field(default_factory=dict)
    """What becomes of requests with that text, each time: one of the faults, or `kill`."""
    order: list[str] = field(default_factory=list)
    """The texts of chat requests, as they came."""
    num_now: int = 0
    """Chat requests in flight."""
    max_at_once: int = 0
    is_stuck: bool = False
    """Its token counters stand still."""
    started: float = field(default_factory=time.time)
    num_tokens: int = 0
    num_loras: int = 0
    """Loaded so far."""
    num_asked: int = 0
    """Chat requests so far, the canary's included."""
    weight: float = 0.0
    adapters: dict[str, tuple[float, str]] = field(default_factory=dict)
    """What each adds, and its path, by name."""
    prefixes: dict[str, float] = field(default_factory=dict)
    images: dict[str, float] = field(default_factory=dict)
    sent: set[str] = field(default_factory=set)
    """Images that the API takes to be with the engine."""
    arrived: set[str] = field(default_factory=set)
    """Those that are."""
    hold: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared, a request that says `hold` stays in flight after its first token."""
    holding: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when such a request has come so far."""
    died: asyncio.Event = field(default_factory=asyncio.Event)
    num_hits: int = 0
    """Tokens that came from the prefix cache."""
    keeps_prefixes: bool = False
    """Answers a reset of its prefix cache as if it had."""
    garbled: float | None = None
    """What one of its tensors, that no answer depends on, is filled with; None where it is as the others are."""
    version: str = "default"
    """Its weight version: whatever it is told."""
    read: Callable[[Path], float] = read_weight
    """How a checkpoint's weight is read when it is loaded."""
    refuses_sleep: bool = False
    """Answers 404 when it is to sleep, as one without sleep mode does."""
    refuses_claims: bool = False
    """Answers 500 where it is asked for its weight version."""
    before_fault: Callable[[], Awaitable[object]] = _do_nothing
    """Waited for before a request fails."""
    after_load: Callable[[], object] | None = None
    """Called when an adapter is loaded."""
    _runner: web.AppRunner | None = None
    _listener: socket.socket | None = None
    _directory: Path | None = None

    @property
    def endpoint(self) -> Endpoint:
        assert self._directory is not None
        return Endpoint("http://vllm", self._directory / "s")

    async def start(self, progress: Any) -> None:
        progress("vLLM: importing, 0 s")
        if self.fail_start:
            raise ServerError(self.fail_start) if isinstance(self.fail_start, str) else self.fail_start
        self.hold.set()
        self.weight = read_weight(self.checkpoint.directory)
        self._directory = Path(tempfile.mkdtemp())
        await self.listen(self._directory / "s")

    async def listen(self, path: Path | None = None, port: int = 0, host: str = "127.0.0.1") -> str:
        """Answer on a unix socket, or on a port of this machine; the URL then."""
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/load_lora_adapter", self._load_adapter)
        app.router.add_post("/v1/unload_lora_adapter", self._unload_adapter)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/collective_rpc", self._call)
        for name in ("prefix", "mm", "encoder"):
            app.router.add_post(f"/reset_{name}_cache", self._reset)
        app.router.add_get("/weight_info", self._weight_info)
        app.router.add_post("/weight_checker", self._weight_checker)
        app.router.add_post("/update_weight_version", self._update_weight_version)
        app.router.add_post("/sleep", self._sleep)
        app.router.add_post("/wake_up", self._wake_up)
        app.router.add_get("/is_sleeping", self._is_sleeping)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        if path is not None:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
        else:
            self._listener = socket.create_server((host, port))
        await web.SockSite(self._runner, self._listener).start()
        return "" if path is not None else f"http://{host}:{self._listener.getsockname()[1]}"

    async def wait(self) -> ServerError:
        await self.died.wait()
        if self.bug is not None:
            raise self.bug
        return ServerError("vLLM died with status 137")

    async def stop(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None and self._listener is not None:
            # asyncio leaves open, with nobody to answer on it, what was accepted in the moment before the listener closes
            asyncio.get_running_loop().remove_reader(self._listener)
            try:
                await asyncio.sleep(0.01)
            finally:
                await runner.cleanup()
            await asyncio.sleep(0.01)  # for the last sockets to be let go of
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    async def _health(self, _: web.Request) -> web.Response:
        if self.is_silent:
            await asyncio.Event().wait()
        return web.Response(status=503 if self.is_sick else 200)

    async def _metrics(self, _: web.Request) -> web.Response:
        self.num_tokens += not self.is_stuck
        return web.Response(
            text=f'process_start_time_seconds {self.started}\nvllm:generation_tokens_total{{engine="0"}} {self.num_tokens}\n'
            f'vllm:prefix_cache_hits_total{{engine="0"}} {self.num_hits}\n'
        )

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in ("vcot", *self.adapters)]})

    async def _load_adapter(self, request: web.Request) -> web.Response:
        body = await request.json()
        directory = Path(body["lora_path"])
        self.calls.append(f"load {body['lora_name']} {directory.name}")
        self.num_loras += 1
        self.loras.add(self.num_loras)
        if self.refuses_adapters:
            return web.json_response({"error": {"message": "a tensor is missing"}}, status=500)
        self.adapters[body["lora_name"]] = (read_weight(directory, "adapter_model.safetensors"), str(directory))
        if self.after_load is not None:
            self.after_load()
        return web.Response(text="Success: LoRA adapter added successfully.")

    async def _unload_adapter(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        self.calls.append(f"unload {name}")
        if self.keeps_adapters:
            return web.json_response({"error": {"message": "no"}}, status=500)
        del self.adapters[name]
        return web.Response(text="Success: LoRA adapter removed successfully.")

    async def _call(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["method"] == "list_loras":
            return web.json_response({"results": [str(self.loras)]})
        if body["method"] == "remove_lora":
            self.loras.remove(*body["args"])
            return web.json_response({"results": ["True"]})
        return self._reload(Path(body["kwargs"]["weights_path"]))

    def _reload(self, directory: Path) -> web.Response:
        self.calls.append(f"reload {directory.name}")
        if self.fail_next_reload or self.is_rollback_broken:
            self.fail_next_reload = False
            self.weight = float("nan")
            answer = web.json_response({"error": {"message": "Call to collective_rpc method failed"}}, status=500)
            answer.force_close()
            return answer
        self.weight = self.read(directory)
        if self.reloads_base_as is not None and directory.name == "base":
            self.weight = self.reloads_base_as
        return web.json_response({"results": [None]})

    async def _reset(self, request: web.Request) -> web.Response:
        self.calls.append(request.path)
        if "prefix" in request.path and self.holds_prefixes:
            return web.json_response({"success": False})
        if "prefix" in request.path:
            self.prefixes = self.prefixes if self.keeps_prefixes else {}
        if "encoder" in request.path:
            self.images.clear()
        if "mm" in request.path:
            self.sent.clear()
            self.arrived.clear()
        return web.json_response({"success": True})

    async def _weight_info(self, _: web.Request) -> web.Response:
        if self.refuses_claims:
            return web.json_response({"error": {"message": "no"}}, status=500)
        return web.json_response({"weight_version": self.version})

    async def _update_weight_version(self, request: web.Request) -> web.Response:
        self.version = (await request.json())["new_version"]
        return web.json_response({"success": True, "new_version": self.version})

    async def _weight_checker(self, _: web.Request) -> web.Response:
        """As on a CPU: a linear layer, which is packed elsewhere, hashes as nothing."""
        bias = self.weight if self.garbled is None else self.garbled
        held = {MATRIX: b"", "w": struct.pack("<f", bias)}
        rank = "dp0:pp0:pcp0:tp0:"
        return web.json_response({"checksums": {rank + k: hashlib.sha256(v).hexdigest() for k, v in held.items()}})

    async def _sleep(self, request: web.Request) -> web.Response:
        if self.refuses_sleep:
            return web.json_response({"detail": "Not Found"}, status=404)
        self.calls.append(f"sleep {request.query['level']}")
        self.is_asleep = True
        return web.json_response({"status": "sleeping", "level": 1})

    async def _wake_up(self, _: web.Request) -> web.Response:
        self.calls.append("wake_up")
        self.is_asleep = False
        self.weight = self.weight if self.wakes_with is None else self.wakes_with
        return web.json_response({"status": "awake", "tags": None})

    async def _is_sleeping(self, _: web.Request) -> web.Response:
        return web.json_response({"is_sleeping": self.is_asleep})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.num_now += 1
        self.max_at_once = max(self.max_at_once, self.num_now)
        try:
            return await self._answer(request, await request.json())
        finally:
            self.num_now -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        content = body["messages"][0]["content"]
        text = content if isinstance(content, str) else content[1]["text"]
        self.num_asked += 1
        if self.is_asleep:
            await asyncio.Event().wait()
        if "x-request-id" in request.headers:
            self.request_ids.append(request.headers["x-request-id"])
        image = "" if isinstance(content, str) else content[0]["image_url"]["url"]
        if text == "fail":
            return web.json_response({"error": {"message": "no"}}, status=400)
        model = body["model"]
        if model != "vcot" and model not in self.adapters:
            return web.json_response({"error": {"message": f"The model `{model}` does not exist."}}, status=404)
        self.order.append(text)
        fault = self.faults.pop(0) if self.faults else self.odd.get(text, "")
        if not fault and self.drifts and not await self._take_in(image):
            fault = "500"
        if fault in _FAULTS:
            return await self._fail(request, body, fault)
        delta, path = self.adapters.get(model, (0.0, ""))
        delta = await self._applied(delta)
        key = f"{model}{path}{text}{body.get('cache_salt', '')}"
        self.num_hits += key in self.prefixes
        prefix = self.prefixes.setdefault(key, self.weight + delta)
        seen = self.images.setdefault(f"{model}{image}", self.weight + delta)
        try:
            logprobs = [
                await self._token(position, text, prefix, seen, delta) for position in range(body.get("max_tokens", 3))
            ]
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        answers_as = "vcot" if fault == "wrong-model" and model != "vcot" else fault or model
        if body.get("stream"):
            return await self._stream(request, body, logprobs, answers_as)
        tokens = [{"token": "yes", "logprob": value} for value in logprobs]
        choice = {"index": 0, "message": {"content": "yes"}, "finish_reason": "stop", "logprobs": {"content": tokens}}
        usage = {"prompt_tokens": len(self.prompt_tokens), "completion_tokens": len(logprobs)}
        answer = {"model": answers_as, "choices": [choice] * body.get("n", 1), "usage": usage}
        if body.get("return_token_ids"):
            choice["token_ids"] = [TOKENS[0] + (self.weight >= FAR)] * len(logprobs)
            answer["prompt_token_ids"] = list(self.prompt_tokens)
        return web.json_response(answer)

    async def _applied(self, delta: float) -> float:
        """What an adapter adds to a request, its own or another's."""
        if self.mixes_adapters:
            await asyncio.sleep(0.02)
            if self.num_now > 1:
                return sum(each for each, _ in self.adapters.values())
        return 0.0 if self.ignores_adapters else delta

    async def _take_in(self, image: str) -> bool:
        """Whether the engine has the image that the API refers to; the image itself takes longer than a reference."""
        is_reference = image in self.sent
        self.sent.add(image)
        await asyncio.sleep(0 if is_reference else 0.005)
        if not is_reference:
            self.arrived.add(image)
        if image not in self.arrived:
            self.sent.discard(image)
            return False
        return True

    async def _fail(self, request: web.Request, body: dict[str, Any], fault: str) -> web.StreamResponse:
        """Do what a broken server does."""
        await self.before_fault()
        if fault == "hang":
            await asyncio.Event().wait()
        if fault == "kill":
            self.died.set()
            self.is_sick = True
            await asyncio.Event().wait()
        if body.get("stream") and fault.isdecimal():  # as vLLM: the status is sent already
            return await self._end_with(request, {"message": "no", "type": "Odd", "code": int(fault)})
        if fault == "closing":  # unannounced, behind a whole answer
            assert request.transport is not None
            asyncio.get_running_loop().call_later(0.001, request.transport.abort)
            return web.json_response({"error": {"message": "no"}}, status=500)
        if fault.isdecimal() or fault.startswith("429"):
            headers = {"retry-after": "7"} if fault == "429" else {}
            return web.json_response({"error": {"message": "no"}}, status=int(fault[:3]), headers=headers)
        if fault == "half-json":
            return web.Response(body=b'{"model": "vcot", "choi', content_type="application/json")
        if fault in ("half", "empty"):
            kind = "text/event-stream" if body.get("stream") else "application/json"
            response = web.StreamResponse(headers={"content-type": kind})
            await response.prepare(request)
            if fault == "empty":
                return response
            if not body.get("stream"):
                await response.write(b'{"model": "vcot", "choi')
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def _end_with(self, request: web.Request, error: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        await response.write(f"data: {json.dumps({'error': error})}\n\ndata: [DONE]\n\n".encode())
        return response

    async def _token(self, position: int, text: str, prefix: float, image: float, delta: float) -> float:
        if position == 1 and text.startswith("hold"):
            self.holding.set()
            await self.hold.wait()
        return _logprob(prefix, image, self.weight + delta)

    async def _stream(
        self, request: web.Request, body: dict[str, Any], logprobs: list[float], model: str
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for value in logprobs:
            event = json.dumps({"model": model, "choices": [{"delta": {"content": f"é{value}"}}]}, ensure_ascii=False)
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
    if "--uds" in sys.argv:
        await server.listen(argument("--uds"))
    else:
        await server.listen(None, int(str(argument("--port"))), str(argument("--host")))
    await asyncio.Event().wait()

mode = os.environ.get("VLLM_STUB_MODE", "")
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
    package = folder / "vllm" / "entrypoints" / "launchers" / "api_server"
    package.mkdir(parents=True)
    for path in (folder / "vllm", *(folder / "vllm").rglob("*/")):
        (path / "__init__.py").touch()
    (package / "entry.py").write_text(STUB)
