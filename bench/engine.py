"""What the measurements of servers share: nano, its images and questions, and the real vLLM below a real gateway."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from PIL import Image, ImageDraw

from vcot.pipeline.errors import ServerError
from vcot.services.engine.vllm import Endpoint

NANO = Path(__file__).parents[1] / "training" / "checkpoints" / "nano"
_COLOURS = ("red", "green", "blue", "yellow")
_TEXTS = ("What is the colour of the circle?", "What is the shape in the picture?")

# In a process of its own: torch stays out of this one.
_VARIANT = """
import shutil, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
source, target, scale = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
shutil.copytree(source, target)
(target / "checkpoint.json").unlink(missing_ok=True)
weights, draw = load_file(source / "model.safetensors"), torch.Generator().manual_seed(0)

def move(v):
    return v + (scale * v.float().std(correction=0) * torch.randn(v.shape, generator=draw)).to(v.dtype)

moved = {name: move(value) for name, value in weights.items()}
(target / "model.safetensors").unlink()
save_file(moved, target / "model.safetensors", metadata={"format": "pt"})
"""


def open_session(endpoint: Endpoint) -> aiohttp.ClientSession:
    """The same client for both sides of a measurement."""
    connector = (
        aiohttp.TCPConnector(limit=0) if endpoint.socket is None else aiohttp.UnixConnector(str(endpoint.socket))
    )
    return aiohttp.ClientSession(
        base_url=endpoint.base_url, connector=connector, timeout=aiohttp.ClientTimeout(total=600)
    )


def say(message: str) -> None:
    """Progress, for people."""
    print(message, file=sys.stderr, flush=True)


def make_variant(directory: Path, name: str, scale: float) -> Path:
    """A copy of nano with noise on every weight, and the manifest that the training side writes for it."""
    target = directory / name
    subprocess.run([sys.executable, "-c", _VARIANT, str(NANO), str(target), str(scale)], check=True)
    command = [
        sys.executable,
        "-m",
        "vcot.training.model.canary",
        str(target),
        "--out",
        str(target / "checkpoint.json"),
    ]
    subprocess.run([*command, "--name", name], check=True, stdout=subprocess.DEVNULL)
    return target


def question(number: int) -> list[dict[str, Any]]:
    """The messages of question `number`: another image each, a shape on a plain ground."""
    image = Image.new("RGB", (56, 56), ((37 * number) % 256, (91 * number) % 256, 200))
    corner = 4 + number % 24
    ImageDraw.Draw(image).ellipse((corner, corner, corner + 24, corner + 24), fill=_COLOURS[number % 4])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    text = {"type": "text", "text": _TEXTS[number % 2]}
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, text]}]


async def chat(session: aiohttp.ClientSession, body: dict[str, Any]) -> tuple[aiohttp.ClientResponse, dict[str, Any]]:
    """One chat completion, and its answer's headers. Raises what the transport raises, ServerError for a status."""
    data = orjson.dumps(body)
    headers = {"content-type": "application/json"}
    async with session.post("/v1/chat/completions", data=data, headers=headers) as response:
        text = await response.read()
    if response.status != 200:
        raise ServerError(f"{response.status}: {text[:300].decode('utf-8', 'replace')}")
    return response, orjson.loads(text)


async def chat_streamed(
    session: aiohttp.ClientSession, body: dict[str, Any]
) -> tuple[aiohttp.ClientResponse, dict[str, Any]]:
    """The same by server-sent events, joined to one answer; its `model` names each model that an event named.

    Raises ServerError for a stream that holds an error or ends before its [DONE], too.
    """
    data = orjson.dumps(body | {"stream": True})
    headers = {"content-type": "application/json"}
    async with session.post("/v1/chat/completions", data=data, headers=headers) as response:
        text = await response.read()
    if response.status != 200:
        raise ServerError(f"{response.status}: {text[:300].decode('utf-8', 'replace')}")
    *events, end, rest = text.split(b"\n\n")
    if end != b"data: [DONE]" or rest:
        raise ServerError(f"a stream ended without [DONE]: {text[-300:].decode('utf-8', 'replace')}")
    answers = [orjson.loads(event.removeprefix(b"data: ")) for event in events]
    if fault := next((answer["error"] for answer in answers if "error" in answer), None):
        raise ServerError(f"a stream ended with an error: {fault}")
    choices = [choice for answer in answers for choice in answer["choices"]]
    content = [part for choice in choices if choice.get("logprobs") for part in choice["logprobs"]["content"]]
    models = sorted({answer["model"] for answer in answers})
    return response, {"model": " and ".join(models), "choices": [{"logprobs": {"content": content}}]}


def vllm_socket(gateway_pid: int) -> Path:
    """The unix socket of the vLLM below that gateway, from its command line. Raises ServerError."""
    words = command_line(vllm_process(gateway_pid))
    return Path(words[words.index(b"--uds") + 1].decode())


def vllm_process(gateway_pid: int) -> int:
    """The API server of the vLLM below that gateway, by its command line. Raises ServerError."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if found := [pid for pid in descendants(gateway_pid) if b"--uds" in command_line(pid)]:
            return found[-1]  # behind whoever keeps it
    raise ServerError(f"no vLLM below process {gateway_pid}")


def command_line(pid: int) -> list[bytes]:
    """Its words."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")


def children(pid: int) -> list[int]:
    """Processes that it started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def descendants(pid: int) -> list[int]:
    """Processes that it started, those that these started, and so on."""
    return [each for child in children(pid) for each in (child, *descendants(child))]


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time that these processes have used so far, in the kernel, too."""
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")  # proc(5): 14 and 15
