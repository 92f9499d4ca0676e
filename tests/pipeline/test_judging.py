"""The judging stage against the simulated API: what is refused, what stops, what is paid for, and what is asked again."""

import asyncio
import json

import httpx2
import pytest
from PIL import Image

from tests.rehearsal.openai_api import Settings, create_app
from vcot.pipeline.errors import AccountError, StageError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges import judgment_keys
from vcot.pipeline.judges.cost import open_meter
from vcot.pipeline.judges.pointwise import PointwiseJudge
from vcot.pipeline.judging import find_standing, find_unjudged_fault, judge_responses
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.records import CheckpointRef, Judgment, Response, SamplingParams, Task, Usage
from vcot.pipeline.sample import Group
from vcot.pipeline.sections import JudgeSection

pytestmark = pytest.mark.hurried
CHECKPOINT = CheckpointRef(name="base", digest="sha256:aa", kind="base")
SAMPLING = SamplingParams(temperature=0.5, max_tokens=8, n=8, seed=0)
COST_USD = 0.0005
"""About what gpt-4o-mini takes for one of these judgments."""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-rehearsal")


class Bench:
    """A run's ledger with 60 responses, and a judge behind a transport."""

    def __init__(self, directory):
        self.images = ImageStore(directory)
        self.ledger = Ledger(directory / "ledger.sqlite")
        image = self.images.put_png(Image.new("RGB", (64, 64), "red"))
        fields = {"question": "q?", "choices": ("a", "b"), "answer": 0, "source": "nano", "split": "train"}
        self.tasks = {"t": Task(id="t", images=(image,), **fields)}
        self.responses = [self.make_response(number) for number in range(60)]

    @staticmethod
    def make_response(number):
        text = f"The thing is number {number}. <R> The answer is (A)"
        return Response(
            key=f"r{number}", group="g", task="t", index=number, checkpoint=CHECKPOINT, prompt="thought_specific",
            sampling=SAMPLING, text=text,
        )  # fmt: skip

    def standing(self, judge, section):
        return find_standing(judge, self.groups, self.ledger, section)

    @property
    def groups(self):
        return [Group(self.tasks["t"], self.responses)]

    async def judge(self, target, **fields):
        """Judge by the app or upstream function `target`; gives the count."""
        section = JudgeSection(kind="pointwise", **({"model": "gpt-4o-mini", "max_concurrency": 4} | fields))
        is_app = hasattr(target, "state")
        transport = httpx2.ASGITransport(app=target) if is_app else httpx2.MockTransport(target)
        judge = PointwiseJudge(section, self.images, transport=transport)
        async with judge:
            meter = open_meter(section, *self.ledger.spent(judge.name))
            return await judge_responses(
                judge, self.groups, self.ledger, section, standing=self.standing(judge, section), meter=meter
            )  # fmt: skip

    @property
    def judgments(self):
        judge = PointwiseJudge(JudgeSection(kind="pointwise", model="gpt-4o-mini"), self.images)
        good = (response for response in self.responses if response.error is None)
        return self.ledger.get(Judgment, judgment_keys(judge, self.tasks["t"], list(good)))


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def make_api(**settings):
    return create_app(Settings(**settings))


def faulty(**faults):
    return make_api(faults=faults)


async def test_responses_that_say_the_same_are_judged_and_billed_once(bench):
    app, texts = make_api(), [response.text for response in bench.responses]
    bench.responses = [
        response.model_copy(update={"text": texts[number % 7] + " " * (number % 3)})
        for number, response in enumerate(bench.responses)
    ]
    count = await bench.judge(app)
    assert (count.requested, count.ok, app.state.api.counts["calls"]) == (60, 60, 7)
    scores = {}
    for judgment in bench.judgments.values():
        text = next(response.text for response in bench.responses if response.key == judgment.response)
        scores.setdefault(text.strip(), set()).add(judgment.score)
    assert len(scores) == 7
    assert all(len(found) == 1 for found in scores.values())
    assert {judgment.response for judgment in bench.judgments.values()} == {r.key for r in bench.responses}
    assert bench.ledger.spent("pointwise/1:gpt-4o-mini")[0] == 7
    bench.responses.append(bench.responses[3].model_copy(update={"key": "late"}))
    count = await bench.judge(app)
    assert (count.cached, count.ok, app.state.api.counts["calls"]) == (60, 1, 7)


