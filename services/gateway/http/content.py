"""What a request may make the engine do besides answering: nothing. Pure.

vLLM 0.32 fetches any media URL that it is given, from wherever it stands, and has request fields that reach further than
the prompt: `mm_processor_kwargs` become arguments of the processor's from_pretrained (folders, remote code), `chat_template`
is a program of the client's, `chat_template_kwargs` change what a BOS is, `kv_transfer_params` and `vllm_xargs` name other
machines to read caches from. So only OpenAI's fields pass, and those of vLLM that are named here. Media come as data URLs,
or from hosts that the recipe allows, and of a content part these are refused:

    *_embeds          pickled tensors, read by torch.load
    image_pil         a string here is opened by the image processor, as a path or a URL
    uuid of a medium  takes the place of the image's hash in the cache: one client's image would answer for another's

A request is bounded where its cost is: choices, JSON values, and the pixels that an image's own header announces, since
29 KB of PNG can take 2.5 GB to decode.
"""

from __future__ import annotations

import base64
import io
import math
import re
import struct
import warnings
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from typing import Any

from PIL import Image

from vcot.services.gateway.http.answers import Refusal
from vcot.services.gateway.http.compiled import check_compiled

MAX_CHOICES = 128
"""Of one request, as at OpenAI; each makes everyone wait while the engine takes it in."""
MAX_ANSWERS = 512
"""Of one request that has several prompts."""
_MAX_ENTRIES = {
    **dict.fromkeys(("stop", "bad_words"), 64),
    **dict.fromkeys(("stop_token_ids", "logit_bias", "logprob_token_ids", "tools", "functions"), 1_024),
    "allowed_token_ids": 300_000,
}
"""Each is gone through for every token of every choice, or for every request; no vocabulary is larger."""
_COMPILED = ("structured_outputs", "response_format", "tools", "functions")
_MAX_COMPILED = 128 * 1024
"""Characters of what the engine compiles before it answers."""
MAX_CONTAINERS = 20_000
"""JSON objects and arrays of one request. 30 MB of empty ones would stop the gateway for seconds."""
MAX_VALUES = 500_000
_MAX_QUICK_BYTES = 256 * 1024
"""A body of this size is read in a few milliseconds, whatever it holds."""
_HEADER_BYTES = 1536
"""Of an image; nearly every one announces its size there."""

_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""The markers behind which a JPEG says how large it is (ITU T.81, table B.1)."""
_JPEG_SCAN = 0xDA
"""The marker behind which the pixels begin."""

_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Those of Pillow's whose header says how much decoding takes."""

OPENAI_FIELDS = frozenset((
    "audio", "best_of", "echo", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs",
    "max_completion_tokens", "max_tokens", "messages", "metadata", "modalities", "model", "n", "parallel_tool_calls",
    "prediction", "presence_penalty", "prompt", "prompt_cache_key", "reasoning_effort", "response_format",
    "safety_identifier", "seed", "service_tier", "stop", "store", "stream", "stream_options", "suffix", "temperature",
    "tool_choice", "tools", "top_logprobs", "top_p", "user", "verbosity",
))  # fmt: skip
VLLM_FIELDS = frozenset((
    "add_generation_prompt", "allowed_token_ids", "bad_words", "cache_salt", "continue_final_message", "ignore_eos",
    "include_reasoning", "include_stop_str_in_output", "logprob_token_ids", "min_p", "min_tokens", "prompt_logprobs",
    "repetition_penalty", "return_token_ids", "return_tokens_as_token_ids", "skip_special_tokens",
    "spaces_between_special_tokens", "stop_token_ids", "structured_outputs", "top_k",
))  # fmt: skip
"""Those that change what is sampled or told of one request, and nothing else."""
_URLS = ("image_url", "audio_url", "video_url")
_PARTS = ("input_audio", "image_pil", "image_embeds", "audio_embeds", "video_embeds", "prompt_embeds")
_DATA = re.compile(r"data:[a-z0-9.+/-]*(?:;[a-z0-9.+=_/-]+)*;base64,", re.IGNORECASE | re.ASCII)
"""What stands before the data, read alike by every parser."""
_FETCHABLE = re.compile(r"https?://(?P<host>[a-z0-9.-]+(?::[0-9]{1,5})?)(?:[/?][!-\[\]-~]*)?", re.IGNORECASE)
"""Strict, so that no parser of vLLM's can see another host: no user, no backslash, no space, no control character."""


