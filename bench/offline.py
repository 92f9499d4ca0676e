"""vLLM's engine without a server (`LLM.chat`), in a process of its own, asked what vcot asks a server.

It has the options of the recipe's server and the environment of the server's engine: as many threads, free to run on any
core, in one process with what takes the questions in. As `LLM` starts by default (the engine and a worker in processes of
their own, each bound to a core) it takes half as much processor time again (docs/lab-notes.md). Images come as the same
data URLs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from bench.engine import NANO
from vcot.pipeline.client import user_message
from vcot.pipeline.images import ImageStore
from vcot.pipeline.sample import SampleRequest
from vcot.services.engine.command import find_build, server_environment
from vcot.services.run.directory import Run

# vLLM stays out of the benchmark's process. A line of JSON in, the seconds and the responses out.
_OFFLINE = """
import json, sys, time
from vllm import LLM, SamplingParams
serve = json.loads(sys.argv[2])
llm = LLM(sys.argv[1], disable_log_stats=True, **serve)
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    params = [SamplingParams(**one) for one in asked["params"]]
    began = time.perf_counter()
    answers = llm.chat(asked["messages"], params, use_tqdm=False)
    took = time.perf_counter() - began
    print(json.dumps([took, sum(len(one.outputs) for one in answers)]), flush=True)
"""


class Answered(NamedTuple):
    """What one call took."""

    took_s: float
    num_responses: int


class Offline:
    """The engine, loaded with nano as the run's server is."""

    def __init__(self, run: Run, log: Path) -> None:
        serve = run.recipe.serve
        options: dict[str, Any] = {"dtype": serve.dtype, "max_model_len": serve.max_model_len, "enforce_eager": True}
        options |= {
            "max_num_batched_tokens": serve.max_model_len * serve.max_in_flight,
            "enable_chunked_prefill": False,
        }
        options |= {"kv_cache_memory_bytes": int(serve.kv_cache_gib * 2**30)}
        options |= {"limit_mm_per_prompt": {"image": 1, "video": 0}, "generation_config": "vllm"}
        environment = server_environment(find_build(), os.environ, log.parent, serve) | {"VLLM_LOGGING_LEVEL": "ERROR"}
        self.num_threads = int(environment.get("OMP_NUM_THREADS", os.cpu_count() or 1))
        command = [sys.executable, "-c", _OFFLINE, str(NANO), orjson.dumps(options).decode()]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("wb"), env=environment, text=True
        )
        self._until("ready")

    @property
    def pid(self) -> int:
        """Of the process that takes the questions in, and below which others may be."""
        return self._process.pid

    def _until(self, start: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line
        raise RuntimeError("vLLM's engine ended; see its log")

    def answer(self, requests: Iterable[SampleRequest], images: ImageStore) -> Answered:
        """All requests in one call."""
        messages, params = [], []
        for request in requests:
            messages.append([user_message(request.text, images.read_all(request.task.images))])
            params.append(request.sampling.model_dump())
        assert self._process.stdin is not None
        self._process.stdin.write(orjson.dumps({"messages": messages, "params": params}).decode() + "\n")
        self._process.stdin.flush()
        return Answered(*orjson.loads(self._until("[")))

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()
