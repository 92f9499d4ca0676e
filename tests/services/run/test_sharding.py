"""Shards without Ray: what is asked by several gives the ledger of one, and what stops a command loses nothing."""

import asyncio
import os
from pathlib import Path

import httpx
import pytest

from bench.gateway import free_port, process
from tests.compose.engine import until
from tests.services.run.deterministic_server import REF, OpenGateway, draw_tasks, open_small, serving
from vcot.pipeline.client import ChatClient
from vcot.pipeline.errors import AccountError, MachineError, StageError
from vcot.pipeline.judges import find_judge, judgment_keys
from vcot.pipeline.judges.cost import open_meter
from vcot.pipeline.judging import find_standing
from vcot.pipeline.odds import OptionScores
from vcot.pipeline.option_scores import NOT_DRAWN, OPTION_PROMPT, key_options
from vcot.pipeline.records import Judgment, Response, SamplingParams
from vcot.pipeline.report import Said
from vcot.pipeline.sample import Groups, Plan
from vcot.pipeline.sections import JudgeSection
from vcot.services.engine.serve_section import ServeSection
from vcot.services.run.crew import find_reachable
from vcot.services.run.engines import Here, Sharded, find_why_here
from vcot.services.run.sharding import choose_size, cut_requests, do_shard, read_answered
from vcot.services.run.shared_storage import Storage
from vcot.services.run.unmerged import merge_left, note_storage

NUM_TASKS, K = 12, 4
SAMPLING = SamplingParams(temperature=0.5, max_tokens=8, n=K, seed=0)


class Threads:
    """A crew of this process: two at a time, and none after a fault."""

    def __init__(self, die_after=None):
        self.die_after, self.done = die_after, []

    async def muster(self):
        return 2

    def reach(self, url):
        return url

    async def work(self, storage, names, keys):
        for name in names:
            fault = await asyncio.to_thread(do_shard, storage, name, 2)
            self.done.append(name)
            if self.die_after == len(self.done):
                raise KeyboardInterrupt
            yield name, fault
            if fault is not None:
                return

    async def close(self):
        pass


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def memory():
    import fsspec

    yield "memory://bucket/mine"
    fsspec.filesystem("memory").store.clear()


class Bench:
    """A run, and who asks for it."""

    def __init__(self, directory, server, url=None, num_tasks=NUM_TASKS, **crew):
        self.run, self.server, self.told = open_small(directory), server, []
        self.crew = Threads(**crew)
        self.sharded = Sharded(self.run, OpenGateway(server), self.told.append, self.crew, url)
        self.tasks = draw_tasks(self.run.images, num_tasks)

    def plan(self, prompt="thought_specific"):
        return Plan(self.tasks, prompt, REF, SAMPLING)

    async def sample(self, engine=None, prompt="thought_specific", seen=()):
        async with ChatClient(f"{self.server.url}/v1", "none", max_connections=4, is_own=True) as client:
            return await (engine or self.sharded).sample(
                self.plan(prompt), client, max_concurrency=4, on_progress=lambda t: [each(t) for each in seen]
            )

    async def score_options(self, engine=None):
        requests = list(Plan(self.tasks, OPTION_PROMPT, REF, NOT_DRAWN))
        async with ChatClient(f"{self.server.url}/v1", "none", max_connections=4, is_own=True) as client:
            count = await (engine or self.sharded).score_options(
                requests, client, max_concurrency=4, on_progress=lambda _: None
            )
        return count, self.run.ledger.get(OptionScores, map(key_options, requests))

    async def judge(self, section, engine=None):
        judge, ledger = find_judge(section, self.run.images), self.run.ledger
        groups = Groups(self.plan(), ledger)
        standing, meter = find_standing(judge, groups, ledger, section), open_meter(section, *ledger.spent(judge.name))
        async with judge:
            count = await (engine or self.sharded).judge(
                judge, groups, standing=standing, meter=meter, on_progress=lambda _: None
            )
        return count, meter

    def responses(self, prompt="thought_specific"):
        """By key, but for the time that they took."""
        keys = [key for request in self.plan(prompt) for key in request.response_keys()]
        found = self.run.ledger.get(Response, keys)
        return {key: response.model_copy(update={"latency_s": None}) for key, response in found.items()}

    @property
    def here(self):
        return Here(self.run)

    @property
    def shard_files(self):
        return sorted(path.name for path in (self.run.directory / "shards").glob("*"))


