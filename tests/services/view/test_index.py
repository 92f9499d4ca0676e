"""The index finds what a plain look through the run finds, as the run grows, and can always be made again."""

import asyncio
import itertools
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time

import pytest

from tests.services.view.view_run import HOSTILE, K, made, own, prepared, respond
from vcot.pipeline.errors import InputError
from vcot.pipeline.judging import list_judged, look_at_judgments
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.pairs import build_pairs
from vcot.pipeline.records import Judgment, Response
from vcot.pipeline.report import ignore
from vcot.services.engine.lifeline import keeper_command
from vcot.services.run.directory import RECIPE, open_run
from vcot.services.run.rounds import list_rounds, make_judge
from vcot.services.run.session import Session
from vcot.services.run.stages import RunStatus
from vcot.services.run.status import look_at_run
from vcot.services.run.steps import judge_stage
from vcot.services.view.index import FOLDER, INDEX, Facets
from vcot.services.view.indexing import index_once
from vcot.services.view.queries import Filter, read_filter

__all__ = ["made", "own", "prepared"]


def read_plainly(session):
    """(part, task id) -> what a filter asks, by going through the run without an index."""
    found, ledger = {}, session.run.ledger
    (current,) = list_rounds(session)
    judged = look_at_judgments(make_judge(session), current.groups, ledger, whole=True)
    for group, (task, seen) in zip(current.groups, judged, strict=True):
        texts = [response.text or "" for response in group.found] + [
            one.judgment.rationale for one in seen if one.judgment
        ]
        is_whole = len(seen) == K and all(one.judgment for one in seen)
        found["train", task.id] = {
            "subject": task.subject,
            "words": set(re.findall(r"[^\W_]+", " ".join([task.question, *task.choices, *texts]).casefold())),
            "scores": [one.score for one in list_judged(seen)],
            "marks": {f"{'refused' if r.refused else 'failed'}|{r.reason}" for r in group.found if r.error}
            | ({"pair|made"} if is_whole and build_pairs([(task, list_judged(seen))]).pairs else set()),
        }
    questions = session.questions("test")
    base, policy = (checkpoint.ref for checkpoint in session.registry.list())
    right = {}
    for ref, request in [(each, request) for each in (base, policy) for request in questions.requests(each)]:
        (response,) = ledger.get(Response, request.response_keys()).values()
        is_right = questions.benchmark.score(request.task, response).value == "correct"
        right[request.task.id, request.prompt, ref.name] = is_right
        own = found.setdefault(
            ("eval", request.task.id), {"subject": request.task.subject, "words": set(), "scores": [], "marks": set()}
        )
        own["words"] |= set(
            re.findall(r"[^\W_]+", " ".join([request.task.question, *request.task.choices, response.text]).casefold())
        )
        own["marks"] |= {f"{'correct' if is_right else 'incorrect'}|{ref.name}|{request.prompt} 0.4"}
    for (task, prompt, name), after in right.items():
        if name == policy.name and after != (before := right[task, prompt, base.name]):
            found["eval", task]["marks"].add(f"{'lost' if before else 'gained'}|{name}|{prompt} 0.4")
    return found


def holds(known, wanted):
    """Whether a filter lets a task through, as its fields say."""
    marks = {re.sub(r"\|.*\|", "|", mark) for mark in known["marks"]} | known["marks"]
    outcome = (
        f"{wanted.outcome}|{wanted.checkpoint}|{wanted.setting}"
        if wanted.checkpoint
        else f"{wanted.outcome}|{wanted.setting}"
    )
    low, high = (wanted.low if wanted.low is not None else -1), (wanted.high if wanted.high is not None else 2)
    return (
        (not wanted.subject or known["subject"] == wanted.subject)
        and (not wanted.outcome or outcome in marks)
        and (not wanted.mark or wanted.mark in known["marks"])
        and {word.casefold() for word in wanted.words} <= known["words"]
        and ((wanted.low is None and wanted.high is None) or any(low <= score <= high for score in known["scores"]))
    )


