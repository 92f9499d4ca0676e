"""One harness once: every question is asked once and answered, or it says so; and who is ahead of whom."""

import json
import sys
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from bench.peers import ways
from bench.peers.evaluation import Outcome, PeerError, measure, summarise
from bench.peers.meter import Meter, identify_text

ASK = ways.run_script("plain", Path(sys.executable))
QUESTIONS = ["Which?", "Which?", "Who?"]
NAMES = Counter(identify_text([{"type": "text", "text": text}]) for text in QUESTIONS)


@asynccontextmanager
async def asking(tmp_path, rows):
    async def answer(request):
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "x"}}
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": 1}})

    app, meter = web.Application(), Meter(identify_text)
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        path = tmp_path / "questions.jsonl"
        path.write_text("".join(json.dumps({"id": str(i)} | row) + "\n" for i, row in enumerate(rows)))
        async with meter.serve(f"http://127.0.0.1:{runner.addresses[0][1]}") as url:
            yield ways.Settings(tasks=path, out=tmp_path / "out", base_url=f"{url}/v1", k=1), meter
    finally:
        await runner.cleanup()


async def test_each_question_is_asked_once_whichever_bytes_its_image_has(tmp_path):
    rows = [{"prompt": text, "image": f"data:image/png;base64,{i}"} for i, text in enumerate(QUESTIONS)]
    async with asking(tmp_path, rows) as (settings, meter):
        outcome = await measure(ASK, settings, meter, NAMES, 60)
    assert 0 < outcome.start_s < outcome.seconds
    assert outcome.answers_per_s > 0
    assert 0 < outcome.cpu_s < outcome.seconds * 4


@pytest.mark.parametrize("texts", [QUESTIONS[:2], [*QUESTIONS, "Who?"], ["Which?", "Who?", "Who?"]])
async def test_one_that_asks_something_else_has_no_figures(tmp_path, texts):
    rows = [{"prompt": text, "image": "data:image/png;base64,a"} for text in texts]
    async with asking(tmp_path, rows) as (settings, meter):
        with pytest.raises(PeerError, match=f"sent {len(texts)} requests for 3 questions, and {len(texts)} were"):
            await measure(ASK, settings, meter, NAMES, 60)


def test_more_than_one_means_that_vcot_is_ahead():
    turn = {"vcot": Outcome(10, 2, 80, 4), "inspect": Outcome(20, 3, 20, 12), "lmms": Outcome(40, 2, 80, 2)}
    ratios = summarise([turn], {})["ratios"]
    assert (ratios["seconds_vs_inspect"], ratios["answers_per_s_vs_inspect"], ratios["cpu_s_vs_inspect"]) == (2, 4, 3)
    assert (ratios["answers_per_s_vs_lmms"], ratios["cpu_s_vs_lmms"]) == (1, 0.5)
    failed = summarise([{"vcot": turn["vcot"], "inspect": turn["inspect"]}], {"lmms": "it broke"})
    assert failed["harnesses"]["lmms"] == "it broke"
    assert not any(name.endswith("_lmms") for name in failed["ratios"])
