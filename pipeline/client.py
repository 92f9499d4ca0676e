"""The client of an OpenAI-compatible API, with the checks that make an answer a record.

Address, keys and headers are the openai SDK's; requests go out on its HTTP client as they are, over aiohttp, since the
SDK's own models of a request and its answer take five times the processor time of all else (docs/sampling.md).
`vcot.pipeline.concurrency.with_retry` is the one retry layer. An answer is refused unless it holds exactly the choices that
were asked for, each finished, and is stamped with the weights that were asked for. What a fault means is decided in
pipeline/faults.py.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import orjson

from vcot.pipeline.errors import BadAnswer, RequestError, Scope, WrongCheckpoint
from vcot.pipeline.faults import explain_status, explain_text, quote
from vcot.pipeline.hosts import is_this_machine
from vcot.pipeline.images import media_type
from vcot.pipeline.pacing import Gate
from vcot.pipeline.records import ImageRef, SamplingParams, Usage

if TYPE_CHECKING:
    import httpx2

DIGEST_HEADER = "x-vcot-digest"
EXPECT_HEADER = "x-vcot-expect"
_TIMEOUT_S = 600.0
MAX_REFUSED_S = 15.0
"""So long nothing may listen at an address, as while a gateway is started anew."""
_MAX_TOKENS = 10**9
_OPENAI_URL = "https://api.openai.com/v1"
Body = dict[str, Any]
"""Of a request, or of an answer, as its JSON has it."""


@dataclass(frozen=True)
class Step:
    """A position of a response: the token that stands there, and the log-probs of the likeliest ones, as texts."""

    token: str
    top: Mapping[str, float]


@dataclass(frozen=True)
class Choice:
    """One response of a completion."""

    text: str
    finish_reason: str
    steps: tuple[Step, ...] = ()
    """Its positions, where log-probs were asked for."""


@dataclass(frozen=True)
class Completion:
    """The answer to one request: `n` choices in order."""

    choices: tuple[Choice, ...]
    usage: Usage
    latency_s: float


@dataclass(frozen=True)
class Scored:
    """How likely the server finds each token of a conversation, given what stands before it."""

    tokens: tuple[int, ...]
    """Token ids, image tokens expanded."""
    logprobs: tuple[float, ...]
    """Of `tokens[1:]`."""


def user_message(text: str, shown: Sequence[tuple[ImageRef, bytes]] = (), **image_options: str) -> dict[str, Any]:
    """A user turn: the images first, as data URLs, then the text."""
    content: list[dict[str, Any]] = []
    for image, data in shown:
        url = f"data:{media_type(image)};base64,{base64.b64encode(data).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url, **image_options}})
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def find_proxy(url: str) -> str | None:
    """The environment's variable whose proxy a request to `url` goes through; None for what is asked directly."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_this_machine(host) or proxy_bypass(host):
        return None
    return next((f"{kind.upper()}_PROXY" for kind in (parts.scheme, "all") if getproxies().get(kind)), None)


