"""What a run's ledger holds, for tests that look at a run from outside."""

import sqlite3
from pathlib import Path
from typing import TypeVar

from vcot.pipeline.ledger import Ledger
from vcot.pipeline.records import Judgment, Response

R = TypeVar("R", Response, Judgment)


def count_good(run: Path, kind: type[Response] | type[Judgment]) -> int:
    """Good records of a kind; 0 before the ledger is made."""
    if not (run / "ledger.sqlite").is_file():
        return 0
    table = "responses WHERE ok" if kind is Response else "judgments WHERE error IS NULL"
    connection = sqlite3.connect(run / "ledger.sqlite")
    try:
        return connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    except sqlite3.OperationalError:  # not made yet
        return 0
    finally:
        connection.close()


def read_responses(run: Path) -> list[Response]:
    """The good responses."""
    if not count_good(run, Response):
        return []
    connection = sqlite3.connect(run / "ledger.sqlite")
    keys = [key.hex() for (key,) in connection.execute("SELECT key FROM responses WHERE ok")]
    connection.close()
    ledger = Ledger(run / "ledger.sqlite", is_read=True)
    try:
        return list(ledger.get(Response, keys).values())
    finally:
        ledger.close()
