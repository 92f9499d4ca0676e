"""What a client that knows OpenAI's API only meets at the gateway: its own SDK, and the routes and methods it may try."""

from collections.abc import AsyncIterator

import httpx2
import openai
import pytest

from tests.services.bench_fleet import Bench


@pytest.fixture
async def client(bench: Bench) -> AsyncIterator[openai.AsyncOpenAI]:
    transport = httpx2.ASGITransport(bench.app, client=("127.0.0.1", 1))
    http = httpx2.AsyncClient(transport=transport)
    async with openai.AsyncOpenAI(
        base_url="http://127.0.0.1:8100/v1", api_key="none", http_client=http, max_retries=0
    ) as made:
        yield made


@pytest.fixture
def stamp(bench: Bench) -> str:
    return f"base@{bench.base.ref.digest[7:19]}"


async def ask(client: openai.AsyncOpenAI, model: str) -> str:
    return (await client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hello"}])).model


async def test_a_model_is_found_and_asked_by_alias_name_and_stamp(client: openai.AsyncOpenAI, stamp: str) -> None:
    assert {model.id for model in (await client.models.list()).data} == {"policy", "base"}
    for name in ("policy", "base"):
        assert (await client.models.retrieve(name)).id == name
        assert await ask(client, name) == stamp
    assert (await client.models.retrieve(stamp)).model_extra["root"] == stamp
    assert await ask(client, stamp) == await ask(client, stamp.replace("base", "policy")) == stamp


async def test_a_stamp_of_other_weights_is_not_answered_by_these(
    bench: Bench, client: openai.AsyncOpenAI, stamp: str
) -> None:
    """A client that names what answered it before is told when that is gone."""
    await bench.swap("policy", "tuned")
    with pytest.raises(openai.NotFoundError, match="no checkpoint or alias"):
        await ask(client, stamp.replace("base", "policy"))
    for name in (stamp[:-1], f"{stamp}0", "base@", bench.base.ref.digest):
        with pytest.raises(openai.NotFoundError, match="no checkpoint or alias"):
            await ask(client, name)


@pytest.mark.parametrize("name", ["nope", "tuned", "a b", "%2e%2e", "ü", "a/b"])
async def test_an_unknown_model_is_the_sdks_not_found(client: openai.AsyncOpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError, match=r"is not served (now|here)"):
        await client.models.retrieve(name)


async def test_what_the_gateway_does_not_serve_says_why_and_what_it_serves(client: openai.AsyncOpenAI) -> None:
    said = "is not served here: the gateway passes on only what .* POST /v1/chat/completions and POST /v1/completions"
    with pytest.raises(openai.NotFoundError, match=f"/v1/responses {said}"):
        await client.responses.create(model="policy", input="hello")
    with pytest.raises(openai.NotFoundError, match=f"/v1/embeddings {said}"):
        await client.embeddings.create(model="policy", input="hello")
    with pytest.raises(openai.APIStatusError, match="DELETE /v1/models/policy is not served here"):
        await client.models.delete("policy")


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions/batch", "/v1/messages", "/tokenize", "/collective_rpc", "/docs", "/"]
)
async def test_vllms_other_routes_stay_out_of_reach_with_a_sentence(bench: Bench, path: str) -> None:
    answer = await bench.http.post(path, json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert "is not served here: the gateway" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/policy", "/health", "/v1/chat/completions", "/v1/completions"]
)
async def test_another_method_is_told_which_is_allowed(bench: Bench, path: str) -> None:
    allowed = {"POST"} if "completions" in path else {"GET", "HEAD"}
    for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"):
        answer = await bench.http.request(method, path)
        if method in allowed:
            assert answer.status_code == 200
            continue
        assert (answer.status_code, set(answer.headers["allow"].split(", "))) == (405, allowed)
        assert method == "HEAD" or answer.json()["error"]["code"] == "method_not_allowed"
