"""The client and the sampling stage against a faulty upstream, faked at the transport."""

import asyncio
import base64
import json
import socket

import httpx2
import pytest
from PIL import Image

from vcot.pipeline.client import DIGEST_HEADER, EXPECT_HEADER, MAX_REFUSED_S, ChatClient
from vcot.pipeline.concurrency import MAX_ATTEMPTS, MAX_DELAY_S
from vcot.pipeline.errors import AccountError, RequestError, StageError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.prompts import render_prompt
from vcot.pipeline.records import CheckpointRef, Response, SamplingParams, Task
from vcot.pipeline.sample import Groups, Plan, is_owed, sample

pytestmark = pytest.mark.hurried
DIGEST = "sha256:" + "a" * 64
CHECKPOINT = CheckpointRef(name="base", digest=DIGEST, kind="base")
SAMPLING = SamplingParams(temperature=0.5, max_tokens=8, n=2, seed=0)


class Upstream:
    """Answers chat completions; `faults` are used up first, one per request."""

    def __init__(self, faults=()):
        self.faults = list(faults)
        self.requests = []

    async def __call__(self, request):
        body = json.loads(request.content)
        self.requests.append((body, request.headers))
        if self.faults:
            fault = self.faults.pop(0)
            if isinstance(fault, Exception):
                raise fault
            if fault is not None:
                return fault
        return self.answer(body)

    @staticmethod
    def answer(body, n=None, stamp=DIGEST, finish_reason="stop", completion_tokens=6):
        choices = [
            {
                "index": i,
                "finish_reason": finish_reason,
                "message": {"role": "assistant", "content": f"It is {i}. <R> B"},
            }
            for i in range(n if n is not None else body["n"])
        ]
        usage = {"prompt_tokens": 5, "completion_tokens": completion_tokens, "total_tokens": 11}
        completion = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": choices,
            "usage": usage,
        }
        return httpx2.Response(200, json=completion, headers={DIGEST_HEADER: stamp} if stamp else {})


def error(status, headers=None, **body):
    return httpx2.Response(status, json={"error": {"message": "no", **body}}, headers=headers or {})


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path)


@pytest.fixture
def tasks(store):
    image = store.put_png(Image.new("RGB", (4, 4), "red"))
    return [
        Task(id=f"t{i}", question=f"q{i}?", choices=("a", "b"), answer=1, images=(image,), source="nano", split="train")
        for i in range(6)
    ]


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger.sqlite")


@pytest.fixture
def closed_port():
    with socket.socket() as taken:  # and not listened at
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


async def draw(upstream, tasks, ledger, store, params=SAMPLING, concurrency=2):
    requests = Plan(tasks, "thought_specific", CHECKPOINT, params)
    async with ChatClient(
        "http://fake/v1", "key", max_connections=2, transport=httpx2.MockTransport(upstream)
    ) as client:
        count = await sample(requests, client, ledger, store, max_concurrency=concurrency, on_progress=lambda _: None)
    keys = [key for request in requests for key in request.response_keys()]
    return count, ledger.get(Response, keys)


async def test_what_is_owed_and_what_was_answered_can_be_told(tasks, ledger, store):
    plan = Plan(tasks, "thought_specific", CHECKPOINT, SAMPLING)
    assert is_owed(plan, ledger)
    await draw(Upstream([error(400)]), tasks, ledger, store)
    groups = list(Groups(plan, ledger))
    assert [group.task for group in groups] == tasks
    assert sorted((len(group.found), len(group.good)) for group in groups) == [(2, 0), *[(2, 2)] * 5]
    assert is_owed(plan, ledger)
    await draw(Upstream(), tasks, ledger, store)
    assert not is_owed(plan, ledger)


async def test_one_request_per_task_gives_k_responses_parsed_apart(tasks, ledger, store):
    upstream = Upstream()
    count, responses = await draw(upstream, tasks, ledger, store)
    assert (count.requested, count.ok) == (12, 12)
    assert len(upstream.requests) == 6
    body, headers = upstream.requests[0]
    assert (body["n"], body["model"], headers[EXPECT_HEADER]) == (2, "base", DIGEST)
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    asked = {body["messages"][0]["content"][1]["text"] for body, _ in upstream.requests}
    assert asked == {render_prompt("thought_specific", task) for task in tasks}
    assert {(r.thought, r.answer) for r in responses.values()} == {("It is 0.", "B"), ("It is 1.", "B")}
    assert len({body["seed"] for body, _ in upstream.requests}) == 6
    assert {r.index for r in responses.values() if r.usage} == {0}, "tokens of a group are counted once"
    assert all(r.latency_s is not None for r in responses.values())