def read_judgments(bench, section):
    judge = find_judge(section, bench.run.images)
    keys = [
        key for group in Groups(bench.plan(), bench.run.ledger) for key in judgment_keys(judge, group.task, group.good)
    ]
    return bench.run.ledger.get(Judgment, keys)


@pytest.mark.parametrize("prompt", ["thought_specific", "two_stage"])
async def test_shards_give_the_ledger_of_one_process(tmp_path, server, prompt):
    one, many = Bench(tmp_path / "one", server), Bench(tmp_path / "many", server)
    expected = await one.sample(one.here, prompt)
    tallies = []
    count = await many.sample(prompt=prompt, seen=[lambda tally: tallies.append((tally.finished, tally.total))])
    assert count == expected
    assert (count.requested, count.ok) == (NUM_TASKS * K, NUM_TASKS * K)
    assert many.responses(prompt) == one.responses(prompt)
    assert len(many.responses(prompt)) == NUM_TASKS * K
    assert many.run.ledger.sampled() == one.run.ledger.sampled()
    assert len(many.crew.done) == 6
    assert tallies == [(done * 2 * K, NUM_TASKS * K) for done in range(7)]
    assert not many.shard_files
    assert set(server.asked.values()) == {2}, "each was asked once by either"
    again = await many.sample(prompt=prompt)
    assert (again.cached, len(many.crew.done)) == (NUM_TASKS * K, 6)
    await many.run.close()
    await one.run.close()


async def test_options_are_asked_in_shards(tmp_path, server):
    one, many = Bench(tmp_path / "one", server), Bench(tmp_path / "many", server)
    expected, told = await one.score_options(one.here)
    assert await many.score_options() == (expected, told)
    assert expected.ok == len(told) == NUM_TASKS
    assert (await many.score_options())[0].cached == NUM_TASKS


def model_judge(server, **fields):
    return JudgeSection(kind="pointwise", model="judge", base_url=f"{server.url}/v1", **fields)


@pytest.mark.parametrize("kind", ["verifier", "pointwise"])
async def test_judgments_come_in_shards(tmp_path, server, kind):
    section = JudgeSection(kind="verifier") if kind == "verifier" else model_judge(server)
    one, many = Bench(tmp_path / "one", server), Bench(tmp_path / "many", server)
    for bench in (one, many):
        await bench.sample(bench.here)
    expected, paid = await one.judge(section, one.here)
    count, meter = await many.judge(section)
    assert count == expected
    assert count.ok == NUM_TASKS * K
    assert read_judgments(many, section) == read_judgments(one, section)
    assert (meter.num_requests, meter.usage) == (paid.num_requests, paid.usage)
    assert meter.num_requests == (NUM_TASKS * 2 if kind == "pointwise" else 0), "two texts of each task"
    assert len(many.crew.done) == 6


async def test_members_judgments_go_with_the_shards_of_who_goes_by_them(tmp_path, server):
    members = [JudgeSection(kind="verifier"), model_judge(server)]
    section = JudgeSection(kind="ensemble", members=tuple(members))
    one, many = Bench(tmp_path / "one", server), Bench(tmp_path / "many", server)
    for bench, engine in ((one, one.here), (many, many.sharded)):
        await bench.sample(bench.here)
        for each in (*members, section):
            await bench.judge(each, engine)
    assert read_judgments(many, section) == read_judgments(one, section)
    assert all(judgment.score is not None for judgment in read_judgments(many, section).values())


