"""What the ledger takes on disk and in memory, and how fast it is, beside the layout that it had before.

    make bench-ledger          (python -m bench.ledger [--responses N] [--k K])

Each layout, in a process of its own, stores `--responses` responses of about 200 tokens, a group of k in each write, and
as many judgments; then reads the responses by key, 4,000 at a time, and compares them. Printed for each:
`bytes_per_response` (of the file, judgments left out), `disk_to_text` (that by the bytes of the responses' texts),
`rows_per_s` written, `read_per_s`, `peak_mb` (the process's resident memory), and the ratios of both layouts.

Limits: one writer, which waits for each commit; a disk that others use, too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import orjson

from vcot.pipeline.ledger import Ledger
from vcot.pipeline.records import CheckpointRef, Judgment, Response, SamplingParams, Usage, content_key
from vcot.pipeline.stage import batched

_WORDS = (
    "the", "a", "image", "shows", "table", "red", "blue", "dog", "cat", "on", "beside", "under", "behind", "person", "old",
    "holding", "small", "large", "bright", "two",
)  # fmt: skip
MADE = CheckpointRef(name="base", digest="sha256:" + "a" * 64, kind="base")
_READ = 4000


class Former:
    """The layout of before: a row of JSON for each record, in a table without rowid."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS records (kind TEXT NOT NULL, key TEXT NOT NULL, ok INTEGER NOT NULL, "
            "body TEXT NOT NULL, PRIMARY KEY (kind, key)) WITHOUT ROWID"
        )

    def put(self, records: Sequence[Response | Judgment]) -> None:
        rows = [(type(r).__name__, r.key, r.error is None, r.model_dump_json(exclude_none=True)) for r in records]
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany("INSERT INTO records VALUES (?, ?, ?, ?)", rows)
        self._connection.execute("COMMIT")

    def get(self, kind: Any, keys: Sequence[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for start in range(0, len(keys), 500):
            chunk = keys[start : start + 500]
            marks = ", ".join("?" * len(chunk))
            query = f"SELECT key, body FROM records WHERE kind = ? AND key IN ({marks})"
            rows = self._connection.execute(query, (kind.__name__, *chunk))
            found |= {key: kind.model_validate_json(body) for key, body in rows}
        return found

    def close(self) -> None:
        self._connection.close()


def make_group(number: int, k: int) -> list[Response]:
    draw, group = random.Random(number), content_key(number=number)
    sampling = SamplingParams(temperature=0.5, max_tokens=1024, n=k, seed=number)
    made = []
    for index in range(k):
        thought = " ".join(draw.choices(_WORDS, k=draw.randint(120, 280))).capitalize()
        answer = "So the answer is (B) a table."
        made.append(
            Response(
                key=content_key(group=group, index=index), group=group, task=f"aokvqa/{number}", index=index,
                checkpoint=MADE, prompt="thought_specific", sampling=sampling, text=f"{thought}\n<R> {answer}",
                thought=thought, answer=answer, finish_reason="stop", latency_s=draw.random(),
                usage=Usage(prompt_tokens=700, completion_tokens=1600) if index == 0 else None,
            )
        )  # fmt: skip
    return made


def judge(response: Response) -> Judgment:
    return Judgment(
        key=content_key(judged=response.key), response=response.key, task=response.task, judge="pointwise/1:gpt-4o-mini",
        score=7.0, rationale="The response is right about the table. " * 6, num_asked=1,
        usage=Usage(prompt_tokens=3200, completion_tokens=90),
    )  # fmt: skip


def groups(num_groups: int, k: int) -> Iterator[list[Response]]:
    return map(make_group, range(num_groups), repeat(k))


def measure(layout: str, num_responses: int, k: int) -> dict[str, float]:
    num_groups = num_responses // k
    with tempfile.TemporaryDirectory(prefix="vcot-bench-") as folder:
        path = Path(folder, "ledger.sqlite")
        kind: Any = Former if layout == "former" else Ledger
        ledger = kind(path)
        spent, num_text = 0.0, 0
        for group in groups(num_groups, k):
            num_text += sum(len((response.text or "").encode()) for response in group)
            began = time.perf_counter()
            ledger.put(group)
            spent += time.perf_counter() - began
        ledger.close()
        num_bytes = path.stat().st_size
        ledger = kind(path)
        for some in _batches(groups(num_groups, k)):
            began = time.perf_counter()
            ledger.put([judge(response) for response in some])
            spent += time.perf_counter() - began
        read = 0.0
        for some in _batches(groups(num_groups, k)):
            keys = [response.key for response in some]
            began = time.perf_counter()
            found = ledger.get(Response, keys)
            read += time.perf_counter() - began
            if [found.get(key) for key in keys] != some:
                raise SystemExit("what was read is not what was written")
        ledger.close()
    return {
        "bytes_per_response": round(num_bytes / num_responses),
        "disk_to_text": round(num_bytes / num_text, 2),
        "rows_per_s": round(2 * num_responses / spent),
        "read_per_s": round(num_responses / read),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def _batches(made: Iterator[list[Response]]) -> Iterator[list[Response]]:
    return map(list, batched(chain.from_iterable(made), _READ))


def main(options: argparse.Namespace) -> None:
    if options.layout:
        print(orjson.dumps(measure(options.layout, options.responses, options.k)).decode())
        return
    found: dict[str, Any] = {"responses": options.responses, "k": options.k, "cores": os.cpu_count()}
    for layout in ("now", "former"):
        command = [sys.executable, "-m", "bench.ledger", "--layout", layout, "--responses", str(options.responses)]
        done = subprocess.run([*command, "--k", str(options.k)], check=True, stdout=subprocess.PIPE, text=True)
        found[layout] = json.loads(done.stdout)
        print(f"{layout}: {done.stdout.strip()}", file=sys.stderr)
    now, former = found["now"], found["former"]
    found["disk_ratio"] = round(now["bytes_per_response"] / former["bytes_per_response"], 2)
    found["write_ratio"] = round(now["rows_per_s"] / former["rows_per_s"], 2)
    print(orjson.dumps(found).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The ledger's size and speed.")
    parser.add_argument("--responses", type=int, default=100_000)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--layout", choices=("now", "former"), help="measure one layout, in this process")
    main(parser.parse_args())