async def test_a_twin_that_is_given_a_verdict_keeps_what_it_was_billed_itself(bench):
    bench.responses = [bench.responses[0], bench.responses[0].model_copy(update={"key": "twin"})]
    judge = PointwiseJudge(JudgeSection(kind="pointwise", model="gpt-4o-mini"), bench.images)
    (key,) = judgment_keys(judge, bench.tasks["t"], bench.responses[1:2])
    billed = Usage(prompt_tokens=7, completion_tokens=3)
    fields = {"key": key, "response": "twin", "task": "t", "judge": judge.name}
    bench.ledger.put([Judgment(error="cut off", reason="cut_off", usage=billed, **fields)])
    count = await bench.judge(app := make_api())
    assert (count.ok, app.state.api.counts["calls"]) == (2, 1)
    assert bench.judgments[key].score is not None
    assert bench.judgments[key].usage == billed


async def test_every_response_gets_its_score_and_what_it_took(bench):
    app = make_api()
    count = await bench.judge(app)
    assert (count.requested, count.ok, app.state.api.counts["calls"]) == (60, 60, 60)
    num_judgments, usage = bench.ledger.spent("pointwise/1:gpt-4o-mini")
    assert (num_judgments, usage.prompt_tokens) == (60, app.state.api.counts["prompt_tokens"])
    assert len({judgment.score for judgment in bench.judgments.values()}) > 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("refusal", "refusal"),
        ("filter", "content_filter"),
        ("filter_400", "content_filter"),
        ("length", "cut_by_length"),
        ("reasoning", "cut_by_length"),
        ("two_objects", "unreadable"),
    ],
)
async def test_an_answer_without_a_verdict_is_final_and_paid_for_once(bench, fault, reason):
    app = faulty(**{fault: 0.2})
    count = await bench.judge(app)
    assert count.ok + count.refused == 60
    assert count.reasons == {reason: count.refused}
    assert 3 <= count.refused <= 25
    assert app.state.api.counts["calls"] == 60
    refused = [judgment for judgment in bench.judgments.values() if judgment.refused]
    assert all(judgment.num_asked == 1 and judgment.error for judgment in refused)
    if fault != "filter_400":  # refused before anything was read, so that nothing is billed
        assert all(judgment.usage.prompt_tokens > 2833 for judgment in refused)
    again = await bench.judge(app, max_unjudged=0.9)
    assert (again.cached, again.refused, again.reasons) == (count.ok, count.refused, count.reasons)
    assert app.state.api.counts["calls"] == 60


async def test_a_verdict_in_a_fence_is_a_verdict(bench):
    count = await bench.judge(faulty(fence=1.0))
    assert count.ok == 60


async def test_too_many_without_a_verdict_are_a_fault_with_the_reasons_and_few_are_none(bench):
    section = JudgeSection(kind="pointwise", model="gpt-4o-mini", max_unjudged=0.1)
    count = await bench.judge(faulty(refusal=0.2, length=0.2))
    fault = find_unjudged_fault(count, section)
    assert f"{count.refused} of 60 responses were not judged ({count.by_reason})" in fault
    assert "judge.max_unjudged = 0.1" in fault
    assert find_unjudged_fault(count, section.model_copy(update={"max_unjudged": count.refused / 60})) is None


async def test_while_there_are_too_many_they_are_asked_again_with_another_seed_up_to_max_asks(bench):
    app = faulty(refusal=0.2)
    first = await bench.judge(app)
    second = await bench.judge(app, max_asks=2)
    assert app.state.api.counts["calls"] == 60 + first.refused
    assert app.state.api.counts["repeats"] == 0
    assert second.ok > 0
    third = await bench.judge(app, max_asks=2)
    assert (third.ok, third.refused) == (0, second.refused)
    asked = [judgment for judgment in bench.judgments.values() if judgment.num_asked == 2]
    assert len(asked) == first.refused
    assert all(judgment.usage.prompt_tokens > 2 * 2833 for judgment in asked)


