"""How the ledger's records lie in its file: tables, and a record as a row's values and back (pipeline/ledger.py)."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vcot.pipeline.odds import OptionScores
from vcot.pipeline.records import ImageGain, Judgment, Record, Reply, Response

LATER_TABLES = {
    "image_gains": """
CREATE TABLE IF NOT EXISTS image_gains (
    key               PRIMARY KEY NOT NULL,
    response          NOT NULL,
    checkpoint        TEXT NOT NULL,
    logp_true         REAL,
    logp_blank        REAL,
    num_tokens        INTEGER NOT NULL,
    prompt_tokens     INTEGER,
    completion_tokens INTEGER,
    error             TEXT,
    reason            TEXT NOT NULL,
    refused           INTEGER NOT NULL
);
""",
    "option_scores": """
CREATE TABLE IF NOT EXISTS option_scores (
    key               PRIMARY KEY NOT NULL,
    task              TEXT NOT NULL,
    checkpoint        TEXT NOT NULL,
    logps             TEXT NOT NULL,
    prompt_tokens     INTEGER,
    completion_tokens INTEGER,
    error             TEXT,
    reason            TEXT NOT NULL,
    refused           INTEGER NOT NULL
);
""",
}
"""By name; a file of an earlier version lacks some."""
TABLES = f"""
CREATE TABLE IF NOT EXISTS asked (id INTEGER PRIMARY KEY, body TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS groups (
    id      INTEGER PRIMARY KEY,
    key     NOT NULL,
    task    TEXT NOT NULL,
    asked   INTEGER NOT NULL,
    seed    INTEGER NOT NULL,
    members TEXT NOT NULL,
    UNIQUE (key, task, asked, seed)
);
CREATE TABLE IF NOT EXISTS responses (
    key PRIMARY KEY NOT NULL, grp INTEGER NOT NULL, position INTEGER NOT NULL, ok INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS judgments (
    id                INTEGER PRIMARY KEY,
    key               NOT NULL UNIQUE,
    response          NOT NULL,
    task              TEXT NOT NULL,
    judge             TEXT NOT NULL,
    score             REAL,
    low               REAL,
    high              REAL,
    rationale         TEXT NOT NULL,
    prompt_tokens     INTEGER,
    completion_tokens INTEGER,
    error             TEXT,
    reason            TEXT NOT NULL,
    refused           INTEGER NOT NULL,
    num_asked         INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS replies (
    key               PRIMARY KEY NOT NULL,
    judge             TEXT NOT NULL,
    text              TEXT,
    prompt_tokens     INTEGER,
    completion_tokens INTEGER,
    error             TEXT,
    reason            TEXT NOT NULL,
    refused           INTEGER NOT NULL
);
{"".join(LATER_TABLES.values())}
"""
ADDED = {"low": "REAL", "high": "REAL"}
"""Columns of `judgments` that a file of an earlier version lacks, and their types."""


@dataclass(frozen=True)
class Flat:
    """A kind of record with a row of its own, each field in a column; the usage in two."""

    table: str
    columns: tuple[str, ...]

    @property
    def select(self) -> str:
        """All rows."""
        return f"SELECT {', '.join(self.columns)} FROM {self.table}"  # noqa: S608 - only names

    @property
    def put(self) -> str:
        """A row: new, or in place of one with an error."""
        return f"""
            INSERT INTO {self.table} ({", ".join(self.columns)}) VALUES ({", ".join("?" * len(self.columns))})
            ON CONFLICT (key) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in self.columns[1:])}
            WHERE {self.table}.error IS NOT NULL
        """  # noqa: S608 - only names


FLAT: Mapping[type[Record], Flat] = {
    Judgment: Flat(
        "judgments",
        (
            "key", "response", "task", "judge", "score", "low", "high", "rationale", "prompt_tokens",
            "completion_tokens", "error", "reason", "refused", "num_asked",
        ),
    ),
    Reply: Flat(
        "replies", ("key", "judge", "text", "prompt_tokens", "completion_tokens", "error", "reason", "refused")
    ),
    ImageGain: Flat(
        "image_gains",
        (
            "key", "response", "checkpoint", "logp_true", "logp_blank", "num_tokens", "prompt_tokens",
            "completion_tokens", "error", "reason", "refused",
        ),
    ),
    OptionScores: Flat(
        "option_scores",
        ("key", "task", "checkpoint", "logps", "prompt_tokens", "completion_tokens", "error", "reason", "refused"),
    ),
}  # fmt: skip
PUT_RESPONSE = """
INSERT INTO responses (key, grp, position, ok) VALUES (?, ?, ?, ?)
ON CONFLICT (key) DO UPDATE SET grp = excluded.grp, position = excluded.position, ok = excluded.ok
"""
NAME_PLACE = "SELECT (SELECT hex(key) FROM groups WHERE id = ?), (SELECT hex(key) FROM judgments WHERE id = ?)"
"""Keys of a request and of a judgment, which stay those of their rows."""
_SHARED = {"key", "group", "task", "checkpoint", "prompt", "sampling"}
"""Fields of a response that its row tells."""
_PARTS = ("thought", "answer")
"""Fields that mostly are a part of the text, and then are stored as where it begins and how long it is."""
_HASHES = {"key", "response"}
"""Fields of a flat record that are hashes."""
_LISTS = {"logps"}
"""Those that are lists, kept as JSON."""
_HASH = re.compile(r"[0-9a-f]{64}")


def is_former(connection: sqlite3.Connection) -> bool:
    """Whether the file is of an earlier version."""
    return bool(list_columns(connection, "records") or ADDED.keys() - list_columns(connection, "judgments"))


def list_columns(connection: sqlite3.Connection, table: str) -> set[str]:
    """Names of a table's columns; none of a table that is not there."""
    return {name for (name,) in connection.execute("SELECT name FROM pragma_table_info(?)", (table,))}


def select_tokens(column: str, where: str = "") -> str:
    """The tokens of the rows of every table that has the column."""
    tables = [flat.table for flat in FLAT.values() if column in flat.columns]
    return " UNION ALL ".join(f"SELECT prompt_tokens AS p, completion_tokens AS c FROM {t} {where}" for t in tables)  # noqa: S608


def encode_key(key: str) -> bytes | str:
    """A hash as its bytes; any other text as it is."""
    return bytes.fromhex(key) if _HASH.fullmatch(key) else key


def decode_key(key: bytes | str) -> str:
    """The key that was encoded."""
    return key.hex() if isinstance(key, bytes) else key


def encode_member(response: Response) -> dict[str, Any]:
    """What a response says beside its row."""
    fields = response.model_dump(exclude=_SHARED, exclude_defaults=True)
    for part in _PARTS:
        words = fields.get(part)
        if words is not None and response.text is not None and (at := response.text.find(words)) >= 0:
            fields[part] = [at, len(words)]
    return fields


def decode_member(member: dict[str, Any]) -> dict[str, Any]:
    """The fields of a response beside those that its row tells."""
    for part in _PARTS:
        if isinstance(place := member.get(part), list):
            at, length = place
            member = member | {part: member["text"][at : at + length]}
    return member


def encode_flat(record: Judgment | Reply | ImageGain | OptionScores) -> tuple[Any, ...]:
    """The values of its row, in the order of its columns."""
    fields, usage = record.model_dump(), record.usage
    fields |= {name: encode_key(fields[name]) for name in _HASHES & fields.keys()}
    fields["prompt_tokens"] = usage.prompt_tokens if usage else None
    fields["completion_tokens"] = usage.completion_tokens if usage else None
    fields |= {name: json.dumps(fields[name]) for name in _LISTS & fields.keys()}
    return tuple(fields[name] for name in FLAT[type(record)].columns)


def decode_flat(flat: Flat, row: Sequence[Any]) -> dict[str, Any]:
    """The fields of the record in a row."""
    fields = dict(zip(flat.columns, row, strict=True))
    prompt_tokens, completion_tokens = fields.pop("prompt_tokens"), fields.pop("completion_tokens")
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    fields |= {name: decode_key(fields[name]) for name in _HASHES & fields.keys()}
    fields |= {name: json.loads(fields[name]) for name in _LISTS & fields.keys()}
    return fields | {"refused": bool(fields["refused"]), "usage": usage if prompt_tokens is not None else None}
