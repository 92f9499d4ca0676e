"""What `make endurance` takes an answer for, and that a difference between a stage and the ledger is seen."""

import pytest

from bench.endurance import Account, check_responses, judge_answer
from tests.services.run.deterministic_server import REF, draw_tasks, open_small
from vcot.pipeline.records import Response, SamplingParams, StageCount
from vcot.pipeline.sample import Plan

DIGESTS = {"base": "sha256:" + "a" * 64}
STAMP = {"x-vcot-checkpoint": "base", "x-vcot-digest": DIGESTS["base"]}
MODEL = b'{"model": "base@aaaaaaaaaaaa"}'
ERROR = b'{"error": {"message": "the engine was lost", "code": 502}}'


@pytest.mark.parametrize(
    ("status", "text", "found"),
    [
        (200, MODEL, "answered"),
        (200, b"data: " + MODEL + b"\n\ndata: [DONE]\n\n", "answered"),
        (200, b'{"model": "moved@bbbbbbbbbbbb"}', "mis_stamped"),
        (502, ERROR, "told"),
        (200, b"data: " + MODEL + b"\n\ndata: " + ERROR + b"\n\ndata: [DONE]\n\n", "told"),
        (200, b"data: " + MODEL + b"\n\n", "broken"),
        (502, b"<html>", "broken"),
        (200, b"", "broken"),
    ],
)
def test_an_answer_is_whole_an_error_in_words_or_broken(status, text, found):
    assert judge_answer(status, STAMP, text, DIGESTS) == found


async def test_what_the_stage_says_is_held_against_the_ledger(tmp_path):
    run = open_small(tmp_path / "run")
    sampling = SamplingParams(temperature=0.5, max_tokens=8, n=2, seed=0)
    plan = Plan(draw_tasks(run.images, 2), "thought_specific", REF, sampling)
    first, second = plan
    other = REF.model_copy(update={"digest": "sha256:" + "b" * 64})
    run.ledger.put(
        Response(
            key=key,
            group=request.key,
            task=request.task.id,
            index=index,
            checkpoint=ref,
            prompt=plan.prompt,
            sampling=request.sampling,
            text="(A)",
        )
        for request, ref in ((first, REF), (second, other))
        for index, key in enumerate(request.response_keys())
    )
    account = Account()
    check_responses(plan, run, StageCount(stage="sample", requested=4, ok=4), account)
    assert (account.counts["unaccounted"], account.counts["mis_stamped"]) == (0, 2)
    check_responses(plan, run, StageCount(stage="sample", requested=4, ok=3, failed=1, reasons={"lost": 1}), account)
    assert account.counts["unaccounted"] == 1
    check_responses(plan, run, None, account)
    assert account.counts["unaccounted"] == 5
    await run.ledger.finish()