async def test_what_a_run_went_on_with_is_not_asked_again_by_luck(bench):
    app = faulty(refusal=0.2)
    first = await bench.judge(app, max_unjudged=0.5, max_asks=3)
    again = await bench.judge(app, max_unjudged=0.5, max_asks=3)
    assert again.refused == first.refused > 0
    assert app.state.api.counts["calls"] == 60


async def test_what_an_older_version_recorded_as_refused_is_asked_again(bench):
    app = make_api()
    judge = PointwiseJudge(JudgeSection(kind="pointwise", model="gpt-4o-mini"), bench.images)
    (first,) = judgment_keys(judge, bench.tasks["t"], bench.responses[:1])
    old = {"response": "r", "task": "t", "judge": judge.name, "error": "HTTP 429: quota", "refused": True}
    bench.ledger.put([Judgment(key=first, **old)])  # few enough to be tolerated, were it a refusal
    assert (await bench.judge(app)).ok == 60


async def test_a_passing_fault_is_tried_again_and_its_tokens_are_counted(bench):
    app = faulty(flaky=0.5)
    count = await bench.judge(app)
    assert count.ok == 60
    assert app.state.api.counts["503 None"] > 10

    calls = []

    async def half(request):  # a paid answer without its choice, then a whole one
        calls.append(request)
        return complete(VERDICT, num_choices=len(calls) % 2 == 0)

    bench.responses = [bench.make_response(number) for number in range(100, 103)]
    assert (await bench.judge(half, max_concurrency=1)).ok == 3
    assert {judgment.usage.prompt_tokens for judgment in bench.judgments.values()} == {200}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            "quota_after",
            r"exceeded your current quota.*add credit to the account of OPENAI_API_KEY.*same command goes on",
        ),
        ("key_after", r"Incorrect API key provided: sk-\*\*\*al.*set OPENAI_API_KEY"),
    ],
)
async def test_a_fault_of_the_account_half_way_stops_at_once_and_keeps_what_was_answered(bench, fault, said):
    app = faulty(**{fault: 20})
    with pytest.raises(AccountError, match=said):
        await bench.judge(app)
    assert app.state.api.counts["answers"] == 20
    assert app.state.api.counts["calls"] <= 20 + 4
    assert sum(judgment.error is None for judgment in bench.judgments.values()) == len(bench.judgments) == 20
    healthy = make_api()
    count = await bench.judge(healthy)
    assert (count.cached, count.ok, healthy.state.api.counts["calls"]) == (20, 40, 40)


async def test_an_unknown_model_or_a_page_costs_one_request(bench):
    app = make_api()
    with pytest.raises(AccountError, match=r"`gpt-4o-minni` does not exist.*set judge\.model"):
        await bench.judge(app, model="gpt-4o-minni")
    assert app.state.api.counts["calls"] == 1
    with pytest.raises(AccountError, match=r"answered with a page .*'Please log in'; see that judge\.base_url"):
        await bench.judge(faulty(html=1.0))


async def test_requests_that_nobody_can_answer_stop_before_all_are_sent(bench):
    asked = []

    async def refuse(request):
        asked.append(request)
        return httpx2.Response(400, json={"error": {"message": "images are not supported"}})

    with pytest.raises(StageError, match=r"requests in a row failed.*images are not supported"):
        await bench.judge(refuse)
    assert len(asked) < 20


async def test_a_model_that_names_its_limit_otherwise_is_asked_in_its_way_with_the_same_key(bench):
    app = make_api()
    count = await bench.judge(app, model="gpt-5-mini")
    assert count.ok == 60
    counts = app.state.api.counts
    assert counts["400 unsupported_parameter"] == counts["400 unsupported_value"] == 1
    assert counts["calls"] == 62


