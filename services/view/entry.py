"""Who may enter the viewer: whoever has its link, from a browser on this machine.

The link carries a token, which a cookie holds from the first visit on, so that no later address shows it. A request must
name a loopback host: a page of the web whose name was made to mean this machine (DNS rebinding) names its own. What changes
something must come from a page of the viewer. Answers allow no script or style but the viewer's own files, and no frame.
"""

from __future__ import annotations

import hmac
from http.cookies import SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "vcot-view"
TOKEN = "token"  # noqa: S105 - its name
_LOOPBACK = frozenset(("127.0.0.1", "localhost", "::1"))
_READING = ("GET", "HEAD")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Doorkeeper:
    """ASGI middleware before everything else."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what may enter, and turn the rest away."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await (self._turn_away(scope) or self._app)(scope, receive, guarded)

    def _turn_away(self, scope: Scope) -> Response | None:
        """The answer to whoever may not enter, or not yet; None for who may."""
        headers = Headers(scope=scope)
        if not _is_here(headers.get("host", "")):
            return _refuse("the viewer answers on this machine only: open it as 127.0.0.1 or localhost")
        fields = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        if TOKEN in fields and scope["method"] in _READING and self._is_ours(fields.pop(TOKEN)):
            return self._let_in(scope["path"], fields, headers["host"])
        morsel = SimpleCookie(headers.get("cookie", "")).get(_cookie_of(headers["host"]))
        if morsel is None or not self._is_ours(morsel.value):
            return _refuse("open the link that `vcot view` printed: it carries the token that lets you in")
        origin = headers.get("origin")
        if scope["method"] not in _READING and (origin is None or urlsplit(origin).netloc != headers["host"]):
            return _refuse("what changes something must come from a page of the viewer")
        return None

    def _is_ours(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self._token.encode())

    def _let_in(self, path: str, fields: dict[str, str], host: str) -> Response:
        """To the same page, by an address that does not show the token."""
        place = f"/{path.lstrip('/')}" + (f"?{urlencode(fields)}" if fields else "")
        answer = RedirectResponse(place, status_code=303)
        answer.set_cookie(_cookie_of(host), self._token, httponly=True, samesite="lax", path="/")
        return answer


def _cookie_of(host: str) -> str:
    """A name for each port: browsers share a host's cookies between its ports, and several viewers may be open."""
    return f"{COOKIE}-{urlsplit(f'//{host}').port or 80}"


def _is_here(host: str) -> bool:
    try:
        parts = urlsplit(f"//{host}")
        return parts.hostname in _LOOPBACK and (parts.port is None or parts.port > 0) and parts.netloc == host
    except ValueError:
        return False


def _refuse(why: str) -> Response:
    return PlainTextResponse(f"{why}\n", status_code=403)