FILTERS = [
    Filter(subject=subject, **outcome, mark=mark, **bounds, text=text)
    for subject, outcome, mark, bounds, text in itertools.product(
        ("", "NAT"),
        (
            {}, {"outcome": "lost", "setting": "cot 0.4"},
            {"outcome": "gained", "checkpoint": "dpo-x", "setting": "zero_shot 0.4"},
            {"outcome": "incorrect", "checkpoint": "base", "setting": "cot 0.4"},
        ),
        ("", "pair|made", "refused|too_long", "failed|overloaded"),
        ({}, {"low": 0.9}, {"high": 0.3}, {"low": 0.2, "high": 0.6}),
        ("", "circle", "ANSWER the is", "null", "zebra"),
    )
]  # fmt: skip


async def look(made, do):
    with open_run(made.directory, access="read") as run:
        async with Session(run, ignore) as session:
            return do(session)


def test_filters_find_what_a_plain_look_through_the_run_finds(made):
    known, finder = asyncio.run(look(made, read_plainly)), made.shown().finder
    nums = {key: number for number, key in enumerate(known)}
    found_any = 0
    for wanted in FILTERS:
        expected = [key for key in nums if holds(known[key], wanted)]
        if wanted.outcome:
            expected = [key for key in expected if key[0] == "eval"]
        found = [(item.part, item.task) for item in finder.find(wanted).items]
        assert (found, finder.find(wanted).total) == (expected, len(expected)), wanted
        found_any += bool(found)
    assert found_any > 40, "the filters are worth the test"


@pytest.mark.parametrize("sort", ["order", "best", "worst", "spread", "lost"])
@pytest.mark.parametrize("down", [False, True])
def test_neighbours_are_those_of_the_list(made, sort, down):
    finder, wanted = made.shown().finder, Filter(sort=sort, down=down)
    items = finder.find(wanted).items
    assert len(items) == (21 if sort in ("order", "lost") else 9)
    for before, item, after in zip([None, *items], items, [*items[1:], None], strict=False):
        assert finder.beside(wanted, item) == (before, after)
    value = {"order": "num", "lost": "num_lost", "spread": "num"}.get(sort, sort)
    values = [getattr(item, value) for item in items]
    assert values == sorted(values, reverse=down) or sort == "spread"


@pytest.mark.parametrize("mark", ["order|best", "scores", "scored", "part|train"])
def test_a_mark_that_an_address_makes_up_lets_nothing_through(made, mark):
    assert made.shown().finder.find(Filter(mark=mark)).total == 0


def test_the_account_is_that_of_vcot_status(made):
    status = made.shown().index.read("status", RunStatus)

    async def ask():
        with open_run(made.directory, access="read") as run:
            async with Session(run, ignore) as session:
                return await look_at_run(session, None, 0, time.time())

    assert status.stages == asyncio.run(ask()).stages


def test_what_the_run_answers_later_is_found_and_an_error_that_was_replaced_is_not(own):
    finder = own.index().finder
    assert finder.find(Filter(mark="failed|overloaded")).total == 1
    assert finder.find(Filter(text="zanzibar")).total == 0

    def go_on(session):
        request = list(list_rounds(session)[0].requests())[2]
        session.run.ledger.put(
            [respond(request, index, f"In Zanzibar. <R> The answer is (A). {index}") for index in range(K)]
        )

    own.change(go_on)
    own.index()
    assert finder.find(Filter(mark="failed|overloaded")).total == 0
    assert finder.find(Filter(text="zanzibar")).total == 1

    async def judge():
        with open_run(own.directory, access="alone") as run:
            async with Session(run, ignore) as session:
                await judge_stage(list_rounds(session)[-1])

    asyncio.run(judge())
    own.index()
    (item,) = finder.find(Filter(text="zanzibar statements")).items
    assert (item.num_good, item.num_lost, item.num_judged) == (K, 0, K)


def test_nothing_is_looked_at_twice_unless_it_may_have_changed(own):
    own.index()
    index = sqlite3.connect(own.directory / FOLDER / INDEX)
    index.execute("UPDATE items SET question = 'untouched'")
    index.execute("UPDATE sheets SET asked = '{}'")
    index.commit()
    own.index()
    looked_at = index.execute("SELECT count(*) FROM sheets WHERE asked != '{}'").fetchone()[0]
    assert looked_at == 1, "that with errors that a command may ask again"


