"""What a request may make the engine do besides answering: nothing. Pure.

vLLM 0.32 fetches any media URL that it is given, from wherever it stands, and has request fields that reach further than
the prompt. So media come as data URLs, or from hosts that the recipe allows, and these are refused:

    mm_processor_kwargs     become arguments of the processor's from_pretrained: folders, remote code
    media_io_kwargs         choose how media are decoded
    chat_template           a program of the client's, rendered in the server
    *_embeds                pickled tensors, read by torch.load
    image_pil               a string here is opened by the image processor, as a path or a URL
    kv_/ec_transfer_params  name other machines to read caches from
    uuid of a medium        takes the place of the image's hash in the cache: one client's image would answer for another's
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from services.gateway.answers import Refusal

_FIELDS = (
    "mm_processor_kwargs",
    "media_io_kwargs",
    "chat_template",
    "prompt_embeds",
    "kv_transfer_params",
    "ec_transfer_params",
)
_URLS = ("image_url", "audio_url", "video_url")
_PARTS = ("image_pil", "image_embeds", "audio_embeds", "video_embeds", "prompt_embeds")
_FETCHABLE = re.compile(r"https?://(?P<host>[a-z0-9.-]+(?::[0-9]{1,5})?)(?:[/?][!-\[\]-~]*)?", re.IGNORECASE)
"""Strict, so that no parser of vLLM's can see another host: no user, no backslash, no space, no control character."""


def check_content(request: dict[str, Any], allowed_hosts: Collection[str]) -> None:
    """Raise Refusal for a request that would make the engine fetch, load or run something."""
    for name in _FIELDS:
        if request.get(name) is not None:
            raise Refusal(400, "field_refused", f"{name} is not taken from clients; leave it out")
    pending: list[Any] = [request.get("messages")]
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending += node
        elif isinstance(node, dict):
            _check_part(node, allowed_hosts)
            pending += node.values()


def _check_part(part: dict[str, Any], allowed_hosts: Collection[str]) -> None:
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
