"""What bench/soak.py attacks a gateway with: each is one exchange on a connection of its own.

Limits: the kinds are those that a gateway or an engine was ever seen to be harmed by, not all there are.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import orjson

PATIENCE_S = 20.0
_SLOW_S = 8.0
"""How long a slow one holds its connection."""
CHAT = "/v1/chat/completions"
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Attack:
    """Bytes that are sent, and how."""

    kind: str
    data: bytes
    way: str = "send"
    """`send` reads the whole answer; `drip` sends a byte at a time; `half` stops in the middle; `abort` closes after the
    answer's first bytes; `hoard` reads nothing of it."""

    async def run(self, host: str, port: int) -> str:
        """What came of it: the answer's status, or how the connection ended."""
        reader, writer = await asyncio.open_connection(host, port)
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._run(reader, writer)
        except TimeoutError:
            return "given up"
        except (OSError, asyncio.IncompleteReadError):
            return "closed"
        finally:
            writer.transport.abort()

    async def _run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        if self.way == "drip":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SLOW_S):
                    for byte in self.data:
                        writer.write(bytes((byte,)))
                        await writer.drain()
                        await asyncio.sleep(0.2)
            return "slow"
        writer.write(self.data[: len(self.data) // 2] if self.way == "half" else self.data)
        await writer.drain()
        if self.way in ("half", "hoard"):
            await asyncio.sleep(_SLOW_S)
            return self.way
        line = await reader.readline()
        status = line.split()[1].decode() if line.startswith(b"HTTP/1.1 ") else "closed"
        if self.way != "abort":
            while await reader.read(65536):
                pass
        return status


def attacks(host: str, key: str, question: Callable[[int], Messages]) -> Iterator[Attack]:
    """Every kind in turn, for ever. `key` is a client's, `question` gives an honest request's messages."""
    for number in itertools.count():
        yield from _of_connections(host, key, question(number))
        for kind, body in _bodies(question(number)).items():
            yield Attack(kind, _request(host, key, body))


def _of_connections(host: str, key: str, messages: Messages) -> Iterator[Attack]:
    honest = _request(host, key, {**_ask(messages), "n": 8, "stream": True})
    start = f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
    yield Attack("head without end", start.encode() + b"x-filler: " + b"a" * 400_000 + b"\r\n\r\n")
    yield Attack("many headers", start.encode() + b"".join(b"x-%d: y\r\n" % i for i in range(2_000)) + b"\r\n")
    yield Attack("slow head", start.encode(), "drip")
    yield Attack("half a body", honest, "half")
    yield Attack("stream without a reader", honest, "hoard")
    yield Attack("stream given up", honest, "abort")
    yield Attack("request given up", _request(host, key, {**_ask(messages), "n": 8}), "abort")
    yield Attack("two lengths", start.encode() + b"content-length: 2\r\ncontent-length: 40\r\n\r\n{}")
    yield Attack(
        "length and chunks", start.encode() + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    )
    yield Attack("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200)
    yield Attack("wrong key", _request(host, "sk-wrong", _ask(messages)))
    orders = {"swap": b'{"alias":"policy","checkpoint":"moved"}', "rest": b'{"way":"stop","lease_s":60}'}
    for route, body in orders.items():
        page = f"POST /admin/{route} HTTP/1.1\r\nhost: {host}\r\norigin: http://evil.example\r\ncontent-type: text/plain\r\n"
        yield Attack("page", f"{page}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)


def _bodies(messages: Messages) -> dict[str, Any]:
    """Requests that are refused, or that an engine was seen to fail."""
    ask = _ask(messages)
    spread = {"messages": [*messages, {"role": "assistant", "content": messages[0]["content"]}, *messages]}
    return {
        "recursive schema": ask | {"structured_outputs": {"json": {"$ref": "#"}}},
        "left recursion": ask | {"structured_outputs": {"grammar": 'root ::= root "a"'}},
        "pattern": ask | {"structured_outputs": {"regex": "(" * 200 + "a" + "){9}" * 200}},
        "format": ask | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}},
        "image of an assistant": ask | spread,
        "image bomb": ask | {"messages": _with_image(bomb_png(30_000, 30_000))},
        "no image": ask | {"messages": _with_image(b"\x89PNG\r\n\x1a\n" + b"\0" * 5_000)},
        "web image": ask | {"messages": _image_of("http://169.254.169.254/latest/meta-data")},
        "two images": ask | {"messages": [{"role": "user", "content": messages[0]["content"] * 2}]},
        "deep JSON": b'{"model":"policy","messages":' + b"[" * 50_000,
        "wide JSON": b'{"model":"policy","messages":[' + b"{}," * 500_000 + b"{}]}",
        "no JSON": b"\xff\xfe",
        "many choices": ask | {"n": 4_000},
        "all choices": ask | {"n": 128, "max_tokens": 4},
        "too long": ask | {"messages": [{"role": "user", "content": "circle " * 20_000}]},
        "no such token": ask | {"logit_bias": {str(10**9): 1}},
        "log-probs": ask | {"logprobs": True, "top_logprobs": 10_000},
        "prompt log-probs": ask | {"prompt_logprobs": 5},
        "stops": ask | {"stop": ["x" * 50] * 2_000},
        "refused field": ask | {"vllm_xargs": {"a": "b"}},
        "template": ask | {"chat_template": "{{ 7*7 }}"},
        "1e999": b'{"model":"policy","messages":[],"temperature":1e999}',
        "surrogate": b'{"model":"policy","messages":[{"role":"user","content":"\\ud800"}]}',
        "wrong types": ask | {"messages": [{"role": ["user"], "content": {"a": 1}}]},
        "no messages": ask | {"messages": []},
        "no such model": ask | {"model": "x" * 5_000},
        "negative": ask | {"max_tokens": -1, "n": -1},
        "tools": ask | {"tools": [{"type": "function", "function": {"name": "x", "parameters": {"$ref": "#"}}}],
                        "tool_choice": "required"},
    }  # fmt: skip


def _ask(messages: Messages) -> dict[str, Any]:
    return {"model": "policy", "messages": messages, "max_tokens": 32, "temperature": 1.0}


def _with_image(data: bytes) -> Messages:
    return _image_of(f"data:image/png;base64,{base64.b64encode(data).decode()}")


def _image_of(url: str) -> Messages:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    return [{"role": "user", "content": content}]


@cache
def bomb_png(width: int, height: int) -> bytes:
    """A PNG of one colour: kilobytes that decode to gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj(9)
    row = b"\0" * (1 + width // 8 + 1)
    data = b"".join(rows.compress(row) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _request(host: str, key: str, body: Any) -> bytes:
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
    return f"{head}connection: close\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data