class ChatClient:
    """Chat completions from one API. An async context manager; share one between all requests of a stage."""

    def __init__(
        self,
        base_url: str | None,
        api_key: str,
        *,
        max_connections: int,
        gate: Gate | None = None,
        is_own: bool = False,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """`base_url` ends in /v1; None is OpenAI's own. `gate` keeps to the API's limits.

        What `is_own` (the run's gateway), or is on this machine, is asked directly, whatever proxy the environment names:
        keys and images are none of its business. `transport` replaces the network in tests.
        """
        import httpx2  # with openai, a third of a second that `--help` need not pay
        import openai

        limits = httpx2.Limits(max_connections=max_connections, max_keepalive_connections=max_connections)
        timeout = httpx2.Timeout(_TIMEOUT_S, connect=10.0)
        self._proxy = None if is_own else find_proxy(base_url or _OPENAI_URL)
        self._http = (
            openai.DefaultAioHttpClient(limits=limits, timeout=timeout, trust_env=self._proxy is not None)
            if transport is None
            else httpx2.AsyncClient(transport=transport, timeout=timeout)
        )
        self._openai = openai.AsyncOpenAI(
            base_url=base_url, api_key=api_key, max_retries=0, timeout=timeout, http_client=self._http
        )
        headers = {**self._openai.default_headers, **self._openai.auth_headers}
        self._headers = {name: value for name, value in headers.items() if isinstance(value, str)}
        self._gate = gate
        self._unsupported: set[str] = set()
        """Fields that the server said it does not take."""
        self._refused_since: float | None = None
        """Since when nothing listens at the address, as all requests together have found."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._openai.close()

    async def complete(
        self,
        model: str,
        messages: Sequence[dict[str, Any]],
        params: SamplingParams,
        *,
        expect: str | None = None,
        response_format: dict[str, Any] | None = None,
        top_logprobs: int = 0,
        extra_body: Mapping[str, Any] | None = None,
    ) -> Completion:
        """`params.n` responses. `expect` is the weights digest that the answer must be stamped with.

        With `top_logprobs`, each choice tells that many of the likeliest tokens at each position. `extra_body` holds
        fields beyond OpenAI's, and wins over `params`. Raises RequestError: WrongCheckpoint for another stamp (or none),
        BadAnswer for an incomplete answer.
        """
        started = time.monotonic()
        request = {"model": model, "messages": messages, **params.model_dump(), **(extra_body or {})}
        if response_format is not None:
            request["response_format"] = response_format
        if top_logprobs:
            request |= {"logprobs": True, "top_logprobs": top_logprobs}
        return _check(await self._create(request, expect), params.n, time.monotonic() - started)

    async def score(
        self, model: str, messages: Sequence[dict[str, Any]], *, expect: str, has_end: bool = True
    ) -> Scored:
        """How likely `model` finds `messages`, the last of them the assistant's (vLLM only).

        Without `has_end`, the conversation breaks off with the last message's text: what the template puts behind it is
        not there. `expect` is as in `complete`. Raises RequestError as `complete` does.
        """
        extra = {"prompt_logprobs": 0, "add_generation_prompt": False, "continue_final_message": not has_end}
        found = await self._read_tokens(model, messages, expect, extra)
        try:
            tokens, steps = found["prompt_token_ids"], found["prompt_logprobs"]
            logprobs = tuple(float(step[str(t)]["logprob"]) for t, step in zip(tokens[1:], steps[1:], strict=True))
        except (KeyError, TypeError, ValueError):
            raise self._no_logprobs() from None
        return Scored(tuple(tokens), logprobs)

    async def read_prompt(self, model: str, messages: Sequence[dict[str, Any]], *, expect: str) -> tuple[int, ...]:
        """The tokens that a response to `messages` follows, image tokens expanded (vLLM only). Raises as `score` does."""
        found = await self._read_tokens(model, messages, expect, {})
        try:
            return tuple(int(token) for token in found["prompt_token_ids"])
        except (KeyError, TypeError, ValueError):
            raise self._no_logprobs() from None

    async def _read_tokens(
        self, model: str, messages: Sequence[dict[str, Any]], expect: str, extra: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What vLLM tells of the tokens of a prompt, beside the one token that must be asked for."""
        request = {"model": model, "messages": messages, "max_tokens": 1, "temperature": 0.0}
        return await self._create(request | {"return_token_ids": True, **extra}, expect)

    def _no_logprobs(self) -> BadAnswer:
        message = f"{self._openai.base_url} gives no log-prob for each token of a prompt; only vLLM's are compared"
        return BadAnswer(message, scope="account", reason="parameter")

    async def _create(self, request: dict[str, Any], expect: str | None) -> Body:
        """The answer, with `expect`'s stamp. Raises RequestError.

        A judge's model that refuses `max_tokens` or a temperature is asked the same again in its own way, from then on
        always; what is stamped with weights is asked as it is, or not at all.
        """
        told: set[str] = set()
        while True:
            try:
                return await self._send(request, expect)
            except RequestError as error:
                if expect is not None or error.param is None or error.param in told:
                    raise
                told.add(error.param)
                self._unsupported.add(error.param)

    async def _send(self, request: dict[str, Any], expect: str | None) -> Body:
        """One request, at the gate's pace."""
        async with self._gate.passing(float(request["max_tokens"])) if self._gate else nullcontext() as ticket:
            answer = await self._exchange(fit_request(request, self._unsupported), expect)
            if self._gate and ticket:
                num_tokens = _count(answer.completion or {}, "total_tokens")
                self._gate.note(ticket, answer.headers, num_tokens, answer.fault)
        if answer.completion is None:
            raise answer.fault or AssertionError("an answer is a completion or a fault")
        return answer.completion

    async def _exchange(self, request: dict[str, Any], expect: str | None) -> _Answer:
        import aiohttp
        import httpx2

        where = str(self._openai.base_url)
        headers = self._headers | ({EXPECT_HEADER: expect} if expect else {})
        try:
            response = await self._http.post(f"{where}chat/completions", content=orjson.dumps(request), headers=headers)
        except (httpx2.HTTPError, aiohttp.ClientError, OSError) as error:
            return _Answer({}, fault=self._explain_silence(error, where))
        self._refused_since = None
        if not response.is_success:
            fault = explain_status(response.status_code, _read_error(response), response.headers, where)
            if response.status_code == 409 and expect is not None:
                fault = _wrong_checkpoint(str(fault))
            return _Answer(response.headers, fault=fault)
        completion = _read_body(response, where)
        if isinstance(completion, RequestError):
            return _Answer(response.headers, fault=completion)
        if expect is not None and (stamp := response.headers.get(DIGEST_HEADER)) != expect:
            stamped = stamp or "not at all"
            fault = _wrong_checkpoint(f"asked for weights {expect[:19]}, but the answer is stamped {stamped}")
            return _Answer(response.headers, fault=fault)
        return _Answer(response.headers, completion)

    def _explain_silence(self, cause: BaseException, where: str) -> RequestError:
        """No answer: of the attempt, or of every request where nothing has listened for so long that nothing will."""
        import httpx2

        through = f", asked through the proxy of {self._proxy}" if self._proxy else ""
        message = f"no answer from {where}{through}: {cause!r}"
        if not isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout):  # httpx-aiohttp calls either the other
            return RequestError(message, scope="attempt", reason="connection")
        now = asyncio.get_running_loop().time()
        self._refused_since = now if self._refused_since is None else self._refused_since
        if (silent_s := now - self._refused_since) < MAX_REFUSED_S:
            return RequestError(message, scope="attempt", reason="connection")
        return RequestError(f"{message}, for {silent_s:.0f} s", scope="account", reason="gone")


