"""`vcot export`: every chain of a run, with its score and rationale, as files for other programs."""

from __future__ import annotations

from pathlib import Path

from vcot.pipeline.errors import OwedError
from vcot.pipeline.report import Said, Warned
from vcot.services.run.exporting import Format, write_table
from vcot.services.run.frames import LoadedRun
from vcot.services.run.session import Session


async def export(session: Session, out: Path, kind: Format) -> None:
    """Write what there is; what is not made yet is said. Raises InputError where the folder cannot be written."""
    for rows in LoadedRun(session).tables:
        try:
            path, num_rows = write_table(rows, out, kind)
        except OwedError as error:
            session.report(Warned(f"no {rows.name}: {error}"))
            continue
        session.report(Said(f"{num_rows:,} {rows.name} in {path}"))
