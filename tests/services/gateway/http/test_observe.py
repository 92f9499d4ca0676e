"""What is counted and logged of requests."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.services.bench_fleet import Bench
from tests.services.gateway.http.test_limits import Client
from vcot.services.gateway.http.exchange import choose_request_id
from vcot.services.gateway.http.observe import write_to_stderr


async def scrape(bench: Bench) -> dict[tuple[str, ...], float]:
    """Every sample, by name and the values of its labels in alphabetic order."""
    answer = await bench.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    return {
        (s.name, *(s.labels[label] for label in sorted(s.labels))): s.value
        for family in families
        for s in family.samples
    }


def lines(bench: Bench) -> list[dict[str, Any]]:
    return [json.loads(line) for line in bench.log]


CHAT = "/v1/chat/completions"


async def test_requests_are_counted_by_route_status_and_checkpoint(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with bench.running():
        await bench.ask()
        await bench.ask(stream=True)
        await bench.ask("fail")
        await bench.ask(model="polisy")
        await bench.http.get("/v1/secret-path")
        figures = await scrape(bench)
        assert figures["vcot_requests_total", "base", CHAT, "200"] == 2
        assert figures["vcot_requests_total", "base", CHAT, "400"] == 1
        assert figures["vcot_requests_total", "", CHAT, "404"] == 1
        assert figures["vcot_requests_total", "", "other", "404"] == 1
        assert figures["vcot_refused_total", "model_not_found"] == 1
        assert figures["vcot_request_seconds_count", "base"] == 3
        assert figures["vcot_first_byte_seconds_count", "base"] == 3
        assert figures["vcot_checkpoint_info", bench.base.ref.digest, "base"] == 1
        assert (
            figures["vcot_in_flight",]
            == figures["vcot_queued",]
            == figures["vcot_engine_restarts_total", "vllm-0"]
            == 0
        )


async def test_how_long_answers_take_is_not_told_by_refusals(tmp_path: Path) -> None:
    """A refusal names what is live, is counted under it, and takes no time."""
    bench = Bench(tmp_path)
    async with bench.running():
        await bench.ask()
        assert (await bench.ask(headers={"x-vcot-expect": "sha256:0"})).headers["x-vcot-checkpoint"] == "base"
        figures = await scrape(bench)
        assert figures["vcot_requests_total", "base", CHAT, "409"] == 1
        assert figures["vcot_request_seconds_count", "base"] == figures["vcot_first_byte_seconds_count", "base"] == 1


async def test_what_is_true_now_is_read_when_asked(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_in_flight=1, max_queued=1)
    async with bench.running():
        bench.server.hold.clear()
        asked = [asyncio.create_task(bench.ask("hold on")) for _ in range(2)]
        await bench.server.holding.wait()
        figures = await scrape(bench)
        assert (figures["vcot_in_flight",], figures["vcot_queued",]) == (1, 1)
        assert (await bench.ask()).status_code == 429
        bench.server.hold.set()
        await asyncio.gather(*asked)
        assert (await scrape(bench))["vcot_refused_total", "overloaded"] == 1


async def test_swaps_and_restarts_are_counted(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with bench.running():

        async def swap(name: str) -> None:
            await bench.http.post("/admin/swap", json={"alias": "policy", "checkpoint": name})

        await swap("tuned")
        await swap("tuned")
        bench.server.fail_next_reload = True
        await swap("base")
        await swap("nobody")
        bench.server.died.set()
        await bench.until("dead")
        assert not [key for key in await scrape(bench) if key[0] == "vcot_checkpoint_info"]
        await bench.until("live")
        figures = await scrape(bench)
        outcomes = {key[1]: value for key, value in figures.items() if key[0] == "vcot_swaps_total"}
        assert outcomes == {"swapped": 1, "unchanged": 1, "SwapError": 1, "CheckpointError": 1}
        assert figures["vcot_swap_pause_seconds_count",] == 1
        assert 0 < figures["vcot_swap_pause_seconds_sum",] < 10
        assert figures["vcot_engine_restarts_total", "vllm-0"] == 1
        assert figures["vcot_checkpoint_info", bench.tuned.ref.digest, "tuned"] == 1


async def test_metrics_are_for_bearers_of_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path)
    async with bench.client("192.0.2.7") as stranger:
        assert (await stranger.get("/metrics")).status_code == 403
        monkeypatch.setenv("VCOT_API_KEYS", "k")
        assert (await stranger.get("/metrics", headers={"authorization": "Bearer k"})).status_code == 200


async def test_probes_of_a_gateway_that_loads_are_said_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for _ in range(3):
        assert (await bench.http.get("/health")).status_code == 503
    assert [line["status"] for line in lines(bench)] == [503]
    async with bench.running():
        for _ in range(3):
            assert (await bench.http.get("/health")).status_code == 200
        assert len(lines(bench)) == 1
        bench.replica.gate.move("dead", "it died")
        assert (await bench.http.get("/health")).status_code == 503
        assert len(lines(bench)) == 2, "it fails again, which is news"


async def test_each_request_is_one_line_without_its_text_or_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VCOT_API_KEYS", "sk-secret")
    bench = Bench(tmp_path)
    async with bench.running():
        headers = {"authorization": "Bearer sk-secret", "x-request-id": "mine-1"}
        answer = await bench.ask("a private question", headers=headers)
        await bench.ask("a private question", headers={"authorization": "Bearer sk-wrong"})
        assert (await bench.http.get("/health")).status_code == 200
    first, second = lines(bench)
    assert answer.headers["x-request-id"] == first["id"] == "mine-1"
    assert (first["route"], first["model"], first["checkpoint"], first["status"]) == (CHAT, "policy", "base", 200)
    assert first["bytes_in"] > 50
    assert first["bytes_out"] == len(answer.content)
    assert 0 <= first["wait_ms"] <= first["first_byte_ms"] <= first["total_ms"]
    assert (first["is_whole"], first["refused"], first["replica"]) == (True, None, "vllm-0")
    assert (second["status"], second["refused"], second["model"], second["wait_ms"]) == (
        401,
        "invalid_api_key",
        None,
        None,
    )
    text = b"".join(bench.log).decode()
    assert "private" not in text
    assert "sk-" not in text
    assert "yes" not in text


async def test_a_client_that_hangs_up_is_logged_so(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with bench.running():
        bench.server.hold.clear()
        body = json.dumps({"model": "base", "messages": [{"role": "user", "content": "hold on"}]}).encode()
        client = Client({"type": "http.request", "body": body}, content_type="application/json")
        scope = client.scope | {"method": "POST", "path": CHAT, "query_string": b""}
        request = asyncio.create_task(bench.app(scope, client.receive, client.send))
        await bench.server.holding.wait()
        client.gone.set()
        await request
    (line,) = lines(bench)
    assert (line["status"], line["is_whole"], line["bytes_in"]) == (499, False, len(body))


async def test_the_line_names_the_replica_that_answered(tmp_path: Path) -> None:
    bench = Bench(tmp_path, replicas=2)
    async with bench.running():
        bench.server_of(0).faults = ["500"]
        await bench.ask()
    (line,) = lines(bench)
    assert (line["status"], line["replica"]) == (200, "vllm-1")


def test_a_log_that_cannot_be_written_costs_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full").open("w")  # noqa: SIM115 - what it still holds cannot be closed away either
    monkeypatch.setattr(sys, "stderr", full)
    for _ in range(10_000):
        write_to_stderr(b"{}\n")
    with pytest.raises(OSError, match="space"):
        full.close()


def test_lines_go_out_one_by_one(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    write_to_stderr(b"{}\n")
    assert capfdbinary.readouterr().err == b"{}\n"


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "é", 'a"b', "a\n"])
def test_an_id_that_cannot_stand_in_a_header_is_replaced(given: str | None) -> None:
    made = choose_request_id(given)
    assert made != given
    assert len(made) == 32
    assert made != choose_request_id(given)


async def test_the_engine_gets_the_requests_id(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with bench.running():
        answer = await bench.ask()
        assert bench.server.request_ids == [answer.headers["x-request-id"]]
