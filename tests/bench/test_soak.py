"""The soak's own bookkeeping, and each of its attacks once, on a real gateway over the fake engine."""

import argparse
import itertools
from pathlib import Path

import pytest

from bench import hostile, soak
from bench.engine import question, say
from tests.services.fake_vllm import install_stub, write_checkpoint
from vcot.services.gateway.admin import fetch_state
from vcot.services.run.directory import open_run
from vcot.services.run.serving import running_gateway

DIGESTS = {"base": "sha256:" + "a" * 64, "moved": "sha256:" + "b" * 64}


def test_a_slope_is_that_after_the_warm_up() -> None:
    series = soak.Series()
    for second in range(91):
        series.add(second, 100 * second if second < 30 else 3000 + second)
    assert series.slope_per_hour() == pytest.approx(3600)
    assert series.summary()["max"] == 3090
    assert soak.Series([0.0], [1.0]).slope_per_hour() == 0


def test_a_stamp_that_contradicts_itself_is_seen() -> None:
    good = {"x-vcot-checkpoint": "base", "x-vcot-digest": DIGESTS["base"]}
    name = f"base@{'a' * 12}"
    assert soak.is_stamped(good, [name, name], DIGESTS)
    assert not soak.is_stamped(good, [name, f"moved@{'b' * 12}"], DIGESTS)
    assert not soak.is_stamped(good | {"x-vcot-digest": DIGESTS["moved"]}, [name], DIGESTS)
    assert not soak.is_stamped({}, [name], DIGESTS)


def test_a_stream_without_its_end_is_no_answer() -> None:
    assert soak.read_models(b'{"model": "m"}') == ["m"]
    assert soak.read_models(b'data: {"model": "m"}\n\ndata: {"model": "m"}\n\ndata: [DONE]\n\n') == ["m", "m"]
    for text in (b'data: {"model": "m"}\n\n', b'data: {"model": "m"}\n\ndata: {"error": {}}\n\n', b"{"):
        with pytest.raises((ValueError, KeyError)):
            soak.read_models(text)


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_each_attack_is_answered_and_no_honest_request_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_stub(tmp_path / "stub")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    monkeypatch.setenv("VCOT_API_KEYS", "sk-test")
    monkeypatch.setattr(hostile, "_SLOW_S", 1.0)
    base = write_checkpoint(tmp_path / "base", "seed", 1.0, kind="base")
    with open_run(tmp_path / "run", "nano", [f"model.source={base}", "serve.port=0"]) as run:
        async with running_gateway(run, say) as gateway:
            state = await fetch_state(gateway.url)
            assert state.live is not None
            digests, watch, tally = {state.live.name: state.live.digest}, soak.Watch(state.pid), soak.Tally()
            options = argparse.Namespace(minutes=0.25, askers=2, attacks_per_s=10.0)
            await soak.soak(gateway.url, "sk-test", digests, watch, tally, options)
            assert (await fetch_state(gateway.url)).num_restarts == 0
    assert (tally.num_failed, tally.num_mis_stamped) == (0, 0), tally.faults
    assert tally.num_honest > 20
    kinds = {each.kind for each in itertools.islice(hostile.attacks("x", "k", question), 60)}
    answered = dict(what.rsplit(": ", 1) for what in tally.attacks)
    assert answered.keys() >= kinds
    expected = {"many headers": "431", "two lengths": "400", "length and chunks": "400"}
    expected |= {"no HTTP": "400", "wrong key": "401", "page": "403", "image bomb": "400", "web image": "400"}
    expected |= {"deep JSON": "400", "wide JSON": "413", "many choices": "400", "refused field": "400", "1e999": "400"}
    assert answered.items() >= expected.items()
    assert answered["head without end"] in ("431", "closed"), "its client may be sending still"
    assert watch.memory["gateway"].values[-1] > 10