@dataclass(frozen=True)
class _Answer:
    """What came of one request: a completion, or the fault that came instead."""

    headers: Mapping[str, str]
    completion: Body | None = None
    fault: RequestError | None = None


def fit_request(request: dict[str, Any], unsupported: set[str]) -> dict[str, Any]:
    """The request without the fields that the server does not take; how long an answer may be is said in another."""
    fitted = {name: value for name, value in request.items() if name not in unsupported}
    if "max_tokens" in unsupported:
        fitted["max_completion_tokens"] = request["max_tokens"]
    return fitted


def _wrong_checkpoint(message: str) -> WrongCheckpoint:
    return WrongCheckpoint(message, scope="account", reason="checkpoint", status=409)


def _read_error(response: httpx2.Response) -> object:
    """The error object of an answer's JSON, or its text where it is no JSON."""
    try:
        body = response.json()
    except (ValueError, RecursionError):
        return response.text.strip()
    return body.get("error", body) if isinstance(body, dict) else body


def _read_body(response: httpx2.Response, where: str) -> Body | RequestError:
    """The completion in an answer with status 200, or what is wrong with the body."""
    try:
        completion = response.json()
    except (ValueError, RecursionError):
        return explain_text(response.text, response.headers.get("content-type", ""), where)
    error = completion.get("error") if isinstance(completion, dict) else None
    if isinstance(error, dict):  # as some proxies of several providers answer
        status = error.get("code")
        return explain_status(status if isinstance(status, int) else 502, error, response.headers, where)
    if not isinstance(completion, dict) or not isinstance(completion.get("choices"), list):
        message = f"{where} answered with JSON that is no completion: {quote(response.text)}"
        return BadAnswer(message, scope="attempt", reason="incomplete", status=200)
    return completion


