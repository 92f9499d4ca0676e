"""Which hosts are this machine. Pure, but for the machine's own name."""

from __future__ import annotations

import ipaddress
import socket
from functools import lru_cache


@lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Whether an address, without brackets, is this machine's own, also as IPv6 writes one of IPv4."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def is_this_machine(host: str) -> bool:
    """Whether a request to this host, a name or an address, does not leave the machine."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost") or name == socket.gethostname().lower():
        return True
    return is_loopback(name) or name in ("0.0.0.0", "::") or _is_short_loopback(name)  # noqa: S104 - compared, not bound


def _is_short_loopback(name: str) -> bool:
    """As `127.1`, which systems take for 127.0.0.1."""
    if not name.replace(".", "").isdigit():
        return False
    try:
        return is_loopback(socket.inet_ntoa(socket.inet_aton(name)))
    except OSError:
        return False
