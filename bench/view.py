"""How fast `vcot view` opens a large run, pages through it and filters it, from a process of its own; and `vcot report`.

    make bench-view          (python -m bench.view [--responses N] [--k K] [--keep DIR])

A run of `--responses` responses, k a task, with as many judgments is written with the real ledger. Then the viewer is
started twice: without an index (`cold_...`), and asked for pages until the index is whole; then with it. Printed:

    open_s, cold_open_s   from the command's start to the overview and the first page of tasks; `open_cpu_s` is the
                          CPU time of that, for a machine that does other things
    page_ms, filter_ms    the slowest page or filter, each by its median of five
    first_page_ms, first_filter_ms   the slowest asked for the first time; `slowest_first_...` names it
    while_indexing_ms     the same page of tasks, asked twice a second meanwhile: median and worst
    index_s, index_mb     until the index is whole, and its size; `ledger_mb` beside it
    report_s, report_mb   `vcot report` of a run with a tenth of the responses, with the base's evaluation: the command, its
                          CPU time (`report_cpu_s`), and the page
    server_mb             resident memory of the server, without the process that makes the index

Limits: whatever else runs on the machine; one reader.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
from PIL import Image

from vcot.pipeline.judges import judgment_keys
from vcot.pipeline.prompts import split_thought
from vcot.pipeline.records import ImageRef, Judgment, Response, Task, Usage
from vcot.pipeline.report import ignore
from vcot.pipeline.sample import Plan, SampleRequest
from vcot.pipeline.sources.source import key_tasks
from vcot.pipeline.stage import batched
from vcot.services.run.directory import Run, open_run
from vcot.services.run.rounds import make_judge
from vcot.services.run.session import Session

_WORDS = [
    *(
        "the",
        "a",
        "image",
        "shows",
        "table",
        "red",
        "blue",
        "dog",
        "cat",
        "on",
        "beside",
        "under",
        "behind",
        "person",
        "old",
    ),
    *(f"thing{number}" for number in range(5000)),
]
_SUBJECTS = ("NAT", "SOC", "LAN")
_LINK = re.compile(r"(http://127\.0\.0\.1:\d+)/\?token=(\S+)")
PAGES = {
    "first": "", "page 40": "page=40", "last by best": "sort=best&down=1&page=2000", "by spread": "sort=spread&down=1",
}  # fmt: skip
FILTERS = {
    "subject": "subject=NAT", "outcome": "outcome=incorrect", "outcome of": "outcome=correct&checkpoint=base",
    "rare word": "text=thing77", "common word": "text=the", "three words": "text=the+dog+thing5", "pair": "mark=pair%7Cmade",
    "score": "low=0.2&high=0.4", "no label": "label=no", "nothing": "text=zebra",
    "all together": "subject=SOC&outcome=incorrect&text=red+cat&low=0.1&high=0.9&mark=pair%7Cmade&sort=spread&down=1",
}  # fmt: skip


def write_run(directory: Path, num_responses: int, k: int) -> None:
    sizes = (f"tasks.num_tasks={num_responses // k}", f"sample.k={k}")
    with open_run(directory, "nano", sizes, access="alone") as run:
        session = Session(run, ignore)
        images = [run.images.put_png(Image.new("RGB", (56, 56), (shade, 0, 0))) for shade in range(256)]
        path = run.path("tasks", f"{key_tasks(run.recipe.tasks)}.jsonl")
        with path.open("w") as file:
            file.writelines(
                f"{_make_task(n, images[n % len(images)]).model_dump_json()}\n" for n in range(num_responses // k)
            )
        _fill(run, Plan(_read(path), run.recipe.sample.prompt, session.base.ref, run.recipe.sample.params()))
        run.ledger.close()


def _read(path: Path) -> list[Task]:
    return [Task.model_validate_json(line) for line in path.read_bytes().splitlines()]


def _make_task(number: int, image: ImageRef) -> Task:
    return Task(
        id=f"task-{number}", question=f"Which of these is thing{number % 5000}?", choices=("red", "blue", "dog", "cat"),
        answer=number % 4, images=(image,), subject=_SUBJECTS[number % 3], source="nano", split="train",
    )  # fmt: skip


def _fill(run: Run, plan: Plan) -> None:
    judge, draw = make_judge(Session(run, ignore)), random.Random(0)
    for chunk in batched(plan, 256):
        groups = [(request.task, _answer(request, draw)) for request in chunk]
        records: list[Response | Judgment] = [response for _, group in groups for response in group]
        for task, group in groups:
            for key, response in zip(judgment_keys(judge, task, group), group, strict=True):
                records.append(
                    Judgment(
                        key=key, response=response.key, task=task.id, judge=judge.name, score=draw.randint(0, 10) / 10,
                        rationale="The response is right about the table and the dog.",
                    )
                )  # fmt: skip
        run.ledger.put(records)


def _answer(request: SampleRequest, draw: random.Random) -> list[Response]:
    made = []
    for index, key in enumerate(request.response_keys()):
        text = f"{' '.join(draw.choices(_WORDS[:15], k=110))} {' '.join(draw.choices(_WORDS, k=20))}\n<R> The answer is"
        text += f" ({'ABCD'[draw.randrange(4)]})."
        thought, answer = split_thought(request.prompt, text)
        made.append(
            Response(
                key=key, group=request.key, task=request.task.id, index=index, checkpoint=request.checkpoint,
                prompt=request.prompt, sampling=request.sampling, text=text, thought=thought, answer=answer,
                finish_reason="stop", usage=Usage(prompt_tokens=700, completion_tokens=900) if index == 0 else None,
            )
        )  # fmt: skip
    return made


@contextmanager
def viewing(directory: Path) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "vcot.services.cli", "view", str(directory)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        found = next(match for line in process.stderr if (match := _LINK.search(line)))
        with httpx.Client(base_url=found[1], timeout=120, follow_redirects=True, trust_env=False) as client:
            client.get("/", params={"token": found[2]}).raise_for_status()
            yield client, process
    finally:
        process.terminate()
        process.wait()


def _ask(client: httpx.Client, query: str) -> float:
    began = time.perf_counter()
    client.get(f"/runs/0/tasks?{query}").raise_for_status()
    return 1000 * (time.perf_counter() - began)


def measure_cold(directory: Path) -> dict[str, Any]:
    shutil.rmtree(directory / "view", ignore_errors=True)
    began, waits = time.perf_counter(), list[float]()
    with viewing(directory) as (client, _):
        _ask(client, "")
        opened = time.perf_counter() - began
        while not waits or not _is_whole(client):
            waits.append(_ask(client, "sort=order"))
            time.sleep(0.5)
        whole = time.perf_counter() - began
    return {
        "cold_open_s": round(opened, 2), "index_s": round(whole),
        "while_indexing_ms": [round(statistics.median(waits)), round(max(waits))],
    }  # fmt: skip


def _is_whole(client: httpx.Client) -> bool:
    """Whether the index has every task."""
    return "filters know what it has" not in client.get("/runs/0/live").text


def measure_warm(directory: Path) -> dict[str, Any]:
    began = time.perf_counter()
    with viewing(directory) as (client, process):
        _ask(client, "")
        opened = time.perf_counter() - began
        found: dict[str, Any] = {"open_s": round(opened, 2), "open_cpu_s": _read_cpu(process.pid)}
        for kind, queries in (("page", PAGES), ("filter", FILTERS)):
            waits = {name: [_ask(client, query) for _ in range(5)] for name, query in queries.items()}
            firsts = {name: own[0] for name, own in waits.items()}
            found[f"first_{kind}_ms"] = round(max(firsts.values()))
            found[f"slowest_first_{kind}"] = max(firsts, key=lambda name: firsts[name])
            found[f"{kind}_ms"] = round(max(statistics.median(own) for own in waits.values()))
            print({name: [round(wait) for wait in own] for name, own in waits.items()}, file=sys.stderr)
        found["example_ms"] = round(_measure_examples(client))
        status = Path(f"/proc/{process.pid}/status").read_text("ascii")
        found["server_mb"] = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024  # type: ignore[index]
    return found


def measure_report(directory: Path) -> dict[str, Any]:
    with open_run(directory, access="alone") as run:
        session = Session(run, ignore)
        draw = random.Random(1)
        for chunk in batched(session.questions("test").requests(session.base.ref), 256):
            run.ledger.put([response for request in chunk for response in _answer(request, draw)])
        run.ledger.close()
    began, before = time.perf_counter(), os.times()
    subprocess.run(
        [sys.executable, "-m", "vcot.services.cli", "report", "--run", str(directory)], check=True, capture_output=True
    )
    took, after = time.perf_counter() - began, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    size = (directory / "report" / "index.html").stat().st_size
    return {"report_s": round(took, 1), "report_cpu_s": round(cpu, 1), "report_mb": round(size / 1e6, 2)}


def _read_cpu(pid: int) -> float:
    """Seconds of CPU that a process took."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return round((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), 2)


