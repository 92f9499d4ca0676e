import asyncio
import json
import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcot.pipeline.errors import InputError, StageError
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.odds import OptionScores
from vcot.pipeline.records import (
    CheckpointRef,
    ImageGain,
    Judgment,
    Reply,
    Response,
    SamplingParams,
    Usage,
    content_key,
)


def judgment(key, score=1.0, error=None):
    return Judgment(key=key, response=key, task="t", judge="j", score=None if error else score, error=error)


def make_response(group, index, text="It is red.<R>A", **fields):
    return Response(
        **{
            "key": content_key(group=group, index=index), "group": group, "task": "t", "index": index,
            "checkpoint": CheckpointRef(name="base", digest="sha256:a", kind="base"), "prompt": "cot",
            "sampling": SamplingParams(temperature=0.5, max_tokens=9, n=8, seed=1), "text": text,
            **fields,
        }
    )  # fmt: skip


def former(path, records):
    """A file of the layout that version 0.1.0 was begun with."""
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TABLE records (kind TEXT NOT NULL, key TEXT NOT NULL, ok INTEGER NOT NULL, body TEXT NOT NULL, "
            "PRIMARY KEY (kind, key)) WITHOUT ROWID"
        )
        rows = [(type(r).__name__, r.key, r.error is None, r.model_dump_json(exclude_none=True)) for r in records]
        connection.executemany("INSERT INTO records VALUES (?, ?, ?, ?)", rows)
    connection.close()


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
CHECKPOINTS = st.builds(CheckpointRef, name=WORDS, digest=WORDS, kind=st.just("merged"), parent=st.none() | WORDS)
USAGES = st.builds(Usage, prompt_tokens=st.integers(0, 9), completion_tokens=st.integers(0, 9))
SAMPLINGS = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_p=st.floats(0.1, 1),
    max_tokens=st.integers(1, 9),
    n=st.integers(1, 9),
    seed=st.integers(-(2**63), 2**63 - 1),
)
SAID = st.fixed_dictionaries(
    {"text": WORDS, "thought": st.none() | WORDS, "answer": st.none() | WORDS},
    optional={"finish_reason": WORDS, "usage": USAGES, "latency_s": st.floats(0, 1e9)},
)
FAILED = st.fixed_dictionaries({"error": WORDS}, optional={"reason": WORDS, "refused": st.booleans()})
KEYS = st.sampled_from("abc") | st.sampled_from([content_key(n=n) for n in range(4)])


@st.composite
def responses(draw):
    outcome = draw(SAID | FAILED)
    if outcome.get("text") and draw(st.booleans()):  # as prompts take them apart
        outcome["thought"], outcome["answer"] = outcome["text"][:3], outcome["text"][3:]
    fields = {"key": draw(KEYS), "group": draw(KEYS), "task": draw(WORDS), "index": draw(st.integers(0, 3))}
    asked = {"checkpoint": draw(CHECKPOINTS), "prompt": draw(st.sampled_from(["cot", "zero_shot"]))}
    return Response(sampling=draw(SAMPLINGS), **fields, **asked, **outcome)


@st.composite
def judgments(draw):
    interval = {"low": st.floats(-10, 0), "high": st.floats(0, 10)}
    outcome = draw(st.fixed_dictionaries({"score": st.floats(-10, 10)}, optional=interval) | FAILED)
    fields = {"key": draw(KEYS), "response": draw(KEYS), "task": draw(WORDS), "judge": draw(WORDS)}
    usage = {"usage": draw(st.none() | USAGES), "num_asked": draw(st.integers(0, 3)), "rationale": draw(WORDS)}
    return Judgment(**fields, **usage, **outcome)


@st.composite
def replies(draw):
    outcome = draw(st.fixed_dictionaries({"text": WORDS}) | FAILED)
    return Reply(key=draw(KEYS), judge=draw(WORDS), usage=draw(st.none() | USAGES), **outcome)


@given(st.lists(st.lists(responses() | judgments() | replies(), max_size=4), max_size=5), st.booleans())
@settings(max_examples=150)
def test_what_comes_back_is_what_was_put(puts, is_former):
    """The last error, or the first good record, of each kind and key: whatever else is in its row, and in the file."""
    expected = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "l.sqlite")
        if is_former and puts:
            first = {(type(r), r.key): r for r in puts.pop(0) if not isinstance(r, Reply)}
            former(path, first.values())
            expected |= first
        ledger = Ledger(path)
        for records in puts:
            ledger.put(records)
            for record in records:
                known = expected.get((type(record), record.key))
                if known is None or known.error is not None:
                    expected[type(record), record.key] = record
        for kind in (Response, Judgment, Reply):
            wanted = {key: record for (k, key), record in expected.items() if k is kind}
            assert ledger.get(kind, [*wanted, "never"]) == wanted
            assert ledger.done(kind, wanted) == {key for key, record in wanted.items() if record.error is None}
        assert ledger.is_empty() == (not expected)
        ledger.close()


