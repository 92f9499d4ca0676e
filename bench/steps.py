"""What judging and pairing a run take in memory, and how soon they show progress, beside a run held whole.

    make bench-steps          (python -m bench.steps [--responses N] [--k K] [--each] [--only STEP ...])

A ledger is filled with `--responses` responses of about 200 tokens, k to a task. Then each step, in a process of its own,
goes through it: `judge` scores every response by a program, `pair` makes the pairs, their digest and the Parquet files.
`whole` reads every response and judgment at once first, as the steps did before; it makes no pairs. Printed for each:
`peak_mb` (resident memory of the process, about 100 of them Python and its libraries), `first_progress_s`,
`responses_per_s`; and `bytes_per_response`, by which `peak_mb` exceeds that of the same step on a tenth of the run.

With `--each`, instead: `judge KIND` for every judge that is built in, where a model's answers are made in the process, `pair
POLICY` for every pair policy without the texts and files, which are the same for all, and `preview`, which goes through
all policies at once. There the drawn judgments and the image gains that policies go by are in the ledger from the start.
`--only` names the steps to measure, as `--only "pair image_driven" preview`.

What remains in memory is a `Task` for each question (2.5 kB) and, in `pair`, the keys of its pair.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import orjson
from PIL import Image

from bench.ledger import MADE, make_group
from vcot.pipeline.gain import key_gain, read_gains
from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges import Judge, find_judge, judgment_keys
from vcot.pipeline.judges.model import ModelJudge
from vcot.pipeline.judging import find_standing, judge_responses, read_judged
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.open_lists import JUDGE_NAMES, PAIR_POLICY_NAMES
from vcot.pipeline.pair_preview import Previewing
from vcot.pipeline.pairs import build_pairs, needs_gains, read_pairs, split_pairs
from vcot.pipeline.publish import pairs_digest, publish_pairs
from vcot.pipeline.records import ImageGain, ImageRef, Judgment, Response, SamplingParams, Task, Verdict
from vcot.pipeline.sample import Groups, Plan
from vcot.pipeline.sections import JudgeSection, PairsSection
from vcot.pipeline.stage import batched

SECTION = JudgeSection(max_concurrency=64)
_NUM_IMAGES = 1000
_MODEL = {"model": "m", "base_url": "http://model/v1", "image": "none"}
_MEMBERS = {
    "gated": (JudgeSection(kind="verifier"),),
    "ensemble": (JudgeSection(kind="verifier"), JudgeSection(kind="pointwise", **_MODEL)),
}
_FIELDS = {
    "verdict": {"rationale": "It is drawn.", "score": 7},
    "score": {"score": 7},
    "claims": {"claims": ["The table is red.", "The dog is old."]},
    "comparison": {"rationale": "It is drawn.", "better": "A"},
}
"""What a model answers, by the name of the format that it is asked for; without one, it is asked for yes or no."""


class Drawing(Judge):
    """A score that the response's key decides."""

    name = "drawing/1"

    async def score(self, task: Task, response: Response, *, num_asked: int = 0) -> Verdict:
        return draw_verdict(response)


def draw_verdict(response: Response) -> Verdict:
    score = float(random.Random(response.key).randint(1, 10))
    return Verdict(score=score, low=score - 1, high=score + 1, rationale="It is drawn. " * 20)