async def test_a_task_without_an_image_is_asked_in_words_alone(tasks, ledger, store):
    upstream = Upstream()
    count, _ = await draw(upstream, [tasks[0].model_copy(update={"images": ()})], ledger, store)
    (body, _), *_ = upstream.requests
    assert (count.ok, [part["type"] for part in body["messages"][0]["content"]]) == (2, ["text"])


async def test_several_images_are_shown_in_their_order(tasks, ledger, store):
    upstream, other = Upstream(), store.put_png(Image.new("RGB", (4, 4), "blue"))
    task = tasks[0].model_copy(update={"images": (other, *tasks[0].images)})
    count, _ = await draw(upstream, [task], ledger, store)
    (body, _), *_ = upstream.requests
    *shown, text = body["messages"][0]["content"]
    data = [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in shown]
    assert (count.ok, data, text["type"]) == (2, [store.read(image) for image in task.images], "text")


async def test_a_server_that_counts_no_tokens_is_good_enough(tasks, ledger, store):
    upstream = Upstream([Upstream.answer({}, n=2, completion_tokens=None)])
    count, responses = await draw(upstream, tasks[:1], ledger, store)
    assert (count.ok, len(upstream.requests)) == (2, 1)
    assert [r.usage.completion_tokens for r in responses.values() if r.usage] == [0]


async def test_the_same_command_again_sends_nothing_and_other_settings_owe_new_work(tasks, ledger, store):
    await draw(Upstream(), tasks, ledger, store)
    again = Upstream()
    count, _ = await draw(again, tasks, ledger, store)
    assert (count.cached, again.requests) == (12, [])
    hotter = SAMPLING.model_copy(update={"temperature": 0.8})
    count, _ = await draw(again, tasks, ledger, store, params=hotter)
    assert (count.ok, len(again.requests)) == (12, 6)


@pytest.mark.parametrize(
    "fault",
    [
        httpx2.ConnectError("refused"),
        httpx2.ReadError("reset after the first byte"),
        httpx2.ReadTimeout("hang"),
        error(500),
        error(503),
        error(429),
        error(429, {"retry-after": "3"}),
        httpx2.Response(200, content=b'{"id": "x", "choi', headers={"content-type": "application/json"}),
        Upstream.answer({}, n=1),
        Upstream.answer({}, n=0),
        Upstream.answer({}, n=2, finish_reason="abort"),
    ],
    ids=["refused", "reset", "hang", "500", "503", "429", "429-after", "half-json", "fewer", "none", "abort"],
)
async def test_a_passing_fault_costs_nothing_but_time(fault, tasks, ledger, store):
    upstream = Upstream([fault])
    count, responses = await draw(upstream, tasks, ledger, store)
    assert (count.ok, len(upstream.requests)) == (12, 7)
    assert all(response.error is None for response in responses.values())


async def test_a_fault_that_stays_is_recorded_as_failed_and_owed_again(tasks, ledger, store):
    upstream = Upstream([error(503)] * MAX_ATTEMPTS)
    count, responses = await draw(upstream, tasks, ledger, store, concurrency=1)
    assert (count.ok, count.failed) == (10, 2)
    failed = [r for r in responses.values() if r.error is not None]
    assert len(failed) == 2
    assert all("HTTP 503" in r.error for r in failed)
    again = Upstream()
    count, responses = await draw(again, tasks, ledger, store)
    assert (count.cached, count.ok, len(again.requests)) == (10, 2, 1)
    assert all(response.error is None for response in responses.values())


async def test_a_request_that_can_never_succeed_is_refused_at_once(tasks, ledger, store):
    upstream = Upstream([error(400)])
    count, _ = await draw(upstream, tasks, ledger, store)
    assert (count.ok, count.refused, len(upstream.requests)) == (10, 2, 6)


@pytest.mark.parametrize(
    "lie", [Upstream.answer({}, n=2, stamp="sha256:" + "b" * 64), Upstream.answer({}, n=2, stamp=None), error(409)]
)
async def test_an_answer_of_other_weights_stops_the_stage_and_is_not_kept(lie, tasks, ledger, store):
    with pytest.raises(StageError, match="swap the checkpoint in"):
        await draw(Upstream([lie]), tasks[:1], ledger, store)
    keys = next(iter(Plan(tasks[:1], "thought_specific", CHECKPOINT, SAMPLING))).response_keys()
    assert ledger.get(Response, keys) == {}


