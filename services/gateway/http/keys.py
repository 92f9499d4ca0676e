"""Who may ask: bearer keys, compared in constant time and never logged. ASGI middleware.

Inference takes any key of VCOT_API_KEYS (comma-separated); /admin takes VCOT_ADMIN_KEY, and no other. Where the variable
names no key, its routes answer this machine only, and there no web page that a browser of this machine shows: a page can
send to any address that is local to its reader, so the request must name this machine as its host (a page's own name may
be made to mean 127.0.0.1), come from no other origin, and be declared as JSON, which a page may not send without being
asked for. Keys are read at each request, so that none is kept in an object.
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from vcot.pipeline.hosts import is_loopback
from vcot.services.gateway.admin import ADMIN_KEY_ENV
from vcot.services.gateway.http.answers import Refusal, header_value, send_refusal

API_KEYS_ENV = "VCOT_API_KEYS"


@dataclass(frozen=True)
class Keys:
    """The keys that open some routes."""

    variable: str
    is_list: bool

    def accepted(self) -> list[str]:
        """What the environment says now."""
        value = os.environ.get(self.variable, "")
        keys = value.split(",") if self.is_list else [value]
        return [stripped for key in keys if (stripped := key.strip())]


INFERENCE = Keys(API_KEYS_ENV, is_list=True)
ADMIN = Keys(ADMIN_KEY_ENV, is_list=False)


def warnings(host: str) -> list[str]:
    """What a gateway that listens at `host` refuses to all others for want of a key."""
    if is_local((host, 0)):
        return []
    unset = [(INFERENCE, "ask"), (ADMIN, "swap or register")]
    return [f"no {k.variable} is set, so only this machine may {what}" for k, what in unset if not k.accepted()]


class Guarded:
    """Middleware that lets bearers of a key through; anyone of this machine, where there is no key."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        try:
            self._check(scope)
        except Refusal as refusal:
            await send_refusal(scope, send, refusal)
        else:
            await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        accepted = self._keys.accepted()
        if not accepted:
            if not is_local(scope.get("client")):
                message = f"without a key this is for the gateway's own host; set {self._keys.variable} there"
                raise Refusal(403, "local_only", message)
            _check_no_page(scope, self._keys.variable)
        elif not is_bearer(header_value(scope, "authorization"), accepted):
            message = f"send a key of the gateway's {self._keys.variable} as `Authorization: Bearer KEY`"
            raise Refusal(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})


def _check_no_page(scope: Scope, variable: str) -> None:
    """Raise Refusal for a request to an unguarded route that a web page may have made."""
    for name, prefix in (("host", "//"), ("origin", "")):
        value = header_value(scope, name)
        if value is not None and not _names_this_machine(prefix + value):
            message = f"{name} {value[:100]!r} is not this machine; ask 127.0.0.1, or set {variable}"
            raise Refusal(403, "local_only", message)
    declared = (header_value(scope, "content-type") or "").partition(";")[0].strip().lower()
    if scope["method"] == "POST" and declared != "application/json":
        message = f"content-type is {declared[:100]!r}; send JSON as application/json, or set {variable}"
        raise Refusal(415, "unsupported_media_type", message)


def _names_this_machine(url: str) -> bool:
    """Whether a URL's host is this machine's own name or address, whatever a name server says."""
    try:
        host = urlsplit(url).hostname
    except ValueError:  # brackets that hold no address
        return False
    return host == "localhost" or (host is not None and is_loopback(host))


def is_bearer(authorization: str | None, accepted: list[str]) -> bool:
    """Whether the header bears one of the keys; takes as long for any wrong key."""
    scheme, _, given = (authorization or "").partition(" ")
    matches = [hmac.compare_digest(given.strip().encode("latin-1"), key.encode()) for key in accepted]
    return scheme.lower() == "bearer" and any(matches)


def is_local(client: tuple[str, int] | None) -> bool:
    """Whether a connection comes from this machine; a unix socket's has no address."""
    return client is None or is_loopback(client[0])
