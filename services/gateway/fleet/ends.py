"""What may become of a request at an engine."""

from __future__ import annotations

from typing import Literal

End = Literal["answered", "broken", "unknown"]
"""As far as it tells something of the engine."""


class EngineFault(Exception):
    """An engine did not answer a request as it should, so that another one may; never leaves the gateway."""

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        is_broken: bool | None = None,
        has_begun: bool = False,
        was_sent: bool = True,
        retry_after: str | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        """One of a few words, for the counters."""
        self.is_broken = is_broken
        """Whether that speaks against the engine; None where only the engine can tell, which is then asked how it is.

        A client can make any engine fail its request, and being full is no fault.
        """
        self.has_begun = has_begun
        """Whether a part of the answer is with the client."""
        self.was_sent = was_sent
        """Whether the engine had the request."""
        self.was_there = False
        """Whether it had the request when it died."""
        self.retry_after = retry_after