def test_a_file_of_the_former_layout_is_brought_up_to_date_when_it_is_written(tmp_path):
    path = tmp_path / "l.sqlite"
    records = [make_response(group, index) for group in "ab" for index in range(8)]
    former(path, [*records, judgment("a", 0.5)])
    with pytest.raises(
        InputError, match=r"l\.sqlite is of an earlier version .* brings it up to date, as `vcot sample`"
    ):
        Ledger(path, is_read=True)
    Ledger(path).close()
    reader = Ledger(path, is_read=True)
    assert reader.get(Response, [r.key for r in records]) == {r.key: r for r in records}
    assert reader.get(Judgment, ["a"]) == {"a": judgment("a", 0.5)}


def test_a_file_of_judgments_without_intervals_is_brought_up_to_date(tmp_path):
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    ledger.put([judgment("a", 0.5)])
    ledger.close()
    with sqlite3.connect(path) as connection:
        drop = "ALTER TABLE judgments DROP COLUMN"
        connection.executescript(f"{drop} low; {drop} high; DROP TABLE replies")
    connection.close()
    with pytest.raises(InputError, match="is of an earlier version"):
        Ledger(path, is_read=True)
    ledger = Ledger(path)
    rated = judgment("b", 1.0).model_copy(update={"low": 0.5, "high": 1.5})
    ledger.put([rated])
    assert ledger.get(Judgment, "ab") == {"a": judgment("a", 0.5), "b": rated}
    ledger.close()
    assert Ledger(path, is_read=True).get(Judgment, "b") == {"b": rated}


def test_what_was_paid_is_that_of_judgments_and_replies(tmp_path):
    ledger, usage = Ledger(tmp_path / "l.sqlite"), Usage(prompt_tokens=7, completion_tokens=3)
    ledger.put([Reply(key="x", judge="j", error="no", refused=True, usage=usage), Reply(key="y", judge="k", text="")])
    assert not ledger.is_empty()
    ledger.put([judgment("a").model_copy(update={"usage": usage})])
    assert ledger.spent("j") == (2, usage + usage)
    assert ledger.spent("k") == (0, Usage(prompt_tokens=0, completion_tokens=0))


def test_a_file_of_the_former_layout_that_cannot_be_read_stays_as_it_is(tmp_path):
    path = tmp_path / "l.sqlite"
    former(path, [make_response("g", 0), judgment("a")])
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE records SET body = json_set(body, '$.newer', 1) WHERE kind = 'Judgment'")
    connection.close()
    before = dump(path)
    for _ in range(2):
        with pytest.raises(InputError, match="holds a Judgment that cannot be read"):
            Ledger(path)
    assert dump(path)["records"] == before["records"]
    assert dump(path)["responses"] == []


def dump(path):
    with sqlite3.connect(path) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        found = {name: connection.execute(f"SELECT * FROM {name}").fetchall() for name in names}
    connection.close()
    return found


async def test_who_waits_at_once_shares_a_transaction_and_one_s_fault_is_its_own(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    broken = judgment("b").model_copy(update={"key": Unbindable("b")})
    sets = [[judgment("a")], [broken], [judgment("c")]]
    outcomes = await asyncio.gather(*(ledger.write(records) for records in sets), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), ValueError, type(None)]
    assert ledger.done(Judgment, "abc") == {"a", "c"}


async def test_a_hundred_writers_that_wait_take_two_transactions(tmp_path):
    """The log grows by whole pages with each."""
    sizes = []
    for name, at_once in (("one.sqlite", 1), ("many.sqlite", 100)):
        ledger = Ledger(tmp_path / name)
        for start in range(0, 100, at_once):
            await asyncio.gather(*(ledger.write([judgment(str(start + n))]) for n in range(at_once)))
        sizes.append((tmp_path / f"{name}-wal").stat().st_size)
        await ledger.finish()
    assert sizes[1] < sizes[0] / 5


def test_texts_are_stored_as_they_are_written(tmp_path):
    """Escaped, one that is not English would take twice the room."""
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    ledger.put([make_response("g", index, text="Es ist grün.", prompt="größer") for index in (0, 1)])
    ledger.close()
    [(_, asked)], [(*_, members)] = dump(path)["asked"], dump(path)["groups"]
    assert '"größer"' in asked
    assert members.count('"text":"Es ist grün."') == 2
    assert "},{" in members


