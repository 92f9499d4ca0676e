"""Who may go in, as a pure state machine: no engine, no clock, no event loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from vcot.pipeline.manifest import CheckpointManifest
from vcot.pipeline.records import CheckpointRef
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.gateway.fleet.admission import Admission


def make_checkpoint(name: str, kind: str = "merged") -> Checkpoint:
    parent = "sha256:base" if kind == "adapter" else None
    ref = CheckpointRef(name=name, digest=f"sha256:{name}", kind=kind, parent=parent)
    return Checkpoint(Path(name), CheckpointManifest(checkpoint=ref))


BASE, TUNED, LORA = make_checkpoint("base", "base"), make_checkpoint("tuned"), make_checkpoint("lora", "adapter")
BASE_DIGEST, LORA_DIGEST = BASE.ref.digest, LORA.ref.digest


@pytest.fixture
def live() -> Admission:
    admission = Admission()
    admission.move("live", "", BASE, [LORA])
    return admission


def test_nothing_is_served_before_something_is_live() -> None:
    admission = Admission()
    assert not admission.serves(BASE_DIGEST)
    assert admission.served == []
    with pytest.raises(RuntimeError, match="without a checkpoint"):
        admission.move("live", "")
    with pytest.raises(RuntimeError, match="is admitted while loading"):
        admission.admit(BASE_DIGEST)
    assert (admission.phase, admission.in_flight) == ("loading", 0)


def test_the_live_checkpoint_and_its_adapters_are_served_and_nothing_else(live: Admission) -> None:
    assert live.served == [BASE, LORA]
    assert [live.serves(c.ref.digest) for c in (BASE, LORA, TUNED)] == [True, True, False]
    with pytest.raises(RuntimeError, match="no request for sha256:tuned"):
        live.admit(TUNED.ref.digest)


def test_requests_are_counted_in_and_out_by_checkpoint(live: Admission) -> None:
    for digest in (BASE_DIGEST, LORA_DIGEST, LORA_DIGEST):
        live.admit(digest)
    assert (live.in_flight, live.asked_for(BASE_DIGEST), live.asked_for(LORA_DIGEST)) == (3, 1, 2)
    live.leave(LORA_DIGEST)
    live.leave(BASE_DIGEST)
    assert (live.in_flight, live.asked_for(BASE_DIGEST), live.asked_for(LORA_DIGEST)) == (1, 0, 1)
    with pytest.raises(RuntimeError, match="not admitted"):
        live.leave(BASE_DIGEST)
    assert live.in_flight == 1


def test_a_swap_begins_when_what_was_admitted_has_left(live: Admission) -> None:
    live.admit(BASE_DIGEST)
    assert not live.is_changing
    live.move("draining", "swapping base for tuned")
    assert (live.phase, live.message) == ("draining", "swapping base for tuned")
    assert (live.is_changing, live.is_drained, live.served) == (True, False, [])
    assert not live.serves(BASE_DIGEST)
    with pytest.raises(RuntimeError, match="1 requests in flight"):
        live.move("swapping", "")
    live.leave(BASE_DIGEST)
    assert live.is_drained
    live.move("swapping", "")
    assert (live.is_changing, live.is_drained) == (True, False)
    live.move("live", "", TUNED)
    assert live.served == [TUNED], "adapters go with the weights that they were on"


def test_what_is_given_up_resumes_with_what_was_live(live: Admission) -> None:
    live.move("draining", "")
    live.move("live", "")
    assert live.served == [BASE, LORA]


def test_an_engine_that_died_holds_nothing(live: Admission) -> None:
    live.move("dead", "it died")
    assert (live.checkpoint, live.adapters, live.message) == (None, {}, "it died")
    live.move("loading", "")
    with pytest.raises(RuntimeError, match="without a checkpoint"):
        live.move("live", "")


def test_a_step_that_is_not_drawn_is_a_bug(live: Admission) -> None:
    with pytest.raises(RuntimeError, match="cannot go from live to swapping"):
        live.move("swapping", "")
    assert live.served == [BASE, LORA]


def test_a_ramp_begins_small_and_grows_with_what_leaves(live: Admission) -> None:
    let_in = []
    for _ in range(7):
        let_in.append(0)
        while live.has_room and let_in[-1] < 1000:
            live.admit(BASE_DIGEST)
            let_in[-1] += 1
        assert live.is_ramping == (let_in[-1] < 1000)
        for _ in range(let_in[-1]):
            live.leave(BASE_DIGEST)
    assert let_in == [8, 16, 32, 64, 128, 256, 1000]


def test_a_ramp_is_over_when_as_many_may_go_in_as_a_server_is_given(live: Admission) -> None:
    for _ in range(256 - 8):
        live.admit(BASE_DIGEST)
        live.leave(BASE_DIGEST)
    assert live.is_ramping
    live.admit(BASE_DIGEST)
    live.leave(BASE_DIGEST)
    assert not live.is_ramping


def test_a_ramp_ends_with_its_time_and_a_drain_that_was_given_up_begins_none(live: Admission) -> None:
    live.end_ramp()
    assert not live.is_ramping
    live.move("draining", "")
    live.move("live", "")
    assert not live.is_ramping, "the engine has its caches"
    live.move("draining", "")
    live.move("swapping", "")
    live.move("live", "", TUNED)
    assert live.is_ramping
    live.move("dead", "")
    assert not live.is_ramping


def test_a_ramp_goes_on_behind_a_drain_that_was_given_up(live: Admission) -> None:
    live.move("draining", "")
    assert live.is_ramping
    live.move("swapping", "")
    assert not live.is_ramping, "the engine's caches are reset"
