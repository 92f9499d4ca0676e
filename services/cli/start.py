"""The `vcot` script: what it takes half a second to import may be interrupted, too."""

from __future__ import annotations

from vcot.services.cli.stop import stop_at_once


def main() -> None:
    """The entry point."""
    stop_at_once()
    from vcot.services.cli.outcome import main as run

    run()
