"""Bad input and faults that are met from sampling to pairs: each ends in a counted, named state, and nothing else is lost.

What a source refuses (two tasks with one id, a column that is not there, an image of 0 bytes, Unicode controls) is in
sources/test_own_table.py; two processes on one run in test_run.py; a full disk in test_ledger.py and test_files.py.
"""

import io
import json
import warnings

import httpx2
import pytest
from PIL import Image

from tests.pipeline.test_judging import Bench, complete
from tests.pipeline.test_sample import CHECKPOINT, SAMPLING, Upstream, draw, ledger, store, tasks
from vcot.pipeline.concurrency import MAX_ATTEMPTS
from vcot.pipeline.errors import DataError, StageError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.pairs import Judged, build_pairs
from vcot.pipeline.records import Response
from vcot.pipeline.sections import PairsSection

__all__ = ["ledger", "store", "tasks"]
pytestmark = pytest.mark.hurried
EIGHT = SAMPLING.model_copy(update={"n": 8})


async def test_a_server_that_keeps_answering_seven_of_eight_choices_fails_that_group_by_name(tasks, ledger, store):
    upstream = Upstream([Upstream.answer({}, n=7)] * MAX_ATTEMPTS)
    count, responses = await draw(upstream, tasks, ledger, store, params=EIGHT, concurrency=1)
    assert (count.requested, count.ok, count.failed, count.reasons) == (48, 40, 8, {"incomplete": 8})
    errors = {response.error for response in responses.values() if response.error}
    assert errors == {"asked for 8 choices, the answer holds 7"}
    count, _ = await draw(Upstream(), tasks, ledger, store, params=EIGHT)
    assert (count.cached, count.ok, count.failed) == (40, 8, 0), "the same command asks for that group again"


async def test_a_server_that_answers_seven_of_eight_to_all_ends_the_stage_and_says_so(tasks, ledger, store):
    class Seven(Upstream):
        @staticmethod
        def answer(body, **options):
            return Upstream.answer(body, n=7)

    with pytest.raises(StageError, match="asked for 8 choices, the answer holds 7; see that the server runs"):
        await draw(Seven(), tasks, ledger, store, params=EIGHT, concurrency=1)


class Saying(Upstream):
    """Says the same to every request."""

    def __init__(self, text, finish_reason="stop"):
        super().__init__()
        self.text, self.finish_reason = text, finish_reason

    async def __call__(self, request):
        whole = await super().__call__(request)
        body = json.loads(whole.content)
        for choice in body["choices"]:
            choice |= {"message": {"role": "assistant", "content": self.text}, "finish_reason": self.finish_reason}
        return httpx2.Response(200, json=body, headers=whole.headers)


async def test_no_text_at_all_is_refused_as_empty(tasks, ledger, store):
    silent = await Saying(None)(httpx2.Request("POST", "http://x", json={"n": 2}))
    upstream = Upstream([silent])
    count, responses = await draw(upstream, tasks, ledger, store, concurrency=1)
    assert (count.ok, count.refused, count.reasons) == (10, 2, {"empty": 2})
    assert sum("no text" in (response.error or "") for response in responses.values()) == 2


def judged(index, text, score, finish_reason="stop"):
    response = Response(
        key=f"r{index}", group="g", task="t0", index=index, checkpoint=CHECKPOINT, prompt="thought_specific",
        sampling=SAMPLING, text=text, finish_reason=finish_reason,
    )  # fmt: skip
    return Judged(response, score, "j/1", f"j{index}")


async def test_an_empty_text_is_a_response_and_is_never_chosen_whatever_a_judge_says(tasks, ledger, store):
    count, responses = await draw(Saying(""), tasks, ledger, store)
    assert count.ok == 12
    assert {(response.text, response.answer) for response in responses.values()} == {("", None)}
    made = build_pairs([(tasks[0], [judged(0, " \n", 1.0), judged(1, "It is b. <R> B", 0.5), judged(2, "", 0.0)])])
    assert [(pair.chosen_key, pair.rejected_key) for pair in made.pairs] == [("r1", "r2")]
    none = build_pairs([(tasks[0], [judged(0, "", 1.0), judged(1, " ", 0.0)])])
    assert (none.pairs, none.count.refused, none.count.reasons) == ((), 1, {"all_empty": 1})


async def test_a_text_that_was_cut_is_kept_as_cut_and_its_task_counted(tasks, ledger, store):
    count, responses = await draw(Saying("It is", "length"), tasks, ledger, store)
    assert count.ok == 12
    assert {response.finish_reason for response in responses.values()} == {"length"}
    cut = [judged(0, "It is", 1.0, "length"), judged(1, "", 0.0)]
    assert build_pairs([(tasks[0], cut)]).count.reasons == {"all_cut_off": 1}
    assert build_pairs([(tasks[0], cut)], PairsSection(choose_cut=True)).count.ok == 1


@pytest.mark.parametrize(
    "said",
    [
        "I think it is a fine answer, all in all.",
        json.dumps({"rationale": "x", "score": 11}),
        '{"rationale": "x", "score": NaN}',
        '{"rationale": "x", "score": Infinity}',
    ],
    ids=["prose", "11 of 10", "NaN", "Infinity"],
)
async def test_a_judge_that_says_what_is_no_score_is_counted_as_unreadable_and_the_run_goes_on(
    tmp_path, monkeypatch, said
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    bench, good = Bench(tmp_path), json.dumps({"rationale": "x", "score": 7})

    def answer(request):
        return complete(said if "number 7." in request.content.decode() else good)

    count = await bench.judge(answer)
    assert (count.ok, count.refused, count.failed, count.reasons) == (59, 1, 0, {"unreadable": 1})
    kept = [judgment for judgment in bench.judgments.values() if judgment.error]
    assert [(judgment.response, judgment.score, judgment.refused) for judgment in kept] == [("r7", None, True)]


def test_an_image_of_20000_pixels_a_side_is_named_and_is_not_decoded(tmp_path):
    """49 KB of file, 1.2 GB of pixels."""
    data = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(data, "PNG")
    (tmp_path / "huge.png").write_bytes(data.getvalue())
    with pytest.raises(DataError, match=r"huge\.png cannot be read \(Image size \(400000000 pixels\) exceeds limit"):
        ImageStore(tmp_path).put_file(tmp_path / "huge.png")
    assert not (tmp_path / "images").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ref = ImageStore(tmp_path).put_png(Image.new("RGB", (20_000, 4)))
    assert (ref.width, ref.height) == (20_000, 4), "long, and not many pixels"