async def test_a_gateway_that_takes_no_key_is_asked_no_further(tasks, ledger, store):
    upstream = Upstream([error(401)])
    with pytest.raises(AccountError, match=r"sample: HTTP 401 .*: no; set VCOT_API_KEY"):
        await draw(upstream, tasks, ledger, store, concurrency=2)
    assert len(upstream.requests) <= 3
    count, _ = await draw(Upstream(), tasks, ledger, store)
    assert 0 < count.cached <= 4  # what was in flight is kept


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_where_nothing_listens_any_more_all_requests_end_together(tasks, ledger, store, concurrency):
    await draw(Upstream(), tasks[:1], ledger, store)
    began, upstream = asyncio.get_running_loop().time(), Upstream([httpx2.ConnectError("gone")] * 1000)
    with pytest.raises(
        AccountError, match=r"no answer from http.*, for \d+ s; see that a server runs there .*goes on$"
    ):
        await draw(upstream, tasks, ledger, store, concurrency=concurrency)
    assert len(upstream.requests) < 3 * concurrency * MAX_ATTEMPTS
    assert asyncio.get_running_loop().time() - began < MAX_REFUSED_S + 2 * MAX_DELAY_S
    count, _ = await draw(Upstream(), tasks, ledger, store)
    assert (count.cached, count.ok) == (2, 2 * len(tasks) - 2)


async def test_a_port_where_nothing_listens_is_known_as_such(closed_port):
    messages = [{"role": "user", "content": "What?"}]
    reasons = []
    async with ChatClient(f"http://127.0.0.1:{closed_port}/v1", "key", max_connections=2) as client:
        for _ in range(2):
            with pytest.raises(RequestError) as caught:
                await client.complete("base", messages, SAMPLING)
            reasons.append((caught.value.scope, caught.value.reason))
            await asyncio.sleep(MAX_REFUSED_S)
    assert reasons == [("attempt", "connection"), ("account", "gone")]


async def test_a_server_that_is_started_anew_meanwhile_costs_nothing_however_often(tasks, ledger, store):
    upstream = Upstream(([httpx2.ConnectError("gone")] * 4 + [None]) * len(tasks))
    count, _ = await draw(upstream, tasks, ledger, store, concurrency=1)
    assert count.ok == 2 * len(tasks)


async def test_a_server_that_answers_nothing_ends_the_stage_early(tasks, ledger, store):
    upstream = Upstream([httpx2.ReadError("gone")] * 1000)
    with pytest.raises(StageError, match=r"in a row failed.*repeat the command"):
        await draw(upstream, tasks, ledger, store, concurrency=1)
    assert len(upstream.requests) == 3 * MAX_ATTEMPTS


async def test_a_stopped_stage_goes_on_where_it_was(tasks, ledger, store):
    third = asyncio.Event()
    first = Upstream()

    async def hang_after_two(request):
        if len(first.requests) >= 2:
            third.set()
            await asyncio.Event().wait()
        return await first(request)

    running = asyncio.ensure_future(draw(hang_after_two, tasks, ledger, store, concurrency=1))
    await third.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    second = Upstream()
    count, responses = await draw(second, tasks, ledger, store)
    assert (count.cached, count.ok, len(second.requests)) == (4, 8, 4)
    assert len(responses) == 12


def key_of(task, checkpoint=CHECKPOINT, prompt="thought_specific", sampling=SAMPLING):
    return next(iter(Plan([task], prompt, checkpoint, sampling))).key


def test_a_request_s_key_holds_all_that_determines_its_answer_and_no_more(tasks, store):
    task, other = tasks[0], store.put_png(Image.new("RGB", (4, 4), "blue"))
    same = [
        key_of(task, CHECKPOINT.model_copy(update={"name": "another"})),
        key_of(task.model_copy(update={"images": (task.images[0].model_copy(update={"path": "elsewhere.png"}),)})),
        key_of(task.model_copy(update={"rationale": "r", "split": "test"})),
    ]
    others = [
        key_of(task, CHECKPOINT.model_copy(update={"digest": "sha256:" + "b" * 64})),
        key_of(task.model_copy(update={"images": (other,)})),
        key_of(task.model_copy(update={"images": ()})),
        key_of(task.model_copy(update={"images": (other, *task.images)})),
        key_of(task.model_copy(update={"images": (*task.images, other)})),
        key_of(task.model_copy(update={"question": "another?"})),
        key_of(task, prompt="cot"),
        *(key_of(task, sampling=SAMPLING.model_copy(update=change))
          for change in ({"temperature": 0.6}, {"top_p": 0.9}, {"max_tokens": 9}, {"n": 3}, {"seed": 1})),
    ]  # fmt: skip
    assert set(same) == {key_of(task)}
    assert len({key_of(task), *others}) == 1 + len(others)


