"""OpenAI's chat completions API in miniature: as strict as the real one, and its faults are deterministic.

An ASGI app, `create_app(Settings(...))`, for `httpx2.ASGITransport`, or a process that prints its URL:

    python tests/rehearsal/openai_api.py --port 0 --set tokens_per_min=200000 --fault refusal=0.02 --fault quota_after=50

Batches are taken as files of requests, and answered as the same requests are one by one, at once or after some polls
(`batch_polls`); `batch_refused` refuses each (as over its limit), `batch_left` leaves that share of a batch's requests.

A fault is drawn from the request's hash: the same request meets the same fault, with another seed it may not. `GET /stats`
counts what came. Limits are token buckets; a request is charged its prompt or its max tokens, whichever is more, as by
OpenAI's estimate. Not simulated: streaming, tools, audio, stop words.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import hashlib
import io
import json
import math
import re
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

REASONING = re.compile(r"gpt-5|o\d")
IMAGE_TOKENS = {"gpt-4o-mini": (2833, 5667)}  # (base, a tile of 512 px); the others are counted as gpt-4o
BATCH = ("batch_refused", "batch_left")
SHARES = ("flaky", "html", "filter_400", "filter", "refusal", "length", "reasoning", "fence", "two_objects")
"""Faults that hit a share of the requests. `flaky` refuses (503) only the first attempts of a request."""
AFTER = ("quota_after", "key_after")
"""Faults of the account: after so many answers, every request is refused."""


@dataclass(frozen=True)
class Settings:
    """How the API behaves."""

    api_key: str = "sk-rehearsal"
    models: tuple[str, ...] = ("gpt-4o-mini", "gpt-4o", "gpt-4.1-mini", "gpt-5-mini", "o4-mini")
    requests_per_min: int = 10_000
    tokens_per_min: int = 10_000_000
    latency_s: float = 0.0
    flaky_attempts: int = 1
    batch_polls: int = 2
    faults: dict[str, float] = field(default_factory=dict)


class ApiError(Exception):
    """An answer in OpenAI's shape of an error."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        kind = {429: "requests", 503: "server_error"}.get(status, "invalid_request_error")
        kind = code if code == "insufficient_quota" else kind
        body = {"message": message, "type": kind, "param": param, "code": code}
        self.response = JSONResponse({"error": body}, status, headers)
        self.label = f"{status} {code}"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ImageUrl(Strict):
    url: str
    detail: Literal["low", "high", "auto"] = "auto"


