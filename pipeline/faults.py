"""What a fault of an OpenAI-compatible API means: the one place that decides its scope. Pure.

Of an attempt: the same request may succeed (a reset connection, 429, 5xx, half a body). Of an item: this request never
will (a refusal, a content filter, a prompt too long). Of the account or server: no request will (a wrong key, an empty
purse, an unknown model, a parameter that the model does not take, a login page).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vcot.pipeline.errors import RequestError, Scope

MAX_WAIT_S = 300.0
"""A server that asks for a longer pause than this (a limit by the day, say) has no more to give today."""
_MAX_QUOTE = 200
_MAX_SAID = 1000

_CODES: dict[str, tuple[Scope, str]] = {
    "insufficient_quota": ("account", "quota"),
    "billing_hard_limit_reached": ("account", "quota"),
    "billing_not_active": ("account", "quota"),
    "invalid_api_key": ("account", "key"),
    "account_deactivated": ("account", "key"),
    "unsupported_country_region_territory": ("account", "forbidden"),
    "model_not_found": ("account", "model"),
    "unsupported_parameter": ("account", "parameter"),
    "unsupported_value": ("account", "parameter"),
    "unknown_parameter": ("account", "parameter"),
    "content_filter": ("item", "content_filter"),
    "content_policy_violation": ("item", "content_filter"),
    "invalid_prompt": ("item", "content_filter"),
    "context_length_exceeded": ("item", "too_long"),
    "invalid_image_format": ("item", "image"),
}
_STATUSES: dict[int, tuple[Scope, str]] = {
    400: ("item", "bad_request"),
    401: ("account", "key"),
    402: ("account", "quota"),
    403: ("account", "forbidden"),
    404: ("account", "address"),
    405: ("account", "address"),
    413: ("item", "too_long"),
    415: ("item", "bad_request"),
    422: ("item", "bad_request"),
    429: ("attempt", "rate_limit"),
}
_SHAPE = {"model", "n", "seed", "temperature", "top_p", "max_tokens", "max_completion_tokens", "response_format"}
"""Fields that all requests of a stage have alike."""
_UNSUPPORTED = {"unsupported_parameter", "unsupported_value"}
_ADAPTABLE = {"max_tokens", "temperature", "top_p"}
"""Fields that a judge's request can do without, or say in another way."""
_TOO_LONG = re.compile(r"context length|maximum model length|too many tokens", re.IGNORECASE)
_RESET = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:([\d.]+)s)?(?:([\d.]+)ms)?")


@dataclass(frozen=True)
class Place:
    """Where a user mends a fault of the account: names for the remedies."""

    key_env: str
    """The environment variable that holds the key."""
    model_field: str
    url_field: str


_REMEDIES = {
    "quota": "add credit to the account of {key_env} (OpenAI: platform.openai.com/settings/organization/billing)",
    "key": "set {key_env} to a key that is valid",
    "forbidden": "use a key ({key_env}) that may do this, or another API ({url_field})",
    "model": "set {model_field} to a model that {key_env} may use",
    "address": "see that {url_field} is the address of an OpenAI-compatible API and ends in /v1",
    "parameter": "choose a model ({model_field}) or API ({url_field}) that takes it",
    "gone": "see that a server runs there ({url_field})",
    "rate_limit": "wait that long, or use a key ({key_env}) with higher limits",
    "checkpoint": "swap the checkpoint in",
    "budget": "raise judge.max_cost_usd",
}


def find_remedy(reason: str, place: Place) -> str:
    """What its owner can do about a fault of the account."""
    return _REMEDIES[reason].format_map(vars(place))


def explain_status(status: int, body: object, headers: Mapping[str, str], where: str) -> RequestError:
    """An answer with an error status. `body` is the error object of its JSON, or its text where it is no JSON."""
    fields: Mapping[str, Any] = body if isinstance(body, Mapping) else {}
    message, param = fields.get("message"), fields.get("param")
    said = _clean(message) if message and isinstance(message, str) else quote(str(body)) if body else "no reason given"
    code = str(fields.get("code") or fields.get("type") or "")
    scope, reason = _CODES.get(code) or _classify(status, param if isinstance(param, str) else None, str(message))
    if 300 <= status < 400 and (target := headers.get("location")):
        said = f"it is elsewhere, at {quote(target)}"
    retry_after_s = read_retry_after(headers) if scope == "attempt" else None
    if retry_after_s is not None and retry_after_s > MAX_WAIT_S:
        scope, reason, said = "account", "rate_limit", f"{said} (to be asked again after {retry_after_s:.0f} s)"
    return RequestError(
        f"HTTP {status} from {where}: {said}",
        scope=scope,
        reason=reason,
        status=status,
        retry_after_s=retry_after_s,
        param=param if code in _UNSUPPORTED and isinstance(param, str) and param in _ADAPTABLE else None,
    )


def _classify(status: int, param: str | None, said: str) -> tuple[Scope, str]:
    """An error without a code that is known."""
    if 300 <= status < 400:
        return "account", "address"
    if status == 400 and _TOO_LONG.search(said):
        return "item", "too_long"
    if status == 400 and param in _SHAPE:
        return "account", "parameter"
    if status == 404 and "model" in said.lower():
        return "account", "model"
    return _STATUSES.get(status) or ("attempt", "overloaded")


def explain_text(text: str, content_type: str, where: str) -> RequestError:
    """An answer with status 200 that is no JSON: a page, or a body that was cut off."""
    if text.lstrip().startswith("<") or "html" in content_type:
        message = f"{where} answered with a page ({content_type or 'no type'}), not JSON: {quote(text)}"
        return RequestError(message, scope="account", reason="address", status=200)
    return RequestError(
        f"{where} answered with half a JSON: {quote(text)}", scope="attempt", reason="cut_off", status=200
    )


def quote(text: str) -> str:
    """Some words of a body, without markup, on one line."""
    words = " ".join(re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL).split())
    return repr(_clean(words if len(words) <= _MAX_QUOTE else words[:_MAX_QUOTE] + "..."))


def _clean(text: str) -> str:
    """A provider's own words as a record and a terminal can hold them: no half characters, no control characters."""
    said = text.encode("utf-8", "replace").decode()
    said = "".join(c if c.isprintable() else " " for c in said)
    return said if len(said) <= _MAX_SAID else said[:_MAX_SAID] + "..."


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """The server's wish in seconds, from `Retry-After-Ms` or `Retry-After`; None where it is absent or a date."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue
    return None


def read_reset(text: str) -> float | None:
    """Seconds from OpenAI's `6m0s`, `1s` or `120ms`, or from a plain number; None for anything else, or for the past."""
    try:
        return seconds if 0 <= (seconds := float(text)) < math.inf else None
    except ValueError:
        found = _RESET.fullmatch(text)
    if not text or found is None:
        return None
    hours, minutes, seconds, milliseconds = (float(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds + milliseconds / 1000
