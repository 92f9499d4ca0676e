"""What is published with the data names nothing of the machine that it was made on."""

from __future__ import annotations

import re


def public_name(value: str) -> str:
    """A model, a file or a name as others may know it: of a path on this machine its last name, of an address nothing."""
    if "://" in value:
        return "(an address)"
    is_path = value.startswith(("/", "~", ".")) or "\\" in value or value.count("/") > 1
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if is_path else value
