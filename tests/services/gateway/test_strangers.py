"""A wait for a server goes on while nothing is there, and ends at once where something else answers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from vcot.pipeline.errors import ServerError, UnreachableError
from vcot.services.gateway.admin import fetch_state, list_checkpoints
from vcot.services.gateway.fleet.remote import RemoteServer

PATIENCE_S = 30.0
"""Longer than any of these tests may take."""
STRANGERS = {
    "a web page": (200, "<html>hello", "text/html"),
    "a web page that is not there": (404, "<html>no", "text/html"),
    "another API": (200, '{"status": "ok"}', "application/json"),
    "another API's error": (404, '{"detail": "Not Found"}', "application/json"),
    "a guarded one": (401, "who are you?", "text/plain"),
    "one that lives elsewhere": (302, "", "text/plain"),
    "one that is broken": (500, "oh", "text/plain"),
}


@asynccontextmanager
async def answering(*answers: tuple[int, str, str]) -> AsyncIterator[tuple[str, list[str]]]:
    """A server that gives these answers in turn, the last one for ever; its URL, and the paths that it was asked for."""
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        status, text, kind = answers[min(len(asked), len(answers) - 1)]
        asked.append(request.path)
        return web.Response(status=status, text=text, content_type=kind)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", asked
    finally:
        await runner.cleanup()


@asynccontextmanager
async def greeting(banner: bytes) -> AsyncIterator[str]:
    """A server that says `banner` to whoever connects."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(banner)
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def refusal_of(call: Awaitable[object]) -> str:
    with pytest.raises(ServerError) as caught:
        async with asyncio.timeout(PATIENCE_S / 3):
            await call
    assert not isinstance(caught.value, UnreachableError)
    return str(caught.value)


def wait_for_vllm(url: str) -> Awaitable[object]:
    return RemoteServer(url, PATIENCE_S).start(lambda _: None)


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("wait", [wait_for_vllm, fetch_state, list_checkpoints])
async def test_a_stranger_is_named_at_once_with_what_it_said(
    stranger: str, wait: Callable[[str], Awaitable[object]]
) -> None:
    status, text, _ = STRANGERS[stranger]
    async with answering(STRANGERS[stranger]) as (url, asked):
        message = await refusal_of(wait(url))
    assert f"{url}{asked[0]} answered {status} {text!r}" in message
    assert "serve.upstreams" in message or "serve.url" in message, "the remedy"
    assert len(asked) == 1


@pytest.mark.parametrize("wait", [wait_for_vllm, fetch_state])
async def test_what_speaks_no_http_is_named_at_once(wait: Callable[[str], Awaitable[object]]) -> None:
    async with greeting(b"220 mail.example.org ESMTP\r\n\r\n") as url:
        message = await refusal_of(wait(url))
    assert url in message
    assert "220 mail" in message


@pytest.mark.parametrize("url", ["http://localhost:x", "localhost:8100", "ftp://localhost"])
async def test_what_is_no_address_is_no_gateway_that_starts(url: str) -> None:
    assert "is not the address of a gateway" in await refusal_of(fetch_state(url))


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_a_proxy_in_front_of_a_server_that_starts_is_waited_for(status: int) -> None:
    not_yet = (status, "<html>nobody there", "text/html")
    async with answering(not_yet, not_yet, (200, "", "text/plain")) as (url, asked):
        await wait_for_vllm(url)
        assert len(asked) == 3
    async with answering(not_yet) as (url, _):
        with pytest.raises(UnreachableError, match="no gateway answers behind"):
            await fetch_state(url)


async def test_who_hangs_up_or_is_not_there_may_come_yet() -> None:
    async with greeting(b"") as url:
        with pytest.raises(UnreachableError):
            await fetch_state(url)
        waiting = asyncio.ensure_future(wait_for_vllm(url))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        waiting.cancel()
    with pytest.raises(UnreachableError, match="is it running"):
        await fetch_state(url)
    with pytest.raises(ServerError, match=r"did not answer within serve\.start_timeout_s"):
        await RemoteServer(url, 0.2).start(lambda _: None)
