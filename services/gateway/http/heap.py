"""How the gateway's process treats its memory, once it has loaded what it needs.

Bodies of 100 KB come and go by the thousand. As it is, glibc gives such memory back to the kernel and asks for it anew, page
by page, and Python's collector walks over all modules again and again: together a quarter of what a request costs
(docs/lab-notes.md, "What a request costs the gateway").
"""

from __future__ import annotations

import ctypes
import gc

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT_BYTES = 256 * 2**20
"""Free memory that is kept at most; enough for `serve.max_in_flight` large requests."""
_MAX_HEAP_BLOCK = 32 * 2**20
"""The largest that glibc allows."""
_GC_THRESHOLDS = 20_000, 20, 20
"""Requests leave next to no cycles behind; 700, 10, 10 by default."""


def settle() -> None:
    """Keep free memory, and leave what is there now out of garbage collection. Without glibc, only the latter."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MAX_HEAP_BLOCK)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