def test_an_index_that_was_stopped_goes_on(own):
    own.index()
    index = sqlite3.connect(own.directory / FOLDER / INDEX)
    index.execute("UPDATE items SET due = 1, num_good = 99 WHERE num % 2")
    index.commit()
    assert own.shown().index.progress() == (10, 21)
    own.index()
    assert own.shown().index.progress() == (21, 21)
    assert index.execute("SELECT count(*) FROM items WHERE num_good = 99").fetchone() == (0,)
    assert own.shown().finder.find(Filter(text="null")).total == 1


def test_a_run_that_is_as_it_was_is_not_gone_through_again(own):
    def is_touched():
        return index.execute("SELECT count(*) FROM items WHERE num_good = 99").fetchone() != (21,)

    folder = own.directory / FOLDER
    index_once(own.directory, folder)
    index = sqlite3.connect(folder / INDEX, isolation_level=None)
    index.execute("UPDATE items SET due = 1, num_good = 99")
    index_once(own.directory, folder)
    assert not is_touched()

    def go_on(session):
        request = list(list_rounds(session)[0].requests())[2]
        session.run.ledger.put([respond(request, index, "Anew. <R> The answer is (A).") for index in range(K)])

    own.change(go_on)
    index_once(own.directory, folder)
    assert is_touched()


def test_what_could_not_be_read_is_looked_at_again_by_the_next(own):
    ledger, folder = own.directory / "ledger.sqlite", own.directory / FOLDER
    kept, stat = ledger.read_bytes(), ledger.stat()
    ledger.write_bytes(b"no ledger at all" * (len(kept) // 16))
    os.utime(ledger, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    index_once(own.directory, folder)
    assert "is not a ledger" in own.shown().find_pulse().problem
    ledger.write_bytes(kept)
    os.utime(ledger, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    index_once(own.directory, folder)
    assert own.shown().find_pulse().problem is None


@pytest.mark.parametrize("spoil", ["version", "recipe", "file"])
def test_an_index_of_something_else_is_made_anew(own, spoil):
    shown = own.index()
    assert shown.index.progress() == (21, 21), "its reader has the file open"
    path = own.directory / FOLDER / INDEX
    if spoil == "version":
        index = sqlite3.connect(path)
        index.executescript("DROP TABLE marks; PRAGMA user_version = 99")
        index.close()
    elif spoil == "file":
        path.write_bytes(b"no index" * 1000)
    else:
        text = (own.directory / RECIPE).read_text("utf-8")
        (own.directory / RECIPE).write_text(text.replace('policy = "best_worst"', 'policy = "right_wrong"'))
    own.index()
    assert shown.index.progress() == (21, 21)
    assert shown.index.read("facets", Facets).marks["pair|made"] > 0


def test_the_ledger_is_only_read_while_a_command_writes(own):
    with open_run(own.directory, access="alone") as run:
        run.ledger.put([])
        before = (own.directory / "ledger.sqlite").read_bytes()
        assert own.index().finder.find(Filter()).total == 21
        assert (own.directory / "ledger.sqlite").read_bytes() == before
        run.ledger.close()


def test_the_process_that_keeps_it_ends_with_the_viewer(own):
    command = [sys.executable, "-m", "vcot.services.view.indexing", str(own.directory), str(own.directory / FOLDER)]
    process = subprocess.Popen(keeper_command(command, 1.0), stdin=subprocess.PIPE, start_new_session=True)
    end, shown = time.monotonic() + 60, own.shown()
    while not shown.index.progress()[0] and time.monotonic() < end:
        time.sleep(0.05)
    process.stdin.close()
    assert process.wait(timeout=10) != 0
    assert shown.index.progress()[0] > 0


@pytest.mark.parametrize(("name", "said"), [("ledger.sqlite", "is not a ledger"), (RECIPE, "name is missing")])
def test_what_cannot_be_read_is_said_and_forgotten_when_it_can(own, name, said):
    kept = (own.directory / name).read_bytes()
    (own.directory / name).write_bytes(b"no = 'ledger at all'\n" + b"#" * 2000)
    assert said in own.index().find_pulse().problem
    (own.directory / name).write_bytes(kept)
    assert own.index().find_pulse().problem is None


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"low": "abc"}, "low"),
        ({"page": "0"}, "page"),
        ({"sort": "size"}, "sort"),
        ({"text": "?!"}, "no word"),
        ({"low": "nan"}, "low"),
    ],
)
def test_a_filter_that_cannot_be_read_names_its_field(query, said):
    with pytest.raises(InputError, match=said):
        read_filter(query)