class Timed:
    """Hands on, and remembers when it first did."""

    def __init__(self) -> None:
        self.began, self.first = time.perf_counter(), 0.0

    def watch(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.note()
            yield item

    def note(self, *_: object) -> None:
        self.first = self.first or time.perf_counter() - self.began


def make_tasks(number: int, images: Sequence[ImageRef]) -> list[Task]:
    """Questions about few images."""
    choices = ("skateboarder", "train", "delivery", "cab")
    return [
        Task(
            id=f"aokvqa/{i:022d}", question=f"What is the man by the bags number {i} awaiting?", choices=choices, answer=3,
            rationale="A train would not be on the street. " * 4, source="aokvqa", split="train",
            images=(images[i % len(images)],),
        )
        for i in range(number)
    ]  # fmt: skip


class Made:
    """The run in `folder`; nothing of its responses is held."""

    def __init__(self, folder: Path, num_tasks: int, k: int) -> None:
        self.images, self.ledger = ImageStore(folder), Ledger(folder / "ledger.sqlite")
        drawn = [self.images.put_png(Image.new("RGB", (8, 6), (i % 256, i // 256, 0))) for i in range(_NUM_IMAGES)]
        self.tasks = make_tasks(num_tasks, drawn)
        sampling = SamplingParams(temperature=0.5, max_tokens=1024, n=k, seed=0)
        self.plan = Plan(self.tasks, "thought_specific", MADE, sampling)
        self.judge = Drawing(SECTION, self.images)

    @property
    def groups(self) -> Groups:
        return Groups(self.plan, self.ledger)

    def fill(self, *, is_judged: bool) -> None:
        """All responses; with `is_judged`, also their drawn judgments and gains."""
        for number, requests in enumerate(batched(self.plan, 64)):
            made: list[Any] = []
            for offset, request in enumerate(requests):
                group = []
                for response in make_group(64 * number + offset, request.sampling.n):
                    letter, said = "ABCD"[response.index % 4], response.answer or ""
                    fields = {
                        "key": request.response_key(response.index),
                        "group": request.key,
                        "task": request.task.id,
                        "text": (response.text or "").replace("(B)", f"({letter})"),
                        "answer": said.replace("(B)", f"({letter})"),
                    }
                    group.append(response.model_copy(update=fields | {"sampling": request.sampling}))
                made += group + (self._judge(request.task, group) if is_judged else [])
            self.ledger.put(made)

    def _judge(self, task: Task, group: Sequence[Response]) -> list[Judgment | ImageGain]:
        made: list[Judgment | ImageGain] = []
        for key, response in zip(judgment_keys(self.judge, task, group), group, strict=True):
            fields = dict(draw_verdict(response))
            made.append(
                Judgment(key=key, response=response.key, task=task.id, judge="drawing/1", num_asked=1, **fields)
            )
            gain = 4 * random.Random(response.key).random()
            fields = {"logp_true": gain - 200.0, "logp_blank": -200.0, "num_tokens": 200}
            made.append(ImageGain(key=key_gain(response), response=response.key, checkpoint=MADE.digest, **fields))
        return made


async def judge(made: Made, folder: Path, timed: Timed) -> None:
    standing = find_standing(made.judge, timed.watch(iter(made.groups)), made.ledger, SECTION)
    await judge_responses(made.judge, made.groups, made.ledger, SECTION, standing=standing)


async def pair(made: Made, folder: Path, timed: Timed) -> None:
    couples = build_pairs(read_judged(made.judge, timed.watch(iter(made.groups)), made.ledger)).pairs
    splits = split_pairs(couples, 0.1, 0)
    train, validation = (read_pairs(split, made.tasks, made.ledger) for split in splits)
    pairs_digest(train, validation)
    train, validation = (read_pairs(split, made.tasks, made.ledger) for split in splits)
    publish_pairs(train, validation, made.images, folder / "pairs", card=lambda _: "")


def answer(request: httpx2.Request) -> httpx2.Response:
    """A model's, at once."""
    body = orjson.loads(request.content)
    name = body.get("response_format", {}).get("json_schema", {}).get("name")
    text = orjson.dumps(_FIELDS[name]).decode() if name else "yes"
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    if body.get("logprobs"):
        top = [{"token": str(score), "logprob": -2.0, "bytes": None} for score in range(3, 9)]
        choice["logprobs"] = {"content": [{"token": "7", "logprob": -2.0, "bytes": None, "top_logprobs": top}]}
    usage = {"prompt_tokens": 900, "completion_tokens": 20, "total_tokens": 920}
    content = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": usage, "choices": [choice]}
    return httpx2.Response(200, content=orjson.dumps(content), headers={"content-type": "application/json"})


async def judge_by(kind: str, made: Made, folder: Path, timed: Timed) -> None:
    given = {} if kind in ("verifier", *_MEMBERS) else _MODEL | ({"schedule": "swiss"} if kind == "pairwise" else {})
    section = JudgeSection(kind=kind, max_concurrency=64, members=_MEMBERS.get(kind, ()), **given)
    for each in find_judge(section, made.images).walk():
        if isinstance(each, ModelJudge):
            each.transport = httpx2.MockTransport(answer)
        async with each:
            groups = timed.watch(iter(made.groups))
            standing = find_standing(each, groups, made.ledger, each.section)
            count = await judge_responses(each, made.groups, made.ledger, each.section, standing=standing)
        assert count.ok + count.cached == count.requested, count


async def pair_by(policy: str, made: Made, folder: Path, timed: Timed) -> None:
    section = PairsSection(policy=policy)
    judged = read_judged(made.judge, timed.watch(iter(made.groups)), made.ledger)
    found = build_pairs(read_gains(judged, made.ledger) if needs_gains(section) else judged, section)
    split_pairs(found.pairs, 0.1, 0)
    assert found.count.ok, found.count


async def preview(made: Made, folder: Path, timed: Timed) -> None:
    previewing = Previewing(PairsSection())
    for task, judged in read_gains(read_judged(made.judge, timed.watch(iter(made.groups)), made.ledger), made.ledger):
        previewing.add(task, judged)
    assert all(row.num_pairs for row in previewing.close().policies)


async def whole(made: Made, folder: Path, timed: Timed) -> None:
    """What judging and pairing held before they began."""
    keys = [key for request in list(made.plan) for key in request.response_keys()]
    responses = made.ledger.get(Response, keys)
    tasks = {task.id: task for task in made.tasks}
    judged = {judgment_keys(made.judge, tasks[r.task], [r])[0]: r for r in responses.values()}
    judgments = made.ledger.get(Judgment, judged)
    timed.note()
    assert len(judgments) == len(responses)


STEPS: dict[str, Callable[[Made, Path, Timed], Any]] = {"judge": judge, "pair": pair, "whole": whole}
EACH: dict[str, Callable[[Made, Path, Timed], Any]] = {
    **{f"judge {kind}": partial(judge_by, kind) for kind in JUDGE_NAMES.built_ins},
    **{f"pair {policy}": partial(pair_by, policy) for policy in PAIR_POLICY_NAMES.built_ins},
    "preview": preview,
}
_FILLS = {"fill": False, "fill judged": True}


def measure(step: str, folder: Path, num_responses: int, k: int) -> dict[str, float]:
    import asyncio

    made, timed = Made(folder, num_responses // k, k), Timed()
    if step in _FILLS:
        made.fill(is_judged=_FILLS[step])
        return {}
    asyncio.run((STEPS | EACH)[step](made, folder, timed))
    return {
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "first_progress_s": round(timed.first, 2),
        "responses_per_s": round(num_responses / (time.perf_counter() - timed.began)),
    }


def run(steps: Sequence[str], num_responses: int, k: int) -> dict[str, dict[str, float]]:
    """Each in a process of its own, over one run."""
    found, fill = {}, "fill judged" if set(steps) & EACH.keys() else "fill"
    with tempfile.TemporaryDirectory(prefix="vcot-bench-") as folder:
        for step in (fill, *steps):
            command = [sys.executable, "-m", "bench.steps", "--step", step, "--folder", folder, "--k", str(k)]
            done = subprocess.run(
                [*command, "--responses", str(num_responses)], check=True, stdout=subprocess.PIPE, text=True
            )
            found[step] = json.loads(done.stdout)
            print(f"{num_responses} responses, {step}: {done.stdout.strip()}", file=sys.stderr, flush=True)
    return {step: found[step] for step in steps}


def main(options: argparse.Namespace) -> None:
    if options.step:
        print(orjson.dumps(measure(options.step, Path(options.folder), options.responses, options.k)).decode())
        return
    steps = options.only or tuple(EACH if options.each else STEPS)
    small, found = run(steps, options.responses // 10, options.k), run(steps, options.responses, options.k)
    for step, figures in found.items():
        grown = figures["peak_mb"] - small[step]["peak_mb"]
        figures["bytes_per_response"] = round(grown * 1024 * 1024 / (0.9 * options.responses))
    head = {"responses": options.responses, "k": options.k, "cores": os.cpu_count()}
    if "whole" in found:
        head["peak_to_whole"] = {
            step: round(figures["peak_mb"] / found["whole"]["peak_mb"], 2)
            for step, figures in found.items()
            if step != "whole"
        }
    head["most_mb"] = max(figures["peak_mb"] for step, figures in found.items() if step != "whole")
    print(orjson.dumps({**head, **found}).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Memory of judging and pairing a large run.")
    parser.add_argument("--responses", type=int, help="100,000, and with --each 4,000, unless given")
    parser.add_argument("--each", action="store_true", help="every judge and every pair policy")
    parser.add_argument("--only", nargs="+", choices=(*STEPS, *EACH), help="these steps")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--step", choices=(*_FILLS, *STEPS, *EACH), help="do one step, in this process")
    parser.add_argument("--folder", help="the run of that step")
    arguments = parser.parse_args()
    arguments.responses = arguments.responses or (4_000 if arguments.each else 100_000)
    main(arguments)