def test_seeds_of_requests_seldom_meet():
    """k chains of two requests with one seed would be drawn from the same random numbers."""
    fields = {"question": "q?", "choices": ("a", "b"), "answer": 1, "source": "nano", "split": "train"}
    many = [Task(id=f"t{i}", **fields) for i in range(5_000)]
    seeds = {request.sampling.seed for request in Plan(many, "cot", CHECKPOINT, SAMPLING)}
    assert len(seeds) >= 4_995
    assert 2**30 < max(seeds) < 2**31, "all of what an int32 takes"


async def test_choices_are_taken_by_their_index_not_as_they_come(tasks, ledger, store):
    class Shuffled(Upstream):
        @staticmethod
        def answer(body, **options):
            answer = json.loads(Upstream.answer(body, **options).content)
            answer["choices"].reverse()
            return httpx2.Response(200, json=answer, headers={DIGEST_HEADER: DIGEST})

    _, responses = await draw(Shuffled(), tasks, ledger, store)
    assert {(response.index, response.thought) for response in responses.values()} == {(0, "It is 0."), (1, "It is 1.")}


async def test_a_response_that_was_cut_off_says_so(tasks, ledger, store):
    class Cut(Upstream):
        @staticmethod
        def answer(body, **options):
            return Upstream.answer(body, finish_reason="length", **options)

    _, responses = await draw(Cut(), tasks, ledger, store)
    assert {response.finish_reason for response in responses.values()} == {"length"}


EIGHT = SAMPLING.model_copy(update={"n": 8})


@pytest.mark.parametrize(("n", "most"), [(1, 64), (8, 8), (128, 1)])
async def test_it_begins_with_as_many_responses_in_flight_however_many_a_request_asks_for(
    tasks, ledger, store, n, most
):
    """What was sent before the first answer came, and so before anything was measured."""
    num_asked, num_before, plain = 0, 0, Upstream()

    async def upstream(request):
        nonlocal num_asked, num_before
        num_asked += 1
        await asyncio.sleep(5)
        num_before = num_before or num_asked
        return await plain(request)

    many = [tasks[0].model_copy(update={"id": f"t{i}"}) for i in range(70)]
    plan = Plan(many, "thought_specific", CHECKPOINT, SAMPLING.model_copy(update={"n": n}))
    async with ChatClient("http://x/v1", "k", max_connections=99, transport=httpx2.MockTransport(upstream)) as client:
        assert (await sample(plan, client, ledger, store, max_concurrency=99)).ok == 70 * n
    assert num_before == most


async def test_as_many_are_in_flight_as_the_server_has_room_for_and_no_more_than_the_ceiling(tasks, ledger, store):
    """The server answers six at a time, whatever waits."""
    many = [tasks[0].model_copy(update={"id": f"t{i}"}) for i in range(900)]
    room, inside, peak = asyncio.Semaphore(6), 0, 0
    plain = Upstream()

    async def upstream(request):
        nonlocal inside, peak
        inside += 1
        peak = max(peak, inside)
        async with room:
            await asyncio.sleep(1)
        inside -= 1
        return await plain(request)

    transport = httpx2.MockTransport(upstream)
    async with ChatClient("http://fake/v1", "key", max_connections=300, transport=transport) as client:
        plan = Plan(many, "thought_specific", CHECKPOINT, EIGHT)
        began = asyncio.get_running_loop().time()
        count = await sample(plan, client, ledger, store, max_concurrency=300)
        took_s = asyncio.get_running_loop().time() - began
    assert count.ok == 7200
    assert took_s < 1.25 * 900 / 6, "what it takes to find out, and to write, included"
    assert peak <= 6 * 4, "request times are noisy: what the ledger takes to write is in them"


async def test_a_server_that_has_no_room_is_asked_for_less(tasks, ledger, store):
    many = [tasks[0].model_copy(update={"id": f"t{i}"}) for i in range(200)]
    inside, num_refused, plain = 0, 0, Upstream()

    async def upstream(request):
        nonlocal inside, num_refused
        if inside >= 3:
            num_refused += 1
            return error(503)
        inside += 1
        await asyncio.sleep(1)
        inside -= 1
        return await plain(request)

    transport = httpx2.MockTransport(upstream)
    async with ChatClient("http://fake/v1", "key", max_connections=300, transport=transport) as client:
        count = await sample(Plan(many, "thought_specific", CHECKPOINT, EIGHT), client, ledger, store)
    assert count.ok >= 1560
    assert num_refused < 60, "64 in flight would be refused some hundred times"
