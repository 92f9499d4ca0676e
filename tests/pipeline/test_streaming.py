"""Steps go through a run some tasks at a time, and find what going through it whole would find."""

import asyncio
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vcot.pipeline.errors import StageError
from vcot.pipeline.judges import Judge, judgment_keys
from vcot.pipeline.judging import find_standing, judge_responses, read_judged
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.pairs import build_pairs, read_pairs, split_pairs
from vcot.pipeline.publish import pairs_digest
from vcot.pipeline.records import (
    CheckpointRef,
    ImageRef,
    Judgment,
    Response,
    SamplingParams,
    StageCount,
    Task,
    Usage,
    Verdict,
    content_key,
)  # fmt: skip
from vcot.pipeline.sample import Groups, Plan, is_owed, look
from vcot.pipeline.sections import JudgeSection

BASE = CheckpointRef(name="base", digest="sha256:aa", kind="base")
K = 3
SECTION = JudgeSection(max_unjudged=0.3, max_asks=2, max_concurrency=1)
SCORES = {"a": 0.0, "b": 0.5, "c": 1.0}


class Remembering(Judge):
    """Scores a text by what it says, and remembers what it was asked."""

    name = "remembering/1"

    def __init__(self):
        self.asked = []

    async def score(self, task, response, *, num_asked=0):
        self.asked.append(response.key)
        return Verdict(
            score=SCORES[response.words], rationale=response.key, usage=Usage(prompt_tokens=1, completion_tokens=1)
        )


def make_task(number):
    image = ImageRef(sha256=f"im{number}", path="p", width=1, height=1)
    return Task(
        id=f"t{number}", question="q?", choices=("x", "y"), answer=0, images=(image,), source="nano", split="train"
    )


RESPONSE = st.one_of(
    st.none(), st.just("error"), st.tuples(st.sampled_from("abc"), st.booleans(), st.sampled_from(["", " "]))
)
JUDGED = st.sampled_from(["none", "ok", "failed", "refused", "refused twice", "refused by an older version"])
RUNS = st.lists(st.lists(st.tuples(RESPONSE, JUDGED), min_size=K, max_size=K), min_size=1, max_size=12)


class Made:
    """A ledger that holds a run, and the run as whole lists."""

    def __init__(self, run, folder):
        self.tasks = [make_task(number) for number in range(len(run))]
        self.plan = Plan(self.tasks, "cot", BASE, SamplingParams(temperature=0.5, max_tokens=8, n=K, seed=0))
        self.ledger, self.judge = Ledger(folder / "ledger.sqlite"), Remembering()
        self.responses, self.states = [], {}
        for request, members in zip(self.plan, run, strict=True):
            for index, (found, state) in enumerate(members):
                if (response := self._answer(request, index, found)) is not None:
                    self.responses.append(response)
                    self._judge(request.task, response, state)

    def _answer(self, request, index, found):
        if found is None:
            return None
        said = {"error": "HTTP 500"} if found == "error" else {
            "text": found[0] + found[2], "finish_reason": "length" if found[1] else "stop"
        }  # fmt: skip
        response = Response(
            key=request.response_key(index), group=request.key, task=request.task.id, index=index, checkpoint=BASE,
            prompt="cot", sampling=request.sampling, **said,
        )  # fmt: skip
        self.ledger.put([response])
        return response

    def _judge(self, task, response, state):
        if response.error is not None or state == "none":
            return
        outcome = {
            "ok": {"score": SCORES[response.words], "num_asked": 1},
            "failed": {"error": "HTTP 503", "reason": "overloaded"},
            "refused": {"error": "no", "reason": "refusal", "refused": True, "num_asked": 1},
            "refused twice": {"error": "no", "reason": "refusal", "refused": True, "num_asked": 2},
            "refused by an older version": {"error": "no", "reason": "refusal", "refused": True},
        }[state]
        (key,) = judgment_keys(self.judge, task, [response])
        judgment = Judgment(key=key, response=response.key, task=task.id, judge=self.judge.name, **outcome)
        self.ledger.put([judgment])
        self.states[response.key] = judgment

    @property
    def groups(self):
        return Groups(self.plan, self.ledger)


def whole_standing(made):
    """Which responses are owed and which are refused for good, by going through all of them at once."""
    good = [response for response in made.responses if response.error is None]
    judged = [r for r in good if r.key in made.states and made.states[r.key].error is None]
    refused = [r for r in good if (j := made.states.get(r.key)) and j.refused and j.num_asked]
    if len(refused) > SECTION.max_unjudged * len(good):
        refused = [r for r in refused if made.states[r.key].num_asked >= SECTION.max_asks]
    owed = [r for r in good if r not in judged and r not in refused]
    return good, judged, refused, owed


@given(RUNS)
@settings(max_examples=60)
def test_the_standing_is_that_of_the_whole_run(run):
    with TemporaryDirectory() as folder:
        made = Made(run, Path(folder))
        good, judged, refused, owed = whole_standing(made)
        standing = find_standing(made.judge, made.groups, made.ledger, SECTION)
        reasons = Counter(made.states[r.key].reason if r.key in made.states else "not_asked" for r in owed)
        reasons.update(made.states[r.key].reason for r in refused)
        assert standing.count() == StageCount(
            stage="judge", requested=len(good), ok=len(judged), failed=len(owed), refused=len(refused), reasons=reasons
        )
        said = {(r.task, r.words) for r in owed} - {(r.task, r.words) for r in judged}
        assert (standing.num_asks, standing.num_owed) == (len(said), len(owed))


