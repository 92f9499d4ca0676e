"""The fake server ends as a process does: nobody stays connected to it."""

import asyncio
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from tests.services.fake_vllm import FakeVllm


@pytest.mark.parametrize("num_turns", range(5))
@pytest.mark.parametrize("is_local", [True, False])
async def test_who_connects_as_it_stops_is_hung_up_on(tmp_path: Path, num_turns: int, *, is_local: bool) -> None:
    """asyncio alone leaves a client waiting that was accepted one turn of the loop before the listener closes."""
    server = FakeVllm(None)
    url = await server.listen(tmp_path / "s" if is_local else None)
    with socket.socket(socket.AF_UNIX if is_local else socket.AF_INET) as client:
        client.connect(str(tmp_path / "s") if is_local else ("127.0.0.1", int(url.rpartition(":")[2])))
        client.setblocking(False)
        for _ in range(num_turns):
            await asyncio.sleep(0)
        await server.stop()
        with suppress(ConnectionResetError):
            assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 1), 10) == b""