def _check(completion: Body, n: int, latency_s: float) -> Completion:
    """The completion as ours. Raises BadAnswer unless all n choices are there and finished."""
    usage = _read_usage(completion)
    try:
        choices = sorted(completion["choices"], key=lambda choice: choice["index"])
        if len(choices) != n:
            scope: Scope = "attempt" if len(choices) < n else "item"
            message = f"asked for {n} choices, the answer holds {len(choices)}"
            raise BadAnswer(message, scope=scope, reason="incomplete", usage=usage)
        read = tuple(_read_choice(choice, usage) for choice in choices)
    except (AttributeError, KeyError, TypeError) as error:
        message = f"the answer is no completion ({error!r})"
        raise BadAnswer(message, scope="attempt", reason="incomplete", usage=usage) from None
    return Completion(choices=read, usage=usage, latency_s=latency_s)


def _read_usage(completion: Body) -> Usage:
    """What was billed; 0 for what the server does not say, or says as no server can mean it."""
    return Usage(
        prompt_tokens=_count(completion, "prompt_tokens"), completion_tokens=_count(completion, "completion_tokens")
    )


def _count(completion: Body, name: str) -> int:
    usage = completion.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and 0 <= count < _MAX_TOKENS else 0


def _read_choice(choice: dict[str, Any], usage: Usage) -> Choice:
    """A choice with a text. Raises BadAnswer with what the model or its provider did instead of answering."""
    message = choice["message"]
    text, finish = _read_text(message.get("content")), choice["finish_reason"]
    scope: Scope = "item"
    if finish == "content_filter":
        reason, said = "content_filter", "the provider's filter stopped the answer"
    elif refusal := message.get("refusal"):
        reason, said = "refusal", f"the model refused: {quote(str(refusal))}"
    elif finish == "length" and text is None:
        reason, said = "cut_by_length", "max_tokens were used up before the answer began"
    elif finish not in ("stop", "length"):
        reason, said, scope = "incomplete", f"the answer ended with {finish!r}", "attempt"
    elif text is None:
        reason, said = "empty", f"the answer ended with {finish!r} and no text"
    else:
        return Choice(text, finish, _read_steps(choice))
    raise BadAnswer(f"choice {choice['index']}: {said}", scope=scope, reason=reason, usage=usage)


def _read_steps(choice: dict[str, Any]) -> tuple[Step, ...]:
    """The positions of a choice; none where the server tells no log-probs."""
    try:
        return tuple(
            Step(position["token"], {each["token"]: float(each["logprob"]) for each in position["top_logprobs"]})
            for position in choice["logprobs"]["content"]
        )
    except (KeyError, TypeError, ValueError):
        return ()


_TEXT_PARTS = ("text", "output_text", None)


def _read_text(content: object) -> str | None:
    """A message's text, also where it comes in parts, half a character (which no record holds) as a question mark."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") in _TEXT_PARTS]
        content = "".join(texts) if (texts := [part for part in parts if isinstance(part, str)]) else None
    return content.encode("utf-8", "replace").decode() if isinstance(content, str) else None