def _measure_examples(client: httpx.Client) -> float:
    """The slowest of five tasks of a filter, with its neighbours."""
    query = FILTERS["all together"]
    page = client.get(f"/runs/0/tasks?{query}").text
    places = [place.replace("&amp;", "&") for place in re.findall(r'href="(task\?[^"]+)"', page)[:5]]
    waits = []
    for place in places:
        began = time.perf_counter()
        client.get(f"/runs/0/{place}").raise_for_status()
        waits.append(1000 * (time.perf_counter() - began))
    return max(waits)


def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="vcot-bench-") as folder:
        directory = options.keep or Path(folder, "run")
        if not directory.exists():
            began = time.perf_counter()
            write_run(directory, options.responses, options.k)
            print(f"the run was written in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        found: dict[str, Any] = {"responses": options.responses, "k": options.k, "cores": os.cpu_count()}
        found |= measure_cold(directory) | measure_warm(directory)
        tenth = Path(folder, "tenth")
        write_run(tenth, options.responses // 10, options.k)
        found |= {"report_responses": options.responses // 10} | measure_report(tenth)
        found["ledger_mb"] = (directory / "ledger.sqlite").stat().st_size >> 20
        found["index_mb"] = sum(path.stat().st_size for path in (directory / "view").glob("index.sqlite*")) >> 20
    print(orjson.dumps(found).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The viewer's speed on a large run.")
    parser.add_argument("--responses", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--keep", type=Path, help="where the run is kept, or lies from before")
    main(parser.parse_args())