@pytest.mark.parametrize("max_unjudged", [0.02, 0.9])
async def test_what_is_asked_again_is_decided_for_the_whole_stage(tmp_path, server, max_unjudged):
    """Of two tasks of twelve the judge refuses to speak: too many, or not, whatever the share of a shard."""
    asked = model_judge(server, max_unjudged=max_unjudged, max_asks=2)
    counts = []
    for name in ("one", "many"):
        bench = Bench(tmp_path / name, server)
        bench.tasks = [
            task.model_copy(update={"question": "refuse"}) if task.id in ("t3", "t7") else task for task in bench.tasks
        ]
        bench.tasks = [task for task in bench.tasks if task.question != "refuse"] + [
            task for task in bench.tasks if task.question == "refuse"
        ]
        engine = bench.here if name == "one" else bench.sharded
        for request in bench.plan():
            bench.run.ledger.put([make_response(request, index) for index in range(K)])
        counts.append([(await bench.judge(asked, engine))[0] for _ in range(3)])
        counts[-1].append({j.num_asked for j in read_judgments(bench, asked).values() if j.refused})
    assert counts[0] == counts[1]
    assert counts[0][0].refused == 2 * K
    assert counts[0][3] == ({2} if max_unjudged < 0.1 else {1})


def make_response(request, index):
    return Response(
        key=request.response_key(index), group=request.key, task=request.task.id, index=index, checkpoint=REF,
        prompt=request.prompt, sampling=request.sampling, text=f"It is {index}. <R> The answer is (A)",
    )  # fmt: skip


@pytest.mark.parametrize("next_engine", ["sharded", "here"])
@pytest.mark.parametrize("is_elsewhere", [False, True])
async def test_a_killed_command_loses_nothing_that_its_workers_left(
    tmp_path, server, memory, is_elsewhere, next_engine
):
    """Five shards were done and three merged when it was killed; the next command merges two, and asks one itself."""
    killed = Bench(tmp_path / "run", server, memory if is_elsewhere else None, die_after=4)
    with pytest.raises(KeyboardInterrupt):
        await killed.sample()
    storage = killed.sharded.storage
    left = [name.partition(".") for name in storage.list_files(storage.folder)]
    done = {name for name, _, kind in left if kind == "parquet"}
    unbegun = {name for name, _, kind in left if kind == "json"} - done
    assert (len(done), len(unbegun)) == (1, 2)
    await asyncio.to_thread(do_shard, killed.sharded.storage, min(unbegun), 2)
    await killed.run.close()
    later = Bench(tmp_path / "run", server)
    await merge_left(later.run, later.told.append)
    assert not storage.list_files(storage.folder)
    assert not (tmp_path / "run" / "shards.json").exists()
    count = await later.sample(getattr(later, next_engine))
    assert (count.requested, count.ok, count.cached) == (NUM_TASKS * K, 2 * K, NUM_TASKS * K - 2 * K)
    assert set(server.asked.values()) == {1}
    assert any("were done for an earlier command" in event.text for event in later.told if isinstance(event, Said))


async def test_a_shard_whose_file_is_there_is_not_asked_again(tmp_path, server):
    bench = Bench(tmp_path / "run", server)
    storage = bench.sharded.storage
    (shard, *_) = [
        shard.model_copy(update={"url": server.url}) for shard in cut_requests(bench.plan(), bench.run.ledger, 5)
    ]
    assert len(shard.requests) == 5
    storage.write(storage.asked(shard.name), shard.model_dump_json().encode())
    assert await asyncio.to_thread(do_shard, storage, shard.name, 1) is None
    assert await asyncio.to_thread(do_shard, storage, shard.name, 1) is None
    assert server.asked.total() == 5


@pytest.mark.parametrize("left", ["half", "part"])
async def test_what_is_left_of_a_shard_is_no_shard_that_is_done(tmp_path, server, left):
    bench = Bench(tmp_path / "run", server)
    storage = bench.sharded.storage
    (shard,) = [
        each.model_copy(update={"url": server.url}) for each in cut_requests(bench.plan(), bench.run.ledger, 12)
    ]
    storage.write(storage.asked(shard.name), shard.model_dump_json().encode())
    server.refuse_after = 4 if left == "part" else None
    fault = await asyncio.to_thread(do_shard, storage, shard.name, 1)
    assert (fault is None) == (left == "half")
    server.refuse_after = None
    if left == "half":
        path = storage.answered(shard.name)
        storage.write(path, storage.read(path)[:-20])
        with pytest.raises(StageError, match=r"sample-\w+.parquet in .* cannot be read .*; delete it"):
            await merge_left(bench.run, bench.told.append)
    assert await asyncio.to_thread(do_shard, storage, shard.name, 1) is None
    read_answered(storage, shard.name).check(shard.name)