def check_size(body: bytes) -> None:
    """Raise Refusal for a body whose JSON would take long to read, before it is read."""
    if len(body) <= _MAX_QUICK_BYTES:
        return
    num_containers = body.count(b"{") + body.count(b"[")
    if num_containers > MAX_CONTAINERS or body.count(b",") > MAX_VALUES:
        message = f"the request holds more than {MAX_CONTAINERS:,} JSON objects and arrays or {MAX_VALUES:,} values"
        raise Refusal(413, "body_too_large", f"{message}; send it in parts")


def check_content(request: dict[str, Any], allowed_hosts: Collection[str], max_image_pixels: int) -> None:
    """Raise Refusal for a request that would make the engine fetch, load or run something, or work without bound."""
    _check_fields(request)
    _check_choices(request)
    _check_entries(request)
    pending: list[tuple[Any, bool]] = [
        (value, name == "messages") for name, value in request.items() if isinstance(value, float | list | dict)
    ]
    while pending:
        node, is_content = pending.pop()
        if isinstance(node, float) and not math.isfinite(node):  # JSON's 1e999; it would be passed on as null
            raise Refusal(
                400, "invalid_json", "the request holds a number that is too large for a float; send a smaller"
            )
        if isinstance(node, list):
            pending += [(item, is_content) for item in node]
        elif isinstance(node, dict):
            if is_content:
                _check_part(node, allowed_hosts, max_image_pixels)
            pending += [(value, is_content) for value in node.values()]


def _check_fields(request: dict[str, Any]) -> None:
    for name, value in request.items():
        if value is None or name in OPENAI_FIELDS or name in VLLM_FIELDS:
            continue
        close = get_close_matches(name, OPENAI_FIELDS | VLLM_FIELDS, n=1, cutoff=0.8)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise Refusal(400, "field_refused", f"{name[:60]!r} is not taken from clients{meant}; leave it out")


def _check_choices(request: dict[str, Any]) -> None:
    most = 1.0
    for name in ("n", "best_of"):
        value = request.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):  # vLLM takes "4000" for 4000
            raise Refusal(400, "invalid_request_error", f"{name} is {str(value)[:40]!r}; it is a number")
        if value > MAX_CHOICES:
            raise Refusal(400, "too_many_choices", f"{name} is {value}, and at most {MAX_CHOICES} are given; ask again")
        most = max(most, value)
    prompts = request.get("prompt")
    if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int) and len(prompts) * most > MAX_ANSWERS:
        message = f"{len(prompts)} prompts by {most:g} choices are more than {MAX_ANSWERS} answers; send them in parts"
        raise Refusal(400, "too_many_choices", message)


def _check_entries(request: dict[str, Any]) -> None:
    for name, most in _MAX_ENTRIES.items():
        value = request.get(name)
        if isinstance(value, list | dict) and len(value) > most:
            raise Refusal(
                400, "too_many_entries", f"{name} has {len(value):,} entries, and {most:,} are taken; send fewer"
            )
    for name in _COMPILED:
        value = request.get(name)
        if isinstance(value, list | dict) and len(str(value)) > _MAX_COMPILED:
            message = f"{name} is longer than {_MAX_COMPILED:,} characters; send a smaller schema or grammar"
            raise Refusal(400, "too_many_entries", message)
        check_compiled(name, value)


def _check_part(part: dict[str, Any], allowed_hosts: Collection[str], max_image_pixels: int) -> None:
    for name in _PARTS:
        if name in part or part.get("type") == name:
            raise Refusal(400, "field_refused", f"{name} is not taken from clients; send images as data URLs")
    for name in _URLS:
        if name not in part:
            continue
        if part.get("uuid") is not None:
            raise Refusal(400, "field_refused", f"uuid beside {name} is not taken from clients; leave it out")
        for url in _strings(part[name]):
            _check_url(name, url, allowed_hosts)
            if name != "image_url":
                raise Refusal(400, "field_refused", f"{name} is not taken from clients; only images are served")
            _check_pixels(url, max_image_pixels)


