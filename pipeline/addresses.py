"""A server's address in the one way to write it, so that one server is not known by two names."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated

from pydantic import AfterValidator

_UPSTREAM = re.compile(
    r"(?P<scheme>https?)://(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<host>[a-z0-9_-]+(?:\.[a-z0-9_-]+)*))(?::(?P<port>[1-9][0-9]{0,4}))?/?",
    re.ASCII | re.IGNORECASE,
)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_MAX_HOST, _MAX_LABEL = 253, 63
"""Of a name, and of its parts (RFC 1035)."""


def _check_upstream(url: str) -> str:
    """A server's address in the one way to write it. Raises ValueError for what clients refuse, or read differently."""
    match = _UPSTREAM.fullmatch(url)
    host = _check_host(match) if match else None
    port = (match["port"] if match else None) or ""
    if match is None or host is None or int(port or 1) > 65535:
        raise ValueError(f"{url[:100]!r} is no server's address; write it as http://host:port")
    scheme = match["scheme"].lower()
    return f"{scheme}://{host}" + (f":{port}" if port and port != _DEFAULT_PORTS[scheme] else "")


def _check_host(match: re.Match[str]) -> str | None:
    """The name or address; None for what looks like an address and is none, or is too long for a name."""
    try:
        if match["v6"] is not None:
            return f"[{ipaddress.IPv6Address(match['v6'])}]"
        host = str(match["host"]).lower()
        if _NUMBER.fullmatch(host.rpartition(".")[2]):  # resolvers read 127.1 and 0x7f000001 as addresses
            return str(ipaddress.IPv4Address(host))
    except ValueError:
        return None
    return host if len(host) <= _MAX_HOST and all(0 < len(label) <= _MAX_LABEL for label in host.split(".")) else None


UpstreamUrl = Annotated[str, AfterValidator(_check_upstream)]
"""Of a server: a host's name or address, perhaps a port, and no path."""