def test_records_come_back_by_kind_and_key(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.put([judgment("a"), judgment("b", error="no")])
    assert ledger.get(Judgment, ["a", "b", "c"]) == {"a": judgment("a"), "b": judgment("b", error="no")}


def test_an_error_is_owed_until_a_good_record_replaces_it(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.put([judgment("a", error="reset")])
    assert ledger.done(Judgment, ["a"]) == set()
    ledger.put([judgment("a", 0.5)])
    assert ledger.done(Judgment, ["a"]) == {"a"}


def test_what_replaces_an_error_lies_in_its_place_or_in_its_own_row_and_moves_no_other(tmp_path):
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    errors = [make_response("a", index, text=None, error=f"reset {index}") for index in range(3)]
    first, last = make_response("a", 0), make_response("b", 0, key=errors[2].key)
    for records in (errors, [first], [last]):
        ledger.put(records)
    stored = [first, errors[1], last]
    assert ledger.get(Response, [record.key for record in stored]) == {record.key: record for record in stored}
    ledger.close()
    assert [len(json.loads(members)) for *_, members in dump(path)["groups"]] == [3, 1]


def test_the_documented_copy_is_whole_while_a_command_writes(tmp_path):
    """docs/operations.md: beside a command at work, SQLite copies the ledger."""
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text("utf-8")
    [code] = re.findall(r'^    python -c "(.*ledger\.sqlite.*)"$', page, re.MULTILINE)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.put([judgment("a")])
    code = code.replace("runs/paper", str(tmp_path)).replace("/backup", str(tmp_path / "backup"))
    (tmp_path / "backup").mkdir()
    subprocess.run([sys.executable, "-c", code], check=True)
    ledger.put([judgment("b")])
    assert Ledger(tmp_path / "backup" / "ledger.sqlite").get(Judgment, ["a", "b"]) == {"a": judgment("a")}


def test_nothing_replaces_a_good_record(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.put([judgment("a", 0.5)])
    ledger.put([judgment("a", error="late failure")])
    ledger.put([judgment("a", 0.9)])
    assert ledger.get(Judgment, ["a"])["a"].score == 0.5


def test_more_keys_than_a_statement_may_hold(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    keys = [str(i) for i in range(1203)]
    ledger.put([judgment(key) for key in keys])
    many = (str(i) for i in range(40_000))  # SQLite takes 32,766
    assert ledger.done(Judgment, many) == set(keys)
    assert len(ledger.get(Judgment, iter(keys))) == 1203


def test_a_file_that_is_no_ledger_is_named(tmp_path):
    path = tmp_path / "l.sqlite"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(InputError, match=r"l\.sqlite is not a ledger"):
        Ledger(path)


def test_closing_waits_for_a_thread_that_writes(tmp_path):
    """In a process of its own: without the lock it ends by a segmentation fault."""
    code = f"""
import pathlib, sqlite3, threading
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.odds import OptionScores
from vcot.pipeline.records import Judgment, Usage
def write(ledger, number):
    try:
        for i in range(100):
            ledger.put([Judgment(key=f"{{number}}/{{i}}", response="r", task="t", judge="j", score=1.0)] * 50)
    except sqlite3.ProgrammingError:
        pass
for attempt in range(40):
    ledger = Ledger(pathlib.Path({str(tmp_path)!r}) / f"{{attempt}}.sqlite")
    threads = [threading.Thread(target=write, args=(ledger, number)) for number in range(4)]
    for thread in threads:
        thread.start()
    ledger.close()
    for thread in threads:
        thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_was_put_survives_kill_9(tmp_path):
    path = tmp_path / "l.sqlite"
    code = f"""
import os, pathlib
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.odds import OptionScores
from vcot.pipeline.records import Judgment, Usage
ledger = Ledger(pathlib.Path({str(path)!r}))
for i in range(50):
    ledger.put([Judgment(key=str(i), response="r", task="t", judge="j", score=1.0)])
    print(i, flush=True)
os.kill(os.getpid(), {signal.SIGKILL})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert len(Ledger(path).done(Judgment, [str(i) for i in range(50)])) == 50


async def test_a_cancelled_writer_s_record_is_kept_and_closing_waits_for_it(tmp_path):
    """Else the ledger is closed while a thread writes, which ends the process, and what was paid for is lost."""
    ledger = Ledger(tmp_path / "l.sqlite")
    writers = [asyncio.create_task(ledger.write([judgment(str(i))])) for i in range(40)]
    await asyncio.sleep(0)
    for writer in writers:
        writer.cancel()
    await asyncio.gather(*writers, return_exceptions=True)
    await ledger.finish()
    assert len(Ledger(tmp_path / "l.sqlite").done(Judgment, [str(i) for i in range(40)])) == 40


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.put([judgment("a")])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(StageError, match=r"l\.sqlite cannot be used .* the same command goes on"):
            ledger.put([judgment(str(i)) for i in range(2_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    ledger.put([judgment("b")])
    assert ledger.done(Judgment, ["a", "b", "7"]) == {"a", "b"}


def test_a_damaged_page_is_a_sentence(tmp_path):
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    ledger.put([judgment(str(i)) for i in range(2_000)])
    ledger.close()
    with path.open("r+b") as file:
        file.seek(8_192)
        file.write(b"\xff" * 40_000)
    with pytest.raises(StageError, match=r"l\.sqlite cannot be used .* damaged: put a copy .*, or move it away"):
        Ledger(path).get(Judgment, [str(i) for i in range(2_000)])
    path.rename(tmp_path / "damaged")
    assert Ledger(path).done(Judgment, ["0"]) == set()


def test_a_record_is_on_disk_before_it_counts(tmp_path):
    """What SQLite calls FULL; at NORMAL a power failure takes back transactions that were done."""
    assert Ledger(tmp_path / "l.sqlite")._connection.execute("PRAGMA synchronous").fetchone() == (2,)


class Unbindable(str):
    """A key that SQLite cannot take, which it finds out in the middle of a transaction."""

    def __conform__(self, protocol):
        raise ValueError("it cannot be bound")


def test_records_are_stored_together_or_not_at_all(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    broken = judgment("b").model_copy(update={"key": Unbindable("b")})
    with pytest.raises(ValueError, match="cannot be bound"):
        ledger.put([judgment("a"), broken])
    assert ledger.is_empty()
    ledger.put([judgment("a")])
    assert ledger.done(Judgment, ["a", "b"]) == {"a"}
    assert not ledger.is_empty()


async def test_a_write_that_fails_is_told_to_who_waits_and_not_to_who_closes(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    broken = judgment("b").model_copy(update={"key": Unbindable("b")})
    writer = asyncio.create_task(ledger.write([broken]))
    await asyncio.sleep(0)
    await ledger.finish()
    with pytest.raises(ValueError, match="cannot be bound"):
        await writer


def test_a_ledger_that_cannot_be_opened_is_not_called_a_wrong_file(tmp_path):
    with pytest.raises(InputError, match=r"cannot be opened .*; see that its disk has room"):
        Ledger(tmp_path / "gone" / "ledger.sqlite")


def test_a_record_of_another_version_is_a_sentence(tmp_path):
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    ledger.put([make_response("g", 0)])
    ledger.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE groups SET members = json_set(members, '$[0].newer', 1)")
    connection.close()
    with pytest.raises(InputError, match=r"holds a Response that cannot be read \(newer: Extra .*; use the version"):
        Ledger(path).get(Response, [make_response("g", 0).key])


def test_a_reader_that_may_not_write_sees_what_a_writer_at_work_has_stored(tmp_path, monkeypatch):
    path = tmp_path / "l.sqlite"
    writer = Ledger(path)
    writer.put([judgment("a")])
    monkeypatch.setattr("os.access", lambda *_: False)
    reader = Ledger(path, is_read=True)
    assert reader.get(Judgment, ["a"]) == {"a": judgment("a")}
    reader.close()
    writer.close()


def test_a_reader_of_a_ledger_that_is_not_there_finds_nothing_and_makes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader = Ledger(tmp_path / "l.sqlite", is_read=True)
    assert reader.is_empty()
    reader.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_there", [True, False])
async def test_a_reader_may_be_asked_from_any_thread(tmp_path, is_there):
    path = tmp_path / "l.sqlite"
    if is_there:
        writer = Ledger(path)
        writer.put([judgment("a")])
        writer.close()
    reader = Ledger(path, is_read=True)
    assert await asyncio.to_thread(reader.done, Judgment, ["a"]) == ({"a"} if is_there else set())


def test_what_nobody_was_billed_for_took_no_tokens(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.put([judgment("a")])
    assert ledger.spent("j") == (0, Usage(prompt_tokens=0, completion_tokens=0))


def test_who_was_asked_is_told_by_weights_once(tmp_path):
    base, policy = (CheckpointRef(name=name, digest=f"sha256:{name}", kind="merged") for name in ("base", "policy"))
    ledger = Ledger(tmp_path / "l.sqlite")
    asked = [(base, "cot"), (base, "zero_shot"), (policy, "cot")]
    ledger.put([make_response(f"g{n}", 0, checkpoint=ref, prompt=prompt) for n, (ref, prompt) in enumerate(asked)])
    assert ledger.list_checkpoints() == [base, policy]


def test_what_checkpoints_were_asked_about_given_texts_is_added_up(tmp_path):
    usage = Usage(prompt_tokens=5, completion_tokens=2)
    asked = {"checkpoint": "sha256:a", "usage": usage}
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.put(
        [
            ImageGain(key="g", response="r", logp_true=-1.0, logp_blank=-2.0, **asked),
            OptionScores(key="k", task="t", logps=(-1.5, -2.0), **asked),
        ]
    )
    assert ledger.scored() == Usage(prompt_tokens=10, completion_tokens=4)
