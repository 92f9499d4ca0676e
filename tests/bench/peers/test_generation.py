"""The accounting of the comparison: what is kept, left and asked anew, by the plain loop against a small server."""

import asyncio
import json
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web

from bench.peers import ways
from bench.peers.generation import Outcome, PeerError, follow, measure, summarise
from bench.peers.meter import Meter, identify

TASKS = 40


@asynccontextmanager
async def serving(answer):
    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def answer_all(request: web.Request) -> web.Response:
    body = await request.json()
    await asyncio.sleep(0.3)
    choices = [{"index": i, "message": {"role": "assistant", "content": f"{i}"}} for i in range(body["n"])]
    return web.json_response({"choices": choices, "usage": {"completion_tokens": 5 * body["n"]}})


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [{"id": f"t{i}", "prompt": f"Which of {i}?", "image": f"data:image/png;base64,{i}"} for i in range(TASKS)]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PLAIN = ways.Way(ways.run_script("plain", Path(sys.executable)), ways.count_lines, ways.count_lines)


async def test_what_is_kept_left_and_asked_anew_adds_up(tmp_path, tasks):
    meter = Meter()
    async with serving(answer_all) as upstream, meter.serve(upstream) as url:
        settings = ways.Settings(tasks=tasks, out=tmp_path / "out", base_url=f"{url}/v1", concurrency=4)
        outcome = await measure(PLAIN, settings, meter, 60)
    assert (outcome.kept, outcome.requests, outcome.tokens) == (8 * TASKS, TASKS, 40 * TASKS)
    assert (outcome.kept_again, outcome.hung) == (8 * TASKS, 0)
    assert outcome.asked_anew == TASKS - outcome.left // 8
    assert outcome.left % 8 == 0
    assert outcome.paid_twice <= 4
    assert outcome.start_s < outcome.seconds
    assert outcome.total_s > outcome.start_s


ASKS_ALL_AT_ONCE = """
import json, sys, threading, urllib.request
def ask(task):
    parts = [{"type": "text", "text": task["prompt"]}, {"type": "image_url", "image_url": {"url": task["image"]}}]
    body = json.dumps({"messages": [{"content": parts}], "n": 8}).encode()
    urllib.request.urlopen(sys.argv[1] + "/chat/completions", body).read()
for task in map(json.loads, open(sys.argv[2])):
    threading.Thread(target=ask, args=(task,)).start()
for thread in threading.enumerate():
    thread is threading.current_thread() or thread.join()
threading.Event().wait(2)
"""


async def test_what_a_way_forgets_is_seen_to_be_paid_twice(tmp_path, tasks):
    def command(settings: ways.Settings) -> list[str]:
        return [sys.executable, "-S", "-c", ASKS_ALL_AT_ONCE, settings.base_url, str(settings.tasks)]

    meter = Meter()
    async with serving(answer_all) as upstream, meter.serve(upstream) as url:
        settings = ways.Settings(tasks=tasks, out=tmp_path / "out", base_url=f"{url}/v1")
        outcome = await measure(ways.Way(command, lambda out: 0, lambda out: 0), settings, meter, 60)
    assert (outcome.left, outcome.asked_anew) == (0, TASKS)
    assert 0 < outcome.paid_twice <= TASKS


async def test_a_command_that_fails_says_why_and_one_that_hangs_is_ended(tmp_path, tasks):
    settings = ways.Settings(tasks=tasks, out=tmp_path, base_url="http://127.0.0.1:1/v1")
    failing = ways.Way(lambda _: ["sh", "-c", "echo no model; exit 3"], lambda out: 0, lambda out: 0)
    with pytest.raises(PeerError, match=r"(?s)ended with 3.*no model"):
        await follow(failing.command, settings, Meter(), 20)
    hanging = ways.Way(lambda _: ["sleep", "60"], lambda out: 0, lambda out: 0)
    course = await follow(hanging.command, settings, Meter(), 0.5)
    assert not course.has_ended
    assert course.seconds < 30
    with pytest.raises(PeerError, match="did not end"):
        await measure(hanging, settings, Meter(), 0.5)


def test_a_task_is_the_same_whichever_comes_first():
    text, image = {"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "b", "detail": "auto"}}
    assert identify([text, image]) == identify([image, text]) != identify([text])


def test_a_torn_line_is_no_response(tmp_path):
    (tmp_path / "responses.jsonl").write_text('{"id": "a", "responses": ["x", null]}\n{"id": "b", "resp')
    assert ways.count_lines(tmp_path) == 1


def test_what_distilabel_and_curator_leave(tmp_path):
    batch = {"data": [[{"generation": ["x", "y"]}, {"generation": ["z", None]}]]}
    steps, cache = tmp_path / "cache/peers/steps_data/generate_1", tmp_path / "cache/2"
    steps.mkdir(parents=True)
    cache.mkdir()
    (steps / "batch_0.json").write_text(json.dumps(batch))
    rows = [{"parsed_response_message": [{"responses": ["x", "y"]}]}, {"parsed_response_message": None}]
    (cache / "responses_0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (ways.count_batches(tmp_path), ways.count_answers(tmp_path)) == (3, 2)
    assert ways.count_table(tmp_path, "responses") == 0
    pq.write_table(pa.table({"responses": [["x", "y"], ["z", None]]}), tmp_path / "responses.parquet")
    assert ways.count_table(tmp_path, "responses") == 3


def test_a_ratio_is_taken_within_a_round_and_a_way_that_failed_has_none():
    def outcome(seconds: float) -> Outcome:
        return Outcome(seconds, 1, 8, 1, 8, 0, 1, 1, 2 * seconds, 0, 8)

    rounds = [{"vcot": outcome(2), "plain": outcome(4)}, {"vcot": outcome(30), "plain": outcome(10)}]
    figures = summarise(rounds, {"distilabel": "no", "curator": "no"})
    assert figures["ratios"] == {"seconds_vs_plain": 1.75, "total_s_vs_plain": 1.75}
    assert figures["ways"]["distilabel"] == "no"
    assert figures["ways"]["vcot"]["seconds"] == 16
