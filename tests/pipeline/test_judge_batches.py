"""Judging by batches, against the simulated API: what is submitted, and that a stop loses nothing and pays nothing twice."""

import json
from contextlib import suppress

import httpx2
import pytest
from PIL import Image

from tests.pipeline.judges.model_api import make_response
from tests.rehearsal.openai_api import Settings, create_app
from vcot.pipeline.errors import AccountError, RequestError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.judge_batches import BatchClient, Batches, judge_in_batches
from vcot.pipeline.judges import judgment_keys
from vcot.pipeline.judges.cost import open_meter
from vcot.pipeline.judges.pairwise import PairwiseJudge
from vcot.pipeline.judges.pointwise import PointwiseJudge
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.records import Judgment, Task
from vcot.pipeline.sample import Group
from vcot.pipeline.sections import JudgeSection

pytestmark = pytest.mark.hurried
NUM = 30


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-rehearsal")


class Stopped(Exception):
    """As if the command had been killed."""


class Bench:
    """A run with 30 responses to five tasks, and a judge behind a transport."""

    def __init__(self, directory, kind=PointwiseJudge, **fields):
        self.directory, self.kind = directory, kind
        name = "pairwise" if kind is PairwiseJudge else "pointwise"
        self.section = JudgeSection(kind=name, model="gpt-4o-mini", batch=True, **fields)
        self.images = ImageStore(directory)
        self.ledger = Ledger(directory / "ledger.sqlite")
        image = self.images.put_png(Image.new("RGB", (64, 64), "red"))
        asked = {
            "question": "q?",
            "choices": ("a", "b"),
            "answer": 0,
            "image": image,
            "source": "nano",
            "split": "train",
        }
        self.groups = []
        for task in range(5):
            texts = [f"The thing of {task} is number {number}. <R> The answer is (A)" for number in range(6)]
            responses = [make_response(n, text, task=f"t{task}") for n, text in enumerate(texts)]
            self.groups.append(Group(Task(id=f"t{task}", **asked), responses))

    async def judge(self, app, *, max_polls=99, **options):
        """One command's judging; it stops as if killed after so many polls. Gives the count."""
        polls = 0

        async def sleep(_):
            nonlocal polls
            polls += 1
            if polls > max_polls:
                raise Stopped

        judge = self.kind(self.section, self.images, transport=httpx2.ASGITransport(app=app))
        async with judge, judge.open(BatchClient, Batches(self.directory / "batches")) as client:
            meter = open_meter(self.section, *self.ledger.spent(judge.name))
            with judge.asking_by(client):
                return await judge_in_batches(
                    judge, client, self.groups, self.ledger, self.section, meter=meter, sleep=sleep, **options
                )  # fmt: skip

    @property
    def scores(self):
        judge = self.kind(self.section, self.images)
        keys = [key for group in self.groups for key in judgment_keys(judge, group.task, group.found)]
        found = self.ledger.get(Judgment, keys)
        return [found[key].score if key in found else None for key in keys]


def make_app(**settings):
    app = create_app(Settings(**settings))
    return app, app.state.api.counts


async def score_one_by_one(tmp_path):
    """The scores that the API gives without batches."""
    from vcot.pipeline.judging import judge_responses

    bench = Bench(tmp_path)
    judge = PointwiseJudge(bench.section, bench.images, transport=httpx2.ASGITransport(app=make_app()[0]))
    async with judge:
        await judge_responses(judge, bench.groups, bench.ledger, bench.section)
    return bench.scores


async def test_a_batch_gives_the_scores_that_single_requests_give_for_half_the_price(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "batch").mkdir()
    bench, (app, counts) = Bench(tmp_path / "batch"), make_app()
    told = []
    count = await bench.judge(app, on_states=lambda done, total, states: told.append((done, total, states)))
    assert (count.ok, count.failed, count.refused) == (NUM, 0, 0)
    assert bench.scores == await score_one_by_one(tmp_path / "one")
    assert (counts["batches"], counts["answers"], counts["repeats"], counts["calls"]) == (1, NUM, 0, 0)
    assert told[0][1:] == (NUM, "1 in progress")
    assert told[-1] == (NUM, NUM, "1 completed")
    num, usage = bench.ledger.spent("pointwise/1:gpt-4o-mini")
    meter = open_meter(bench.section, num, usage)
    assert meter.cost.usd == pytest.approx((usage.prompt_tokens * 0.075 + usage.completion_tokens * 0.30) / 1e6)


async def test_a_command_that_was_stopped_while_it_waited_goes_on_with_the_same_batch(tmp_path):
    bench, (app, counts) = Bench(tmp_path), make_app(batch_polls=5)
    for _ in range(2):
        with pytest.raises(Stopped):
            await bench.judge(app, max_polls=1)
    assert (counts["batches"], counts["uploads"]) == (1, 1)
    assert (await bench.judge(app)).ok == NUM
    assert (counts["batches"], counts["answers"], counts["repeats"]) == (1, NUM, 0)


async def test_a_batch_whose_id_was_not_noted_is_found_again(tmp_path):
    bench, (app, counts) = Bench(tmp_path), make_app(batch_polls=5)
    with pytest.raises(Stopped):
        await bench.judge(app, max_polls=0)
    (record,) = (tmp_path / "batches").glob("*.json")
    record.unlink()
    assert (await bench.judge(app)).ok == NUM
    assert (counts["batches"], counts["repeats"]) == (1, 0)