def test_a_filter_is_what_its_address_says():
    from urllib.parse import parse_qsl

    wanted = Filter(text="a & b=c", low=0.0, down=True, mark="pair|made")
    assert read_filter(dict(parse_qsl(wanted.query))) == wanted
    assert read_filter({"text": "  ", "unknown": "x"}) == Filter()
    assert read_filter({"subject": " physics", "low": " 1 "}) == Filter(subject=" physics", low=1.0)


@pytest.mark.parametrize(
    "text", [*HOSTILE[:5], "naïve café", "日本語 テスト", "हिन्दी", "مرحبا", "NEAR AND OR NOT", "*", '"', "a" * 5000]
)
def test_any_words_can_be_looked_for(made, text):
    try:
        wanted = read_filter({"text": text})
    except InputError:
        assert text in ("*", '"')
        return
    assert made.shown().finder.find(wanted).total <= 21


@pytest.mark.parametrize(
    "word", ["Straße", "İstanbul", "ﬁne", "Café", "cafe", "cafe\u0301", "e\u0301lan", "việt", "viet"]
)
def test_a_word_is_found_as_the_index_folds_it(own, word):
    own.index()
    with sqlite3.connect(own.directory / FOLDER / INDEX) as index:
        told = "Straße İstanbul ﬁne café élan Việt"
        index.execute("INSERT INTO texts (rowid, body) VALUES (?, ?)", ((1 << 12) + 4000, told))
    assert own.shown().finder.find(Filter(text=word)).total == 1


@pytest.mark.parametrize("how", ["moved away", "put back"])
def test_an_index_follows_another_ledger(own, tmp_path, how):
    """The ledger's own messages say to move a damaged one away, or to put a copy in its place."""

    def answer_first(session):
        request = next(iter(list_rounds(session)[0].requests()))
        session.run.ledger.put([respond(request, index, "Anew. <R> The answer is (A).") for index in range(K)])

    path, copy = own.directory / "ledger.sqlite", tmp_path / "copy.sqlite"
    if how == "put back":
        path.rename(tmp_path / "full.sqlite")
        own.change(answer_first)
        shutil.copyfile(path, copy)
        shutil.copyfile(tmp_path / "full.sqlite", path)
    before = own.index()
    numbers = [item.num_good for item in before.finder.find(Filter()).items]
    assert sum(numbers) > K
    if how == "put back":
        shutil.copyfile(copy, path)
    else:
        path.rename(copy)
        own.change(answer_first)
    client = own.client()
    items = before.finder.find(Filter()).items
    assert all(
        client.get("/runs/0/task", params={"of": one.part, "task": one.task}).status_code == 200 for one in items
    )
    shown = own.index()
    assert [item.num_good for item in shown.finder.find(Filter()).items] == [K] + [0] * (len(numbers) - 1)
    assert shown.finder.find(Filter(text="Anew")).total == 1


def test_news_are_told_once(tmp_path):
    def judgment(key, task, **outcome):
        return Judgment(key=key, response="r", task=task, judge="j", **outcome)

    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert ledger.read_news((0, 0)) == ((0, 0), set())
    ledger.put([judgment("a", "first", error="none"), judgment("b", "second", score=1.0)])
    place, tasks = ledger.read_news((0, 0))
    assert (place, tasks) == ((0, 2), {"first", "second"})
    ledger.put([judgment("a", "first", score=0.5)])
    assert ledger.read_news(place) == (place, set()), "an error's place is taken without a row of its own"
    ledger.close()