async def test_storage_that_a_killed_command_used_is_merged_or_named(tmp_path, server):
    bench = Bench(tmp_path / "run", server)
    shared = Storage(str(tmp_path / "shared"), "shards/mine")
    note_storage(bench.run, shared)
    shared.write(shared.answered("sample-1"), b"half a file")
    with pytest.raises(StageError, match=r"what they answered is not merged yet: .*; to do without it, delete .*json$"):
        await merge_left(bench.run, bench.told.append)
    (tmp_path / "run" / "shards.json").unlink()
    await merge_left(bench.run, bench.told.append)


async def test_storage_elsewhere_is_forgotten_once_all_is_merged(tmp_path, server, memory):
    bench = Bench(tmp_path / "run", server, memory)
    note, seen = tmp_path / "run" / "shards.json", []
    await bench.sample(seen=[lambda _: seen.append(note.exists())])
    assert (seen[1:], note.exists()) == ([True] * (len(seen) - 1), False)


def test_a_url_that_nobody_can_use_is_said():
    with pytest.raises(MachineError, match=r"--shards s9://x cannot be used here \(.*s9.*\)"):
        Storage("s9://x", "shards").list_shards()


def test_storage_that_refuses_is_said(tmp_path):
    (tmp_path / "shards").write_text("a file")
    with pytest.raises(StageError, match=r"the storage .* cannot be used \(.*; see that it is there"):
        Storage(str(tmp_path), "shards").write("shards/x.json", b"")


async def test_other_weights_than_planned_stop_all_shards(tmp_path, server):
    server.stamp = "sha256:" + "b" * 64
    bench = Bench(tmp_path / "run", server)
    with pytest.raises(AccountError, match=r"asked for weights sha256:aaa.*stamped sha256:bbb") as caught:
        await bench.sample()
    assert caught.value.__cause__.reason == "checkpoint", "what puts it on trial again goes by that"
    assert (bench.responses(), len(bench.crew.done), bench.shard_files) == ({}, 1, [])


async def test_what_was_answered_before_a_fault_is_kept(tmp_path, server):
    server.refuse_after = 5
    bench = Bench(tmp_path / "run", server)
    with pytest.raises(AccountError, match="set VCOT_API_KEY"):
        await bench.sample()
    assert len(bench.responses()) == 5 * K
    server.refuse_after = None
    count = await bench.sample()
    assert (count.ok, count.cached) == (7 * K, 5 * K)


async def test_a_file_that_holds_something_else_is_not_counted(tmp_path, server):
    """What it holds is kept all the same."""

    class Mistaken(Threads):
        async def work(self, storage, names, keys):
            first, second, *_ = names
            await asyncio.to_thread(do_shard, storage, first, 1)
            storage.write(storage.answered(second), storage.read(storage.answered(first)))
            yield second, None

    bench = Bench(tmp_path / "run", server)
    bench.sharded.crew = Mistaken()
    with pytest.raises(StageError, match=r"shard sample-\w+ does not hold what it owed; what it holds is kept"):
        await bench.sample()
    assert len(bench.responses()) == 2 * K


async def test_images_are_read_from_the_storage_that_all_reach(tmp_path, server, memory):
    """And a second stage copies none again."""
    bench = Bench(tmp_path / "run", server, memory)
    await bench.sample()
    assert len(bench.responses()) == NUM_TASKS * K
    assert len(bench.sharded.storage.list_files("images")) == NUM_TASKS
    assert bench.sharded.storage.list_shards() == ([], [])
    assert not (bench.run.directory / "shards").exists()
    assert server.asked.total() == NUM_TASKS
    other = Bench(tmp_path / "other", server, memory)
    assert other.sharded.storage.folder != bench.sharded.storage.folder, "runs may share a URL"


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """An object store that any client of S3 speaks to: moto's, from an environment of its own."""
    python = Path(os.environ.get("VCOT_TEST_S3", "nowhere")).absolute() / "bin" / "python"
    if not python.is_file():
        pytest.skip("moto's server has an environment of its own, which `make test` makes")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    own = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    with process("moto", [str(python), "-P", "-m", "moto.server", "-p", str(port)], tmp_path, PYTHONPATH=""):
        until(lambda: has_made(f"{address}/bucket"), 60)
        yield "s3://bucket/mine"


