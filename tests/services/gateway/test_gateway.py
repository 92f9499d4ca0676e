import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest

from tests.services.bench_fleet import ASK, Bench
from tests.services.fake_vllm import make_canary, write_checkpoint
from vcot.pipeline.errors import CheckpointError, SwapError
from vcot.pipeline.records import CheckpointRef
from vcot.services.gateway.admin import named_error
from vcot.services.gateway.fleet.ends import EngineFault
from vcot.services.gateway.http.proxy import _Call

pytestmark = pytest.mark.usefixtures("split_too")


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_every_answer_is_stamped(bench: Bench) -> None:
    answer = await bench.ask(n=8)
    assert answer.status_code == 200
    assert answer.headers["x-vcot-checkpoint"] == "base"
    assert answer.headers["x-vcot-digest"] == bench.base.ref.digest
    assert answer.json()["model"] == f"base@{bench.base.ref.digest[7:19]}"
    assert len(answer.json()["choices"]) == 8


async def test_every_event_of_a_stream_is_stamped(bench: Bench) -> None:
    answer = await bench.ask(stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-vcot-digest"] == bench.base.ref.digest
    *chunks, end = events(answer)
    assert end == "[DONE]"
    assert len(chunks) == 3
    assert {chunk["model"] for chunk in chunks} == {f"base@{bench.base.ref.digest[7:19]}"}
    assert chunks[0]["choices"][0]["delta"]["content"].startswith("é")
    assert answer.text.endswith("data: [DONE]\n\n")


async def test_the_stamp_follows_a_swap(bench: Bench) -> None:
    swap = await bench.http.post("/admin/swap", json={"alias": "policy", "checkpoint": "tuned"})
    assert swap.status_code == 200
    assert swap.json()["live"]["name"] == "tuned"
    assert swap.json()["pause_s"] > 0
    answer = await bench.ask()
    assert answer.headers["x-vcot-digest"] == bench.tuned.ref.digest
    content = answer.json()["choices"][0]["logprobs"]["content"]
    assert {token["logprob"] for token in content} == set(make_canary(2.0).logprobs)


async def test_a_request_during_a_swap_waits_and_is_answered_by_the_new_weights(bench: Bench) -> None:
    bench.server.hold.clear()
    first = asyncio.create_task(bench.ask("hold on"))
    await bench.server.holding.wait()
    swap = asyncio.create_task(bench.http.post("/admin/swap", json={"alias": "policy", "checkpoint": "tuned"}))
    await bench.until("draining")
    second = asyncio.create_task(bench.ask("hello"))
    await asyncio.sleep(0)
    assert (await bench.http.get("/health")).status_code == 200
    bench.server.hold.set()
    assert (await swap).status_code == 200
    for answer, name in ((await first, "base"), (await second, "tuned")):
        assert answer.status_code == 200
        assert answer.headers["x-vcot-checkpoint"] == name


async def test_a_swap_that_takes_too_long_turns_waiting_requests_away(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_wait_s=0.02)
    async with bench.running():
        bench.server.hold.clear()
        first = asyncio.create_task(bench.ask("hold on"))
        await bench.server.holding.wait()
        swap = asyncio.create_task(bench.swap("policy", "tuned"))
        await bench.until("draining")
        late = await bench.ask()
        assert late.status_code == 503
        assert int(late.headers["retry-after"]) > 0
        bench.server.hold.set()
        assert (await first).status_code == 200
        await swap


async def test_expected_weights_are_checked_before_any_work(bench: Bench) -> None:
    assert (await bench.ask(headers={"x-vcot-expect": bench.base.ref.digest})).status_code == 200
    known = len(bench.server.prefixes)
    refused = await bench.ask("new", headers={"x-vcot-expect": bench.tuned.ref.digest})
    assert refused.status_code == 409
    assert refused.headers["x-vcot-digest"] == bench.base.ref.digest
    assert "were expected" in refused.json()["error"]["message"]
    assert len(bench.server.prefixes) == known


@pytest.mark.parametrize("is_live_first", [True, False])
async def test_two_expectations_that_contradict_each_other_are_not_met(bench: Bench, *, is_live_first: bool) -> None:
    live, other = ("x-vcot-expect", bench.base.ref.digest), ("x-vcot-expect", bench.tuned.ref.digest)
    assert (await bench.http.post("/v1/chat/completions", json=ASK, headers=[live, live])).status_code == 200
    headers = [live, other] if is_live_first else [other, live]
    assert (await bench.http.post("/v1/chat/completions", json=ASK, headers=headers)).status_code == 409


async def test_a_checkpoint_that_is_not_live_is_refused_with_the_remedy(bench: Bench) -> None:
    refused = await bench.ask(model="tuned")
    assert refused.status_code == 409
    assert "base is live; make it so with `vcot swap policy tuned`" in refused.json()["error"]["message"]


async def test_who_waited_for_a_swap_that_changed_nothing_is_answered(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifying, go = threading.Event(), threading.Event()

    def verify(name: str) -> NoReturn:
        verifying.set()
        go.wait(5)
        raise CheckpointError(f"{name} was altered")

    monkeypatch.setattr(bench.registry, "verify", verify)
    swap = asyncio.create_task(bench.swap("policy", "tuned"))
    await asyncio.to_thread(verifying.wait, 5)
    waiting = asyncio.create_task(bench.ask(model="tuned"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    go.set()
    with pytest.raises(CheckpointError, match="was altered"):
        await swap
    assert (await asyncio.wait_for(waiting, 2)).status_code == 409


async def test_an_alias_of_another_checkpoint_is_refused(bench: Bench) -> None:
    await bench.swap("policy", "tuned")
    assert (await bench.ask(model="policy")).status_code == 200
    refused = await bench.ask(model="base")
    assert refused.status_code == 409


async def test_an_unknown_model_names_the_nearest(bench: Bench) -> None:
    answer = await bench.ask(model="polisy")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert answer.json()["error"]["message"] == "no checkpoint or alias 'polisy'; did you mean policy?"  # and no path


NO_REQUESTS = [b"", b"{", b"[]", b'{"messages": []}', b'{"model": 3}']
NOT_PASSED_ON = [b'{"model": "base", "temperature": NaN}', b'{"model": "base", "seed": 18446744073709551616}']


@pytest.mark.parametrize("body", [*NO_REQUESTS, *NOT_PASSED_ON])
async def test_what_is_no_request_is_refused(bench: Bench, body: bytes) -> None:
    answer = await bench.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_the_engines_errors_pass_with_their_status(bench: Bench) -> None:
    answer = await bench.ask("fail")
    assert answer.status_code == 400
    assert answer.json() == {"error": {"message": "no"}}
    assert answer.headers["x-vcot-checkpoint"] == "base"


async def test_an_engine_that_is_lost_is_said(bench: Bench) -> None:
    bench.server.hold.clear()
    asked = asyncio.create_task(bench.ask("hold on"))
    await bench.server.holding.wait()
    bench.server.died.set()
    answer = await asked
    assert answer.status_code == 502
    assert "retry-after" in answer.headers
    await bench.until("live")
    assert (await bench.ask()).status_code == 200
    await bench.until_so(lambda: bench.admission.in_flight == 0)


async def test_an_engine_that_is_lost_in_a_stream_ends_it_with_an_error(bench: Bench) -> None:
    *_, last = events(await bench.ask("die", stream=True))
    assert last["error"]["type"] == "engine_lost"


async def test_a_client_that_hangs_up_cancels_its_request(bench: Bench) -> None:
    bench.server.hold.clear()
    gone = asyncio.Event()
    body = json.dumps(ASK | {"messages": [{"role": "user", "content": "hold on"}]}).encode()
    messages = iter(
        [{"type": "http.request", "body": body[:9], "more_body": True}, {"type": "http.request", "body": body[9:]}]
    )

    async def receive() -> Any:
        if (message := next(messages, None)) is not None:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        raise AssertionError("nobody is there")

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": [(b"content-type", b"application/json")],
        "query_string": b"",
    }
    request = asyncio.create_task(bench.app(scope, receive, send))
    await bench.server.holding.wait()
    assert bench.admission.in_flight == 1
    gone.set()
    await request
    await bench.until_so(lambda: bench.admission.in_flight == 0)
    await asyncio.wait_for(bench.server.cancelled.wait(), 10)


async def test_health_and_state_while_loading(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    health = await bench.http.get("/health")
    assert health.status_code == 503
    assert health.json() == {"status": "loading", "message": "starting"}
    answer = await bench.ask()
    assert answer.status_code == 503
    assert "loading" in answer.json()["error"]["message"]
    state = (await bench.http.get("/admin/state")).json()
    assert state["live"] is None
    assert (await bench.http.get("/v1/models")).json()["data"] == []
    await bench.http.aclose()


async def test_models_are_those_that_can_be_asked_now(bench: Bench) -> None:
    listed = (await bench.http.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["base", "policy"]
    await bench.swap("policy", "tuned")
    listed = (await bench.http.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["policy", "tuned"]
    assert {model["root"] for model in listed["data"]} == {f"tuned@{bench.tuned.ref.digest[7:19]}"}


async def test_registering_over_http(bench: Bench, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "third", "third", 3.0)
    added = await bench.http.post("/admin/checkpoints", json={"path": str(directory)})
    assert (added.status_code, added.json()["name"]) == (201, "third")
    listed = (await bench.http.get("/admin/checkpoints")).json()["checkpoints"]
    assert [entry["checkpoint"]["name"] for entry in listed] == ["base", "tuned", "third"]
    missing = await bench.http.post("/admin/checkpoints", json={"path": str(tmp_path / "none")})
    error = missing.json()["error"]
    assert missing.status_code == 404
    assert isinstance(named_error(error["code"], error["message"]), CheckpointError)


async def test_showing_and_retiring_over_http(bench: Bench) -> None:
    shown = (await bench.http.get("/admin/checkpoints/tuned")).json()
    assert (shown["checkpoint"]["digest"], shown["is_live"]) == (bench.tuned.ref.digest, False)
    assert (await bench.http.delete("/admin/checkpoints/tuned")).json()["name"] == "tuned"
    assert (await bench.http.get("/admin/checkpoints/tuned")).status_code == 404
    refused = await bench.http.delete("/admin/checkpoints/base")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "CheckpointError")
    assert (await bench.ask(model="tuned")).status_code == 404
    assert (await bench.ask()).status_code == 200


async def test_a_swap_to_what_is_retired_meanwhile_is_rolled_back(bench: Bench) -> None:
    bench.server.hold.clear()
    first = asyncio.create_task(bench.ask("hold on"))
    await bench.server.holding.wait()
    swap = asyncio.create_task(bench.swap("policy", "tuned"))
    await bench.until("draining")
    bench.registry.retire("tuned")
    bench.server.hold.set()
    with pytest.raises(SwapError, match=r"retired.*base is live as before"):
        await swap
    assert (await first).status_code == (await bench.ask()).status_code == 200


async def test_a_failed_swap_over_http_says_which_error_it_is(bench: Bench) -> None:
    bench.server.fail_next_reload = True
    answer = await bench.http.post("/admin/swap", json={"alias": "policy", "checkpoint": "tuned"})
    error = answer.json()["error"]
    assert answer.status_code == 409
    assert isinstance(named_error(error["code"], error["message"]), SwapError)
    wrong = await bench.http.post("/admin/swap", json={"alias": "policy"})
    assert wrong.status_code == 422
    assert "checkpoint" in wrong.json()["error"]["message"]


async def test_admin_is_for_this_machine_or_for_who_has_the_key(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench.client("192.0.2.7") as stranger:
        refused = await stranger.get("/admin/state")
        assert refused.status_code == 403
        monkeypatch.setenv("VCOT_ADMIN_KEY", "secret")
        assert (await bench.http.get("/admin/state")).status_code == 401
        assert (await stranger.get("/admin/state", headers={"authorization": "Bearer secreT"})).status_code == 401
        assert (await stranger.get("/admin/state", headers={"authorization": "Bearer secret"})).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/v1/nope", 404, "not_found"),
        ("POST", "/v1/responses", 404, "not_found"),
        ("PUT", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/nope", 404, "model_not_found"),
    ],
)
async def test_what_is_not_served_is_said_in_openais_shape(
    bench: Bench, method: str, path: str, status: int, code: str
) -> None:
    answer = await bench.http.request(method, path, json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def test_one_model_is_shown_as_in_the_list(bench: Bench) -> None:
    (listed,) = [card for card in (await bench.http.get("/v1/models")).json()["data"] if card["id"] == "policy"]
    shown = (await bench.http.get("/v1/models/policy")).json()
    assert shown | {"created": 0} == listed | {"created": 0}


@pytest.mark.parametrize("path", ["\0", "a" * 300, "/etc/passwd"])
@pytest.mark.parametrize("route", ["checkpoints", "trial"])
async def test_a_path_that_is_none_is_a_sentence(bench: Bench, route: str, path: str) -> None:
    answer = await bench.http.post(f"/admin/{route}", json={"path": path})
    assert answer.status_code in (404, 422)
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "url",
    ["http://vllm:80O0", "http://a b", "http://vllm:99999", "http://vllm:0", "ftp://vllm", "http://", "http://a/b"],
)
async def test_an_address_that_is_none_is_refused_before_it_is_kept(bench: Bench, url: str) -> None:
    """Else it is in the roster, and the gateway ends at every start."""
    answer = await bench.http.post("/admin/replicas", json={"url": url})
    assert (answer.status_code, "no server's address" in answer.json()["error"]["message"]) == (422, True)
    assert len((await bench.http.get("/admin/replicas")).json()["replicas"]) == 1


ROLE = b'data: {"model": "vcot", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}\n\n'
WORD = b'data: {"model": "vcot", "choices": [{"index": 0, "delta": {"content": "x"}}]}\n\n'
FAULT = b'data: {"error": {"message": "Internal server error", "code": 500}}\n\n'
END = b"data: [DONE]\n\n"


async def relayed(*parts: bytes) -> list[dict[str, Any]]:
    """What a client gets of an engine's stream."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def stream() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    ref, scope = CheckpointRef(name="base", digest="sha256:1", kind="base"), dict[str, Any]()
    await _Call(scope, {}, ref, send)._pass_events(stream())
    return sent


async def test_a_stream_that_fails_behind_its_roles_can_be_asked_for_again() -> None:
    """vLLM says each choice's role first, and then that it lost the image."""
    with pytest.raises(EngineFault) as caught:
        await relayed(ROLE, ROLE, FAULT, END)
    assert not caught.value.has_begun
    for parts in ((ROLE, ROLE, WORD, END), (ROLE, END), (WORD, END)):
        start, *bodies = await relayed(*parts)
        assert start["status"] == 200
        text = b"".join(body["body"] for body in bodies)
        assert text.count(b"base@") == len(parts) - 1
        assert text.endswith(b"data: [DONE]\n\n")