def _strings(value: Any) -> Iterator[str]:
    """Every string that could be taken for a URL: the value, its `url`, or any of a list."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(value.get("url"))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _check_url(name: str, url: str, allowed_hosts: Collection[str]) -> None:
    if url[:5].lower() == "data:":
        return
    match = _FETCHABLE.fullmatch(url)
    if match is None or match["host"].lower() not in allowed_hosts:
        message = f"{name} {url[:60]!r} is not fetched; send the file as a data URL, or allow its host in "
        raise Refusal(400, "url_refused", message + "serve.allowed_image_hosts")


def _check_pixels(url: str, max_image_pixels: int) -> None:
    """Raise Refusal for an image whose header announces too many pixels; what is no image is for the engine to refuse."""
    if url[:5].lower() != "data:":
        return
    begin = url.find(",") + 1
    if not _DATA.fullmatch(url[:begin]):
        message = f"{url[: min(60, begin or 60)]!r} is no image; write it as data:image/png;base64,DATA"
        raise Refusal(400, "image_refused", message)
    num_pixels = _count_pixels(_decode(url[begin : begin + _HEADER_BYTES * 4 // 3]))
    if num_pixels is None:
        raw = _decode(url[begin:])
        num_pixels = max(_count_pixels(raw) or 0, _ask_pillow(raw) or 0)
    if num_pixels > max_image_pixels:
        message = f"an image has more than serve.max_image_pixels = {max_image_pixels:,} pixels; scale it down"
        raise Refusal(400, "image_too_large", message)


def _decode(data: str) -> bytes:
    """Of base64, passing over what is none (vLLM does not, and refuses that); nothing where it cannot be read."""
    try:
        return base64.b64decode(data)
    except ValueError:
        return b""


def _count_pixels(raw: bytes) -> float | None:
    """What the header of an image announces; None for what is none, or ends before it. Raises Refusal for other formats."""
    try:
        found = _read_pixels(raw)
    except (struct.error, IndexError):
        return None
    return _ask_pillow(raw) if found is None else found


def _read_pixels(raw: bytes) -> int | None:
    """Of a PNG or a JPEG, as most are: Pillow takes as long to say so as the gateway takes for all else of a request.

    The largest that is announced before the pixels begin, since a decoder takes the last of several. Raises struct.error
    and IndexError where `raw` ends before that.
    """
    if raw[:8] == b"\x89PNG\r\n\x1a\n":
        return _read_png(raw)
    return _read_jpeg(raw) if raw[:2] == b"\xff\xd8" else None


def _read_png(raw: bytes) -> int | None:
    found, at = None, 8
    while (kind := raw[at + 4 : at + 8]) != b"IDAT":
        if kind == b"IHDR":
            width, height = struct.unpack_from(">II", raw, at + 8)
            found = max(found or 0, width * height)
        at += 12 + struct.unpack_from(">I", raw, at)[0]
    return found


def _read_jpeg(raw: bytes) -> int | None:
    found, at = None, 2
    while raw[at] == 0xFF and raw[at + 1] != _JPEG_SCAN:
        if raw[at + 1] in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", raw, at + 5)
            found = max(found or 0, width * height)
        at += 2 + struct.unpack_from(">H", raw, at + 2)[0]
    return found if raw[at] == 0xFF else None


def _ask_pillow(raw: bytes) -> float | None:
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(raw)) as image:
            if image.format not in _FORMATS:  # an icon holds images larger than its header says
                raise Refusal(400, "image_refused", f"images are {', '.join(_FORMATS)}, not {image.format}; convert it")
            return image.width * image.height
    except Image.DecompressionBombError:
        return math.inf
    except (OSError, ValueError, SyntaxError, EOFError):
        return None