def has_made(bucket_url):
    try:
        return httpx.put(bucket_url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


async def test_shards_and_images_lie_in_an_object_store(tmp_path, server, bucket):
    one, many = Bench(tmp_path / "one", server), Bench(tmp_path / "many", server, bucket)
    await one.sample(one.here)
    assert (await many.sample()).ok == NUM_TASKS * K
    assert many.responses() == one.responses()
    storage = many.sharded.storage
    assert (storage.list_shards(), len(storage.list_files("images"))) == (([], []), NUM_TASKS)
    with pytest.raises(StageError, match=r"the storage s3://none/mine cannot be used \(.*bucket does not exist"):
        Storage("s3://none/mine", "shards").write("shards/x.json", b"x")


async def test_storage_that_a_node_does_not_reach_is_said(tmp_path):
    fault = do_shard(Storage(str(tmp_path), "shards"), "sample-1", 1)
    assert fault.kind == "MachineError"
    assert "give --shards a URL of storage that all nodes reach" in str(fault.restore())


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"max_cost_usd": 1.0, "input_usd": 1.0, "output_usd": 1.0}, "max_cost_usd is counted in one place"),
        ({"batch": True}, "judge.batch"),
        ({"kind": "claims"}, "a verdict of several answers"),
        ({"kind": "pairwise"}, "a verdict of several answers"),
        ({}, None),
    ],
)
def test_who_is_asked_from_this_machine(tmp_path, fields, why):
    judge = find_judge(JudgeSection(**{"kind": "pointwise", "model": "gpt-4o-mini", **fields}), None)
    found = find_why_here(judge)
    assert found is None if why is None else why in found


async def test_a_judge_with_a_cap_is_asked_from_here_and_that_is_said(tmp_path, server):
    bench = Bench(tmp_path / "run", server)
    await bench.sample(bench.here)
    count, _ = await bench.judge(model_judge(server, max_cost_usd=1.0, input_usd=0.1, output_usd=0.1))
    assert (count.ok, bench.crew.done) == (NUM_TASKS * K, [])
    assert any("judge.max_cost_usd is counted in one place" in event.text for event in bench.told)


@pytest.mark.parametrize(
    ("num_tasks", "each", "num_workers", "max_concurrency", "size"),
    [
        (12, 1, 2, 4, 2),
        (1000, 1, 4, 64, 32),
        (99_999, 1, 16, 1024, 256),
        (3, 1, 8, 1, 1),
        (320, 1, 2, 8, 20),
        (24, 4, 2, 32, 4),
    ],
)
def test_a_shard_is_large_enough_to_keep_a_worker_busy_and_small_enough_to_be_lost(
    num_tasks, each, num_workers, max_concurrency, size
):
    assert choose_size(num_tasks, each * num_tasks, num_workers, max_concurrency) == size


@pytest.mark.parametrize(
    ("host", "url", "nodes", "reached"),
    [
        ("127.0.0.1", "http://127.0.0.1:8100", ["10.0.0.1"], "http://127.0.0.1:8100"),
        ("0.0.0.0", "http://127.0.0.1:8100", ["10.0.0.1", "10.0.0.2"], "http://10.0.0.1:8100"),
        ("10.0.0.1", "http://10.0.0.1:8100", ["10.0.0.1", "10.0.0.2"], "http://10.0.0.1:8100"),
    ],
)
def test_the_gateway_is_named_as_the_nodes_reach_it(host, url, nodes, reached):
    assert find_reachable(url, ServeSection(host=host), "10.0.0.1", nodes) == reached


@pytest.mark.parametrize("serve", [ServeSection(), ServeSection(url="http://127.0.0.1:8100")])
def test_a_gateway_that_the_other_nodes_do_not_reach_is_said(serve):
    with pytest.raises(MachineError, match=r"from this machine only, and the Ray cluster has other nodes \(10.0.0.2\)"):
        find_reachable("http://127.0.0.1:8100", serve, "10.0.0.1", ["10.0.0.1", "10.0.0.2"])