class Part(Strict):
    type: Literal["text", "image_url"]
    text: str = ""
    image_url: ImageUrl | None = None


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def parts(self) -> list[Part]:
        return [Part(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class NamedSchema(Strict):
    name: Annotated[str, Field(pattern=r"^[\w-]{1,64}$")]
    strict: bool = False
    schema_: dict[str, Any] = Field(alias="schema")


class Format(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class Body(Strict):
    """What a request may hold."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    seed: int | None = None
    max_tokens: Annotated[int, Field(ge=1, le=16384)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=128000)] | None = None
    response_format: Format | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    user: str | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class Bucket:
    """A token bucket that refills `limit` a minute."""

    def __init__(self, limit: int, now: float) -> None:
        self.limit, self.level, self.at = limit, float(limit), now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` is there; 0 where it is."""
        self.level = min(self.limit, self.level + (now - self.at) * self.limit / 60)
        self.at = now
        return max(0.0, (amount - self.level) * 60 / self.limit)


class OpenAi:
    """The API's state: its limits, and what it counted."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self.settings, self._clock = settings, clock
        self._buckets = {
            "requests": Bucket(settings.requests_per_min, clock()),
            "tokens": Bucket(settings.tokens_per_min, clock()),
        }
        self._attempts: Counter[str] = Counter()
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.counts = Counter(calls=0, answers=0, repeats=0, prompt_tokens=0, completion_tokens=0)
        """Repeats are of a request that was answered before; an answer is a completion, with a fault or without."""

    async def complete(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        self.counts["calls"] += 1
        await asyncio.sleep(self.settings.latency_s)
        try:
            return self._answer(request.headers.get("authorization", ""), await request.body())
        except ApiError as error:
            self.counts[error.label] += 1
            return error.response

    async def upload(self, request: Request) -> Response:
        """`POST /v1/files`."""
        async with request.form() as form:
            content, purpose = await form["file"].read(), form["purpose"]  # type: ignore[union-attr]
        if purpose != "batch":
            return ApiError(400, "'purpose' is not one of ['batch'].", "invalid_value", "purpose").response
        name = f"file-{len(self.files)}"
        self.files[name] = content
        self.counts["uploads"] += 1
        return JSONResponse(self._describe_file(name))

    def _describe_file(self, name: str) -> dict[str, Any]:
        known = {"id": name, "object": "file", "bytes": len(self.files[name]), "created_at": 0, "status": "processed"}
        return known | {"filename": name, "purpose": "batch"}

    async def download(self, request: Request) -> Response:
        """`GET /v1/files/{name}/content`."""
        return Response(self.files[request.path_params["name"]], media_type="application/octet-stream")

    async def create_batch(self, request: Request) -> Response:
        """`POST /v1/batches`."""
        body = await request.json()
        lines = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
        names = [line["custom_id"] for line in lines]
        assert len(set(names)) == len(names), "a batch's custom ids differ"
        assert all(sorted(line) == ["body", "custom_id", "method", "url"] for line in lines)
        number = len(self.batches)
        batch = {
            "id": f"batch_{number}", "object": "batch", "endpoint": body["endpoint"], "completion_window": "24h",
            "input_file_id": body["input_file_id"], "metadata": body.get("metadata"), "created_at": number,
            "status": "validating", "output_file_id": None, "error_file_id": None, "errors": None,
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
            "polls": self.settings.batch_polls,
        }  # fmt: skip
        self.batches[batch["id"]] = batch
        self.counts["batches"] += 1
        return JSONResponse(show_batch(batch))

    async def list_batches(self, _: Request) -> Response:
        """`GET /v1/batches`, the newest first."""
        data = [show_batch(batch) for batch in reversed(self.batches.values())]
        return JSONResponse({"object": "list", "data": data, "has_more": False})

    async def retrieve_batch(self, request: Request) -> Response:
        """`GET /v1/batches/{name}`."""
        batch = self.batches[request.path_params["name"]]
        if batch["status"] in ("validating", "in_progress"):
            self._work(batch, request.headers.get("authorization", ""))
        return JSONResponse(show_batch(batch))

    def _work(self, batch: dict[str, Any], authorization: str) -> None:
        if self.settings.faults.get("batch_refused"):
            message = "Enqueued token limit reached for gpt-4o-mini in organization org-x. Limit: 2,000,000."
            batch["status"] = "failed"
            batch["errors"] = {"object": "list", "data": [{"code": "token_limit_exceeded", "message": message}]}
            return
        batch["status"] = "in_progress"
        if batch["polls"] > 0:
            batch["polls"] -= 1
            return
        output, errors = [], []
        for line in map(json.loads, self.files[batch["input_file_id"]].splitlines()):
            place = int(hashlib.sha256(line["custom_id"].encode() + batch["id"].encode()).hexdigest()[:8], 16) / 16**8
            if place < self.settings.faults.get("batch_left", 0.0):
                left = {"code": "batch_expired", "message": "This request could not be executed before it expired."}
                errors.append({"id": "x", "custom_id": line["custom_id"], "response": None, "error": left})
                continue
            try:
                answered = self._answer(authorization, json.dumps(line["body"]).encode())
            except ApiError as error:
                answered = error.response
            response = {"status_code": answered.status_code, "request_id": "x", "body": json.loads(answered.body)}
            found = {"id": "x", "custom_id": line["custom_id"], "response": response, "error": None}
            (output if answered.status_code == 200 else errors).append(found)
        batch["request_counts"] |= {"completed": len(output), "failed": len(errors)}
        batch["status"] = "expired" if any(line["error"] for line in errors) else "completed"
        for field_name, lines in (("output_file_id", output), ("error_file_id", errors)):
            if lines:
                batch[field_name] = f"file-{len(self.files)}"
                self.files[batch[field_name]] = b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    def _answer(self, authorization: str, raw: bytes) -> Response:
        faults, num_answers = self.settings.faults, self.counts["answers"]
        key = authorization.removeprefix("Bearer ")
        if key != self.settings.api_key or num_answers >= faults.get("key_after", math.inf):
            raise ApiError(401, f"Incorrect API key provided: {key[:3]}***{key[-2:]}.", "invalid_api_key")
        body = parse(raw, self.settings.models)
        prompt_tokens = count_prompt(body)
        headers = self._charge(max(prompt_tokens, body.limit or 0))
        if num_answers >= faults.get("quota_after", math.inf):
            message = "You exceeded your current quota, please check your plan and billing details."
            raise ApiError(429, message, "insufficient_quota")
        digest = hashlib.sha256(body.model_dump_json().encode()).hexdigest()
        self._attempts[digest] += 1
        fault = draw_fault(faults, digest)
        self.counts[f"fault {fault}"] += fault is not None
        if fault == "flaky" and self._attempts[digest] <= self.settings.flaky_attempts:
            raise ApiError(503, "The server is overloaded or not ready yet.", None)
        if fault == "filter_400":
            raise ApiError(400, "Invalid prompt: it was flagged as violating our usage policy.", "content_filter")
        if fault == "html":
            return Response("<html><body>Please log in</body></html>", media_type="text/html")
        answer = make_answer(body, prompt_tokens, fault)
        self.counts.update(
            answers=1, **{name: answer["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
        )
        self.counts["repeats"] += self._attempts[digest] - self.settings.flaky_attempts * (fault == "flaky") > 1
        return JSONResponse(answer, headers=headers)

    def _charge(self, amount: float) -> dict[str, str]:
        """Take a request and `amount` tokens, or raise 429. Returns the x-ratelimit headers."""
        needs = {"requests": 1.0, "tokens": min(amount, self.settings.tokens_per_min)}
        now, headers = self._clock(), {}
        waits = {name: bucket.wait_s(needs[name], now) for name, bucket in self._buckets.items()}
        short = max(waits, key=lambda name: waits[name])
        for name, bucket in self._buckets.items():
            bucket.level -= 0 if waits[short] else needs[name]
            headers[f"x-ratelimit-limit-{name}"] = str(bucket.limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(int(bucket.level))
            headers[f"x-ratelimit-reset-{name}"] = format_reset(bucket.wait_s(bucket.limit, now))
        if waits[short]:
            message = f"Rate limit reached on {short} per min. Please try again in {format_reset(waits[short])}."
            headers["retry-after"] = str(math.ceil(waits[short]))
            raise ApiError(429, message, "rate_limit_exceeded", headers=headers)
        return headers


def show_batch(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "polls"}


def parse(raw: bytes, models: tuple[str, ...]) -> Body:
    """A request that the API takes. Raises ApiError."""
    try:
        body = Body.model_validate_json(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(step) for step in fault["loc"])
        if fault["type"] == "extra_forbidden":
            raise ApiError(400, f"Unknown parameter: '{place}'.", "unknown_parameter", place) from None
        raise ApiError(400, f"Invalid value for '{place}': {fault['msg']}.", "invalid_value", place or None) from None
    if body.model not in models:
        message = f"The model `{body.model}` does not exist or you do not have access to it."
        raise ApiError(404, message, "model_not_found")
    is_reasoning = REASONING.match(body.model) is not None
    if body.max_tokens and (is_reasoning or body.max_completion_tokens):
        message = "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        raise ApiError(400, f"Unsupported parameter: {message}", "unsupported_parameter", "max_tokens")
    for name in ("temperature", "top_p"):
        if is_reasoning and getattr(body, name) not in (None, 1):
            message = f"Unsupported value: '{name}' does not support {getattr(body, name)} with this model."
            raise ApiError(400, f"{message} Only the default (1) value is supported.", "unsupported_value", name)
    wanted = body.response_format.json_schema if body.response_format else None
    if wanted and wanted.strict and not is_closed(wanted.schema_):
        message = "Invalid schema for response_format: every property is required, and additionalProperties is false."
        raise ApiError(400, message, None, "response_format")
    return body


def is_closed(schema: dict[str, Any]) -> bool:
    """Whether strict structured output takes this schema."""
    inner = schema.get("properties", {})
    closed = schema.get("additionalProperties") is False and sorted(schema.get("required", ())) == sorted(inner)
    return (schema.get("type") != "object" or closed) and all(is_closed(one) for one in inner.values())


def count_text(text: str) -> int:
    return math.ceil(len(text) / 4)


def count_prompt(body: Body) -> int:
    """Tokens billed for the prompt: one for four characters, and each image by its tiles."""
    parts = [part for message in body.messages for part in message.parts]
    texts, images = (count_text(part.text) for part in parts), (part.image_url for part in parts if part.image_url)
    return 3 + 4 * len(body.messages) + sum(texts) + sum(count_image(body.model, image) for image in images)


def count_image(model: str, image: ImageUrl) -> int:
    try:
        data = base64.b64decode(image.url.partition(";base64,")[2], validate=True)
        width, height = Image.open(io.BytesIO(data)).size
    except (OSError, binascii.Error):
        raise ApiError(400, "You uploaded an unsupported image.", "invalid_image_format", "messages") from None
    base, tile = IMAGE_TOKENS.get(model, (85, 170))
    shrink = min(1.0, 2048 / max(width, height))
    shrink = min(shrink, 768 / min(width, height))
    tiles = math.ceil(width * shrink / 512) * math.ceil(height * shrink / 512)
    return base if image.detail == "low" else base + tile * tiles


def draw_fault(faults: dict[str, float], digest: str) -> str | None:
    """The fault of the request with this hash: each kind has a slice of [0, 1)."""
    place, end = int(digest[:12], 16) / 16**12, 0.0
    for kind in SHARES:
        end += faults.get(kind, 0.0)
        if place < end:
            return kind
    return None


def make_answer(body: Body, prompt_tokens: int, fault: str | None) -> dict[str, Any]:
    """The completion; its scores are a function of what stands after "Response:" in the prompt."""
    told = " ".join(part.text for message in body.messages for part in message.parts).rpartition("Response:")[2]
    wanted = body.response_format.json_schema if body.response_format else None
    choices, completion_tokens, limit = [], 0, body.limit or 16384
    for index in range(body.n or 1):
        place = int(hashlib.sha256(f"{told.strip()}{index or ''}".encode()).hexdigest(), 16)
        text = json.dumps(fill(wanted.schema_, place)) if wanted else f"I would give it {place % 10 + 1} of 10."
        content, finish = damage(text[: 4 * limit], "length" if count_text(text) > limit else "stop", fault)
        completion_tokens += limit if fault == "reasoning" else count_text(content or "")
        refusal = "I'm sorry, I can't help with that." if fault == "refusal" else None
        message = {"role": "assistant", "content": content, "refusal": refusal}
        choices.append({"index": index, "finish_reason": finish, "logprobs": None, "message": message})
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    usage["total_tokens"] = prompt_tokens + completion_tokens
    made = {"id": "chatcmpl-rehearsal", "object": "chat.completion", "created": 0, "model": body.model}
    return made | {"choices": choices, "usage": usage}


def damage(text: str, finish: str, fault: str | None) -> tuple[str | None, str]:
    """Content and finish reason under a fault."""
    damaged: dict[str | None, tuple[str | None, str]] = {
        "refusal": (None, "stop"),
        "filter": ("", "content_filter"),
        "length": (text[: len(text) // 2], "length"),
        "reasoning": ("", "length"),  # all tokens went into thinking
        "fence": (f"```json\n{text}\n```", finish),
        "two_objects": (f"{text}\n{text}", finish),
    }
    return damaged.get(fault, (text, finish))


def fill(schema: dict[str, Any], place: int) -> Any:
    """A value of this JSON schema, chosen by the number `place`."""
    if "enum" in schema:
        return schema["enum"][place % len(schema["enum"])]
    match schema.get("type"):
        case "object":
            return {name: fill(inner, place) for name, inner in schema.get("properties", {}).items()}
        case "integer" | "number":
            return int(schema.get("minimum", 1)) + place % 10
        case "array":
            return []
        case "boolean":
            return place % 2 == 0
    return "The statements were checked against the image."


def format_reset(seconds: float) -> str:
    """As OpenAI writes it: `120ms`, `1s`, `6m0s`."""
    if seconds < 1:
        return f"{math.ceil(1000 * seconds)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def create_app(settings: Settings | None = None, clock: Callable[[], float] = time.monotonic) -> Starlette:
    """The app; `app.state.api.counts` is what `GET /stats` answers."""
    api = OpenAi(settings or Settings(), clock)
    unknown = set(api.settings.faults) - {*SHARES, *AFTER, *BATCH}
    if unknown:
        raise ValueError(f"unknown faults {unknown}; there are {SHARES} and {AFTER}")

    async def stats(_: Request) -> Response:
        return JSONResponse(dict(api.counts))

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", api.complete, methods=["POST"]),
            Route("/v1/files", api.upload, methods=["POST"]),
            Route("/v1/files/{name}/content", api.download),
            Route("/v1/batches", api.create_batch, methods=["POST"]),
            Route("/v1/batches", api.list_batches),
            Route("/v1/batches/{name}", api.retrieve_batch),
            Route("/stats", stats),
        ]
    )
    app.state.api = api
    return app


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description="OpenAI's chat completions API in miniature")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of Settings")
    parser.add_argument(
        "--fault", action="append", default=[], metavar="KIND=SHARE", help="refusal=0.02, quota_after=9"
    )
    arguments = parser.parse_args()
    fields = [item.partition("=") for item in arguments.set]
    changes: dict[str, Any] = {name: type(getattr(Settings(), name))(value) for name, _, value in fields}
    faults = {kind: float(share) for kind, _, share in (item.partition("=") for item in arguments.fault)}
    app = create_app(replace(Settings(), faults=faults, **changes))
    listener = socket.create_server(("127.0.0.1", arguments.port))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", flush=True)  # noqa: T201
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