@given(RUNS)
@settings(max_examples=40)
def test_what_is_owed_is_asked_once_in_the_order_of_the_responses(run):
    with TemporaryDirectory() as folder:
        made = Made(run, Path(folder))
        _, judged, refused, owed = whole_standing(made)
        count = asyncio.run(judge_responses(made.judge, made.groups, made.ledger, SECTION))
        known, first = {(r.task, r.words) for r in judged}, {}
        for response in owed:
            if (response.task, response.words) not in known:
                first.setdefault((response.task, response.words), response.key)
        assert made.judge.asked == list(first.values())
        assert (count.ok, count.cached, count.refused) == (len(owed), len(judged), len(refused))
        after = find_standing(made.judge, made.groups, made.ledger, SECTION)
        assert (after.num_owed, after.num_judged) == (0, len(owed) + len(judged))


def as_hashed(pair):
    """What the digest holds of a pair with one image."""
    row = pair.model_dump(mode="json", exclude={"images", "chosen_judgment", "rejected_judgment"})
    return row | {"image": pair.images[0].model_dump(exclude={"path"})}


@given(RUNS)
@example([[(None, "none")] * 3, [(None, "none"), (("a", False, ""), "ok"), (("b", False, ""), "ok")]])
@settings(max_examples=60)
def test_pairs_and_their_digest_are_those_of_the_whole_run(run):
    with TemporaryDirectory() as folder:
        made = Made(run, Path(folder))
        found = build_pairs(read_judged(made.judge, made.groups, made.ledger))
        pairs = list(read_pairs(found.pairs, made.tasks, made.ledger))
        expected = []
        for task in made.tasks:
            own = [
                r for r in made.responses if r.task == task.id and (j := made.states.get(r.key)) and j.score is not None
            ]
            whole = [r for r in own if r.finish_reason != "length"]
            if len(own) < 2 or not whole:
                continue
            best = max(whole, key=lambda r: (SCORES[r.words], -r.index))
            others = [r for r in own if r.words != best.words]
            worst = min(others, key=lambda r: (SCORES[r.words], r.index), default=best)
            if SCORES[worst.words] < SCORES[best.words]:
                expected.append((task.id, best.text, worst.text))
        assert [(pair.task, pair.chosen, pair.rejected) for pair in pairs] == expected
        halves = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
        rows = [[as_hashed(pair) for pair in half] for half in halves]
        assert pairs_digest(*map(iter, halves)) == content_key(rows=rows)


def test_a_split_by_keys_is_that_of_the_pairs(tmp_path):
    made = Made([[(("a", False, ""), "ok"), (("c", False, ""), "ok"), (None, "none")]] * 20, tmp_path)
    couples = build_pairs(read_judged(made.judge, made.groups, made.ledger)).pairs
    pairs = list(read_pairs(couples, made.tasks, made.ledger))
    by_keys, whole = split_pairs(couples, 0.2, seed=0), split_pairs(pairs, 0.2, seed=0)
    assert [[one.task for one in part] for part in by_keys] == [[one.task for one in part] for part in whole]


async def test_no_more_of_the_run_is_read_than_is_being_asked(tmp_path):
    """Memory holds some tasks at a time, however many there are."""
    made = Made([[(("a", False, ""), "none"), (None, "none"), (None, "none")]] * 300, tmp_path)
    read, seen = 0, []

    def watched():
        nonlocal read
        for group in made.groups:
            read += 1
            yield group

    class Watching(Remembering):
        async def score(self, task, response, *, num_asked=0):
            seen.append(read)
            return await super().score(task, response, num_asked=num_asked)

    judge = Watching()
    standing = find_standing(judge, made.groups, made.ledger, SECTION)
    await judge_responses(judge, watched(), made.ledger, SECTION, standing=standing)
    assert len(seen) == 300
    assert all(held - asked <= 64 for asked, held in enumerate(seen))
    read, couples = 0, []
    for task, judged in read_judged(judge, watched(), made.ledger):
        couples.append((task, judged))
        assert read - len(couples) <= 64


def test_requests_are_made_as_they_are_gone_through(tmp_path):
    made = Made([[(("a", False, ""), "none")] * K, [(None, "none")] * K] * 100, tmp_path)
    assert len(made.plan) == 200
    assert [is_done for _, is_done in look(made.plan, made.ledger)] == [True, False] * 100
    assert is_owed(made.plan, made.ledger)
    first = [request.key for request in made.plan]
    assert first == [request.key for request in made.plan]
    some = next(look(iter(made.plan), made.ledger))
    assert some[0].key == first[0]


async def test_verdicts_that_are_shared_do_not_hide_a_judge_that_is_gone(tmp_path):
    """Each group has a judged response, one that says the same, and one that is to be asked for."""
    group = [(("a", False, ""), "ok"), (("a", False, " "), "none"), (("b", False, ""), "none")]
    made = Made([group] * 50, tmp_path)

    class Gone(Remembering):
        async def score(self, task, response, *, num_asked=0):
            self.asked.append(response.key)
            return Verdict(error="HTTP 503", reason="overloaded")

    judge = Gone()
    with pytest.raises(StageError, match="3 requests in a row failed"):
        await judge_responses(judge, made.groups, made.ledger, SECTION)
    assert len(judge.asked) == 3
    assert find_standing(judge, made.groups, made.ledger, SECTION).num_judged == 100


async def test_where_nothing_is_owed_nothing_is_read_again(tmp_path):
    made = Made([[(("a", False, ""), "ok")] * K] * 20, tmp_path)
    standing = find_standing(made.judge, made.groups, made.ledger, SECTION)

    def never():
        pytest.fail("it was gone through again")
        yield

    count = await judge_responses(made.judge, never(), made.ledger, SECTION, standing=standing)
    assert (count.cached, count.requested) == (60, 60)
