"""The client of an OpenAI-compatible API, with the checks that make an answer a record.

The openai SDK does the talking, over aiohttp (a request carries 100 KB of image; httpx spends several times the CPU on
it). Its own retries are off: `pipeline.concurrency.with_retry` is the one retry layer. An answer is refused unless it
holds exactly the choices that were asked for, each finished, and is stamped with the weights that were asked for.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pipeline.errors import BadAnswer, RequestError, WrongCheckpoint
from pipeline.images import media_type
from pipeline.records import ImageRef, SamplingParams, Usage

if TYPE_CHECKING:
    import httpx2
    from openai.types.chat import ChatCompletion

DIGEST_HEADER = "x-vcot-digest"
EXPECT_HEADER = "x-vcot-expect"
_REFUSED = {400, 401, 403, 404, 413, 415, 422}
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Choice:
    """One response of a completion."""

    text: str
    finish_reason: str


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


def user_message(
    text: str, image: ImageRef | None = None, data: bytes | None = None, **image_options: str
) -> dict[str, Any]:
    """A user turn: the image first, as a data URL, then the text."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not None and data is not None:
        url = f"data:{media_type(image)};base64,{base64.b64encode(data).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url, **image_options}})
    return {"role": "user", "content": content}


class ChatClient:
    """Chat completions from one API. An async context manager; share one between all requests of a stage."""

    def __init__(
        self,
        base_url: str | None,
        api_key: str,
        *,
        max_connections: int,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """`base_url` ends in /v1; None is OpenAI's own. `transport` replaces the network in tests."""
        import httpx2  # with openai, a third of a second that `--help` need not pay
        import openai

        limits = httpx2.Limits(max_connections=max_connections, max_keepalive_connections=max_connections)
        timeout = httpx2.Timeout(_TIMEOUT_S, connect=10.0)
        http_client = (
            openai.DefaultAioHttpClient(limits=limits, timeout=timeout)
            if transport is None
            else httpx2.AsyncClient(transport=transport, timeout=timeout)
        )
        self._openai = openai.AsyncOpenAI(
            base_url=base_url, api_key=api_key, max_retries=0, timeout=timeout, http_client=http_client
        )

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
        extra_body: Mapping[str, Any] | None = None,
    ) -> Completion:
        """`params.n` responses. `expect` is the weights digest that the answer must be stamped with.

        `extra_body` holds fields beyond OpenAI's, and wins over `params`. Raises RequestError: WrongCheckpoint for
        another stamp (or none), BadAnswer for an incomplete answer.
        """
        started = time.monotonic()
        request = {"model": model, "messages": messages, **params.model_dump(), "extra_body": extra_body}
        if response_format is not None:
            request["response_format"] = response_format
        return _check(await self._create(request, expect), params.n, time.monotonic() - started)

    async def score(self, model: str, messages: Sequence[dict[str, Any]], *, expect: str) -> Scored:
        """How likely `model` finds `messages`, the last of them the assistant's, its end included (vLLM only).

        `expect` is as in `complete`. Raises RequestError as `complete` does.
        """
        extra = {"prompt_logprobs": 0, "return_token_ids": True, "add_generation_prompt": False}
        request = {"model": model, "messages": messages, "max_tokens": 1, "temperature": 0.0, "extra_body": extra}
        found: dict[str, Any] = (await self._create(request, expect)).model_extra or {}
        try:
            tokens, steps = found["prompt_token_ids"], found["prompt_logprobs"]
            logprobs = tuple(float(step[str(t)]["logprob"]) for t, step in zip(tokens[1:], steps[1:], strict=True))
        except (KeyError, TypeError, ValueError):
            raise BadAnswer(
                f"{self._openai.base_url} gives no log-prob for each token of a prompt; only vLLM's are compared"
            ) from None
        return Scored(tuple(tokens), logprobs)

    async def _create(self, request: dict[str, Any], expect: str | None) -> ChatCompletion:
        """The answer, with `expect`'s stamp. Raises RequestError."""
        import openai

        headers = {EXPECT_HEADER: expect} if expect else None
        try:
            raw = await self._openai.chat.completions.with_raw_response.create(**request, extra_headers=headers)
            completion: ChatCompletion = raw.parse()
        except openai.APIStatusError as error:
            raise _explain_status(error) from None
        except (openai.APIConnectionError, openai.APIResponseValidationError) as error:
            cause = error.__cause__ or error
            raise RequestError(f"no answer from {self._openai.base_url}: {cause!r}", retryable=True) from None
        except ValueError as error:  # a body that is not JSON
            raise BadAnswer(f"{self._openai.base_url} answered with half a JSON: {error}", retryable=True) from None
        if expect is not None and (stamp := raw.headers.get(DIGEST_HEADER)) != expect:
            raise WrongCheckpoint(f"asked for weights {expect[:19]}, but the answer is stamped {stamp or 'not at all'}")
        return completion


def _explain_status(error: Any) -> RequestError:
    """An openai.APIStatusError as ours, with what the retry layer needs."""
    status: int = error.status_code
    body = error.body if isinstance(error.body, dict) else {}
    message = f"HTTP {status}: {body.get('message') or error.message}"
    if status == 409:
        return WrongCheckpoint(message, status=status)
    retryable = status not in _REFUSED and body.get("code") != "insufficient_quota"
    return RequestError(
        message, status=status, retryable=retryable, retry_after_s=_retry_after_s(error.response.headers)
    )


def _retry_after_s(headers: Any) -> float | None:
    """The server's `Retry-After` in seconds; None where it is absent or a date."""
    try:
        return max(0.0, float(headers["retry-after"]))
    except (KeyError, ValueError):
        return None


def _check(completion: ChatCompletion, n: int, latency_s: float) -> Completion:
    """The completion as ours. Raises BadAnswer unless all n choices are there and finished."""
    choices = sorted(completion.choices or [], key=lambda choice: choice.index)
    if len(choices) != n:
        raise BadAnswer(f"asked for {n} choices, the answer holds {len(choices)}", retryable=True)
    for choice in choices:
        if choice.message.content is None or choice.finish_reason not in ("stop", "length"):
            raise BadAnswer(
                f"choice {choice.index} ended with {choice.finish_reason!r} and no usable text", retryable=True
            )
    usage = completion.usage
    return Completion(
        choices=tuple(Choice(choice.message.content or "", choice.finish_reason) for choice in choices),
        usage=Usage(
            prompt_tokens=(usage.prompt_tokens or 0) if usage else 0,  # some servers answer null
            completion_tokens=(usage.completion_tokens or 0) if usage else 0,
        ),
        latency_s=latency_s,
    )