async def test_answers_that_were_fetched_are_not_asked_for_again(tmp_path):
    bench, (app, counts) = Bench(tmp_path), make_app()
    await bench.judge(app)
    (tmp_path / "again").mkdir()
    other = Bench(tmp_path / "again")
    (tmp_path / "batches").rename(tmp_path / "again" / "batches")
    assert (await other.judge(app)).ok == NUM
    assert (counts["batches"], counts["answers"]) == (1, NUM)


async def test_what_the_api_did_not_come_to_is_asked_again_and_the_rest_is_kept(tmp_path):
    bench, (app, counts) = Bench(tmp_path), make_app(faults={"batch_left": 0.3})
    assert (await bench.judge(app)).ok == NUM
    assert counts["batches"] > 1
    assert (counts["answers"], counts["repeats"]) == (NUM, 0)


async def test_a_command_that_was_stopped_in_the_second_batch_takes_its_answers_and_asks_for_none_again(tmp_path):
    bench, (app, counts) = Bench(tmp_path), make_app(faults={"batch_left": 0.3}, batch_polls=2)
    for _ in range(9):
        with suppress(Stopped):
            count = await bench.judge(app, max_polls=3)
            break
    assert count.requested == NUM
    assert counts["batches"] > 2
    assert (counts["answers"], counts["repeats"]) == (NUM, 0)


def test_the_same_requests_are_submitted_anew_where_the_api_came_to_none_of_them(tmp_path):
    batches = Batches(tmp_path / "b")
    names = set()
    for _ in range(3):
        with pytest.raises(RequestError, match="it waits for a batch"):
            batches.take({"model": "m"}, "x")
        batches.cut_queue(None)
        (path,) = batches.list_pending()
        names.add(path.name)
        request = json.loads(path.read_bytes())
        not_come_to = {"custom_id": request["custom_id"], "response": None, "error": {"message": "expired"}}
        batches.keep(path, json.dumps(not_come_to).encode())
    assert len(names) == 3, "each has a digest of its own, by which the API's batch is found"


async def test_items_with_faults_of_their_own_are_refused_by_reason(tmp_path):
    bench, (app, counts) = Bench(tmp_path, max_unjudged=0.9), make_app(faults={"refusal": 0.2, "filter_400": 0.2})
    count = await bench.judge(app)
    assert count.ok + count.refused == NUM
    assert set(count.reasons) == {"refusal", "content_filter"}
    assert counts["batches"] == 1


async def test_a_batch_that_the_api_refuses_ends_the_stage_with_its_words_and_is_made_anew(tmp_path):
    bench, (refusing, _) = Bench(tmp_path), make_app(faults={"batch_refused": 1.0})
    with pytest.raises(AccountError, match=r"batch batch_0 was refused: Enqueued token limit reached for gpt-4o-mini"):
        await bench.judge(refusing)
    app, counts = make_app()
    assert (await bench.judge(app)).ok == NUM
    assert counts["batches"] == 1


async def test_a_wrong_key_ends_the_stage_before_anything_is_submitted(tmp_path, monkeypatch):
    bench = Bench(tmp_path)
    transport = httpx2.MockTransport(lambda _: httpx2.Response(401, json={"error": {"message": "Incorrect API key"}}))
    judge = PointwiseJudge(bench.section, bench.images, transport=transport)
    async with judge, judge.open(BatchClient, Batches(tmp_path / "batches")) as client:
        meter = open_meter(bench.section, *bench.ledger.spent(judge.name))
        with judge.asking_by(client), pytest.raises(AccountError, match=r"Incorrect API key.*the same command goes on"):
            await judge_in_batches(judge, client, bench.groups, bench.ledger, bench.section, meter=meter)
    assert bench.scores == [None] * NUM


async def test_only_what_the_cap_allows_is_submitted(tmp_path):
    bench, (app, counts) = Bench(tmp_path, max_cost_usd=0.003), make_app()
    with pytest.raises(AccountError, match=r"could exceed judge\.max_cost_usd = 0\.003; raise judge\.max_cost_usd"):
        await bench.judge(app)
    _, usage = bench.ledger.spent("pointwise/1:gpt-4o-mini")
    usd = (usage.prompt_tokens * 0.075 + usage.completion_tokens * 0.30) / 1e6
    assert 0.002 < usd <= 0.003
    assert sum(score is not None for score in bench.scores) == counts["answers"] < NUM


async def test_verdicts_of_several_requests_take_several_batches_and_nothing_twice(tmp_path):
    bench, (app, counts) = Bench(tmp_path, PairwiseJudge, schedule="swiss"), make_app()
    assert (await bench.judge(app)).ok == NUM
    assert counts["batches"] == 4, "a round each"
    assert counts["repeats"] == 0
    assert None not in bench.scores


async def test_a_parameter_that_the_model_does_not_take_is_left_out_in_the_next_batch(tmp_path):
    bench, (app, counts) = Bench(tmp_path), make_app()
    bench.section = bench.section.model_copy(update={"model": "gpt-5-mini", "input_usd": 1.0, "output_usd": 1.0})
    assert (await bench.judge(app)).ok == NUM
    assert counts["answers"] == NUM


def test_a_request_is_one_line_as_the_api_takes_it(tmp_path):
    batches = Batches(tmp_path / "b")
    for body in ({"model": "m", "messages": []}, {"model": "m", "messages": []}, {"model": "n", "messages": []}):
        with pytest.raises(Exception, match="it waits for a batch"):
            batches.take(body, "x")
    assert batches.num_queued == 2
    batches.cut_queue(1)
    (path,) = batches.list_pending()
    (line,) = map(json.loads, path.read_text().splitlines())
    assert (line["method"], line["url"], line["body"]) == (
        "POST",
        "/v1/chat/completions",
        {"model": "m", "messages": []},
    )
    assert batches.num_queued == 0
