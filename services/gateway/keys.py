"""Who may ask: bearer keys, compared in constant time and never logged. ASGI middleware.

Inference takes any key of VCOT_API_KEYS (comma-separated); /admin takes VCOT_ADMIN_KEY, and no other. Where the variable
names no key, its routes answer this machine only. Keys are read at each request, so that none is kept in an object.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
from dataclasses import dataclass
from functools import lru_cache

from starlette.types import ASGIApp, Receive, Scope, Send

from services.admin import ADMIN_KEY_ENV
from services.gateway.answers import Refusal, header_value, send_refusal

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
        elif not is_bearer(header_value(scope, "authorization"), accepted):
            message = f"send a key of the gateway's {self._keys.variable} as `Authorization: Bearer KEY`"
            raise Refusal(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})


def is_bearer(authorization: str | None, accepted: list[str]) -> bool:
    """Whether the header bears one of the keys; takes as long for any wrong key."""
    scheme, _, given = (authorization or "").partition(" ")
    matches = [hmac.compare_digest(given.strip().encode("latin-1"), key.encode()) for key in accepted]
    return scheme.lower() == "bearer" and any(matches)


def is_local(client: tuple[str, int] | None) -> bool:
    """Whether a connection comes from this machine; a unix socket's has no address."""
    return client is None or _is_loopback(client[0])


@lru_cache(maxsize=1024)
def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
