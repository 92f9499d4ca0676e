"""The figures of `make bench-scaling`: what counts, what is full first, and a simulated replica."""

import asyncio
import time

import pytest

from bench.gateway import free_port
from bench.scaling import simulate, steady_rate, summarise


def test_neither_the_beginning_nor_the_end_counts():
    came = [(0.0, 0), (10.0, 39), (11.0, 40), (12.0, 65), (13.0, 90), (20.0, 100)]
    assert steady_rate(came) == 25


def test_the_process_with_the_least_room_is_named():
    turns = {1: {"per_s": 50.0, "client": 1.0, "gateway": 1.0}, 4: {"per_s": 160.0, "client": 0.001, "gateway": 0.0005}}
    found = summarise(turns, replica_per_s=50.0, latency_s=1.28, num_workers=1)
    assert found["saturates"] == "client"
    assert found["most_responses_per_s"] == {"client": 1000, "gateway": 2000}
    assert found["most_replicas"] == {"client": 20.0, "gateway": 40.0}
    assert found["efficiency"] == {1: 1.0, 4: 0.8}


async def test_a_request_beyond_the_seats_waits_for_one():
    port = free_port()
    simulated = asyncio.create_task(simulate(0.3, [port]))
    request = b"POST /v1/chat/completions HTTP/1.1\r\nhost: here\r\ncontent-length: 2\r\n\r\n{}"

    async def ask() -> float:
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0.01)
        began = time.monotonic()
        writer.write(request)
        assert (await reader.read(65_536)).count(b'"index"') == 8
        writer.close()
        await writer.wait_closed()
        return time.monotonic() - began

    took = sorted(await asyncio.gather(*(ask() for _ in range(9))))
    simulated.cancel()
    await asyncio.gather(simulated, return_exceptions=True)
    assert took[7] == pytest.approx(0.3, abs=0.2)
    assert took[8] > 0.55