async def test_a_cap_stops_before_it_is_exceeded_and_counts_earlier_commands(bench):
    app = make_api()
    with pytest.raises(AccountError, match=r"could exceed judge\.max_cost_usd = 0\.01.*raise judge\.max_cost_usd"):
        await bench.judge(app, max_cost_usd=0.01)
    answers = app.state.api.counts["answers"]
    assert 12 <= answers <= 0.01 / 0.00043
    with pytest.raises(AccountError):
        await bench.judge(app, max_cost_usd=0.01)
    assert app.state.api.counts["answers"] == answers
    counts = app.state.api.counts
    assert (counts["prompt_tokens"] * 0.15 + counts["completion_tokens"] * 0.60) / 1e6 <= 0.01


async def test_in_flight_answers_are_kept_when_the_account_ends(bench):
    """Three slow answers are on their way when the fourth says that the purse is empty."""
    asked, first = [], asyncio.Event()

    async def upstream(request):
        number = len(asked)
        asked.append(request)
        if number == 0:
            return complete(VERDICT)
        if number == 4:
            first.set()
            return httpx2.Response(429, json={"error": {"message": "no", "code": "insufficient_quota"}})
        await first.wait()
        await asyncio.sleep(0.05)
        return complete(VERDICT)

    with pytest.raises(AccountError):
        await bench.judge(upstream, max_concurrency=4)
    assert len(asked) == 5
    assert sum(judgment.error is None for judgment in bench.judgments.values()) == 4


async def test_a_test_judgment_is_scored_and_billed_like_a_photos(bench, tmp_path):
    app = make_api()
    section = JudgeSection(kind="pointwise", model="gpt-4o-mini")
    async with PointwiseJudge(section, bench.images, transport=httpx2.ASGITransport(app=app)) as judge:
        judgment = await judge.test()
    assert 1 <= judgment.score <= 10
    assert 3000 < judgment.usage.prompt_tokens < 3300


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": '{"rationale": "x", "score": 7}'}],
        '<think>hm</think>{"rationale": "x", "score": 7.0}',
    ],
)
async def test_a_verdict_in_parts_or_after_a_thought_is_read(bench, content):
    count = await bench.judge(lambda request: complete(content))
    assert count.ok == 60


@pytest.mark.parametrize("status", [200, 429])
async def test_an_error_in_a_body_with_200_is_that_error(bench, status):
    body = {"error": {"message": "Provider is full", "code": 404 if status == 200 else 429}}
    error = AccountError if status == 200 else StageError
    with pytest.raises(error, match="Provider is full"):
        await bench.judge(lambda request: httpx2.Response(200, json=body), max_concurrency=1)


VERDICT = json.dumps({"rationale": "fine", "score": 7})


def complete(content, num_choices=1):
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice] * num_choices}
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    return httpx2.Response(200, json=body | {"usage": usage})


def test_usages_add_up():
    assert Usage(prompt_tokens=1, completion_tokens=2) + Usage(prompt_tokens=3, completion_tokens=4) == Usage(
        prompt_tokens=4, completion_tokens=6
    )


async def test_the_judge_is_asked_greedily_and_told_nothing_of_the_gold(bench):
    bodies = []

    def upstream(request):
        bodies.append(json.loads(request.content))
        verdict = json.dumps({"rationale": "r", "score": 5})
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": verdict}}
        return httpx2.Response(200, json={"id": "x", "object": "chat.completion", "created": 0, "model": "m",
                                          "choices": [choice], "usage": None})  # fmt: skip

    bench.responses = bench.responses[:1]
    told = {"rationale": "RATIONALE of the annotator", "facts": ("FACT of the scene",), "family": "FAMILY"}
    letters = set()
    for gold in (0, 1):
        bench.tasks = {"t": bench.tasks["t"].model_copy(update={**told, "answer": gold})}
        await bench.judge(upstream)
        body = bodies[-1]
        assert (body["temperature"], body["n"], body["seed"]) == (0.0, 1, 0)
        letters.add(json.dumps(body, sort_keys=True))
    assert len(letters) == 1, "the request is the same whatever the gold answer is"
    asked = letters.pop()
    assert not any(word in asked for word in ("RATIONALE", "FACT", "FAMILY"))
