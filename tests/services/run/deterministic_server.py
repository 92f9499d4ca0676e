"""A gateway and a judge in one, in a thread of this process: what it answers is determined by what it is asked."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web
from PIL import Image

from vcot.pipeline.client import DIGEST_HEADER
from vcot.pipeline.images import ImageStore
from vcot.pipeline.records import CheckpointRef, Task
from vcot.services.recipes.recipe import load_recipe
from vcot.services.run.directory import Run

REF = CheckpointRef(name="base", digest="sha256:" + "a" * 64, kind="base")


@dataclass
class Server:
    """Mutated by its thread, and by tests."""

    url: str = ""
    stamp: str = REF.digest
    delay_s: float = 0.0
    refuse_after: int | None = None
    """From so many requests on it takes no key."""
    asked: Counter[str] = field(default_factory=Counter)
    """How often each text was asked with each seed."""
    keys: set[str] = field(default_factory=set)

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.keys.add(request.headers["authorization"].removeprefix("Bearer "))
        text = json.dumps(body["messages"])
        self.asked[f"{text}{body.get('seed')}"] += 1
        number = self.asked.total()
        await asyncio.sleep(self.delay_s)
        if self.refuse_after is not None and number > self.refuse_after:
            return web.json_response({"error": {"message": "no", "code": "invalid_api_key"}}, status=401)
        if "refuse" in text:
            return web.json_response({"error": {"message": "no", "code": "content_filter"}}, status=400)
        if "prompt_logprobs" in body:
            return web.json_response(self._score(body), headers={DIGEST_HEADER: self.stamp})
        texts = [self._say(body, number) for number in range(body.get("n", 1))]
        choices = [
            {"index": number, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
            for number, said in enumerate(texts)
        ]
        usage = {"prompt_tokens": len(text), "completion_tokens": len(texts)}
        return web.json_response({"choices": choices, "usage": usage}, headers={DIGEST_HEADER: self.stamp})

    @staticmethod
    def _say(body: dict, number: int) -> str:
        if body["model"] == "judge":
            return json.dumps({"rationale": "x", "score": 1 + len(json.dumps(body["messages"])) % 10})
        return f"It is {body['seed'] % 97 + number % 2}. <R> The answer is (A)"

    @staticmethod
    def _score(body: dict) -> dict:
        words = f"{body['messages'][0]['content'][-1]['text']} {body['messages'][1]['content']}".split()
        tokens = [sum(word.encode()) for word in words]
        logprobs = [{str(token): {"logprob": -token / 100}} for token in tokens]
        usage = {"prompt_tokens": len(tokens), "completion_tokens": 1}
        return {"choices": [], "prompt_token_ids": tokens, "prompt_logprobs": [None, *logprobs[1:]], "usage": usage}


@contextmanager
def serving() -> Iterator[Server]:
    """It answers meanwhile."""
    server, loop, up = Server(), asyncio.new_event_loop(), threading.Event()
    app = web.Application(client_max_size=2**24)
    app.router.add_post("/v1/chat/completions", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    def work() -> None:
        loop.run_until_complete(start())
        loop.call_soon(up.set)  # a stop while `start` is run would end that alone, and the loop would go on for ever
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.run_until_complete(asyncio.sleep(0.05))  # for the last sockets to be let go of
        loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    up.wait()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def open_small(directory, *settings: str) -> Run:
    """A run that was not begun by a command."""
    directory.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe("nano", settings)
    return Run(directory, recipe, recipe)


def draw_tasks(store: ImageStore, number: int) -> list[Task]:
    """Questions, each about an image of its own."""
    return [
        Task(
            id=f"t{place}", question=f"q{place}?", choices=("a", "b"), answer=place % 2, source="nano", split="train",
            images=(store.put_png(Image.new("RGB", (4, 4), (place, 0, 0))),),
        )
        for place in range(number)
    ]  # fmt: skip


class OpenGateway:
    """A gateway that answers at a URL; only that of `vcot.services.run.gateways.Gateway`."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def open(self) -> str:
        return self._server.url


def wait_for(is_so, timeout_s: float = 60.0) -> None:
    """Until something of another thread or process is so."""
    ends = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.05)
