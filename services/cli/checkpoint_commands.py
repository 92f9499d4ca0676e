"""What `vcot checkpoints` and `vcot push` do: what the run made is listed, added, forgotten and published."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from vcot.pipeline.errors import InputError, OwedError
from vcot.pipeline.report import Began, Found, Said
from vcot.services.checkpoints.push import Destination, Parcel, pack, push, render_parcel
from vcot.services.cli.terminal import Terminal
from vcot.services.run.parity_gate import parity_stage
from vcot.services.run.rounds import list_rounds
from vcot.services.run.session import Session


async def checkpoints(session: Session) -> None:
    """`vcot checkpoints list`."""
    table = Table("name", "kind", "digest", "aliases", "directory")
    infos = await session.gateway.list()
    for info in infos:
        ref = info.checkpoint
        digest = ref.digest[:19] if Terminal().out.is_terminal else ref.digest
        table.add_row(ref.name, ref.kind, digest, ", ".join(info.aliases), info.directory)
    session.report(Found(table, infos))


async def show_checkpoint(session: Session, name: str) -> None:
    """`vcot checkpoints show`."""
    info = await session.gateway.show(name)
    table = Table(show_header=False)
    table.add_row("name", info.checkpoint.name)
    table.add_row("kind", info.checkpoint.kind)
    table.add_row("digest", info.checkpoint.digest)
    table.add_row("directory", info.directory)
    table.add_row("training job", info.job or "none")
    table.add_row("aliases", ", ".join(info.aliases) or "none")
    table.add_row("live", "yes" if info.is_live else "no")
    table.add_row("canary", "yes" if info.has_canary else "no: a swap to it cannot be verified")
    session.report(Found(table, info))


async def add_checkpoint(session: Session, directory: Path) -> None:
    """`vcot checkpoints add`."""
    checkpoint = session.registry.inspect(directory)
    await parity_stage(session, [checkpoint])
    await session.gateway.register(directory)
    session.report(Said(f"{checkpoint.ref.name} is {checkpoint.ref.digest[:19]}, in {checkpoint.directory}"))


async def retire_checkpoint(session: Session, name: str) -> None:
    """`vcot checkpoints retire`."""
    ref = await session.gateway.retire(name)
    session.report(Said(f"{ref.name} ({ref.digest[:19]}) is retired; its files stay where they are"))


async def push_pairs(session: Session, place: Destination, *, dry_run: bool) -> None:
    """`vcot push pairs`."""
    folder = list_rounds(session)[-1].pairs.directory
    if not folder.is_dir():
        raise OwedError(f"run {session.run.directory} has no pairs yet; run `vcot pair` first")
    _push(session, pack(folder, "dataset", f"Preference pairs of {session.run.recipe.name}"), place, dry_run)


async def push_checkpoint(session: Session, place: Destination, name: str | None, *, dry_run: bool) -> None:
    """`vcot push checkpoint`."""
    trained = [policy.ref.name for current in list_rounds(session) if (policy := current.policy) is not None]
    if name is None and not trained:
        raise InputError(f"run {session.run.directory} has no policy yet; run `vcot run` first, or name a checkpoint")
    checkpoint = session.registry.verify(name or trained[-1])
    if checkpoint.ref.kind == "base":
        raise InputError(
            f"{checkpoint.ref.name} is the base model, which is published already; name a trained checkpoint"
        )
    _push(
        session, pack(checkpoint.directory, "model", f"{checkpoint.ref.name} ({checkpoint.ref.digest})"), place, dry_run
    )


def _push(session: Session, parcel: Parcel, place: Destination, dry_run: bool) -> None:
    session.report(Began("push", f"{parcel.folder} as {parcel.kind} to {place}"))
    session.report(Found(render_parcel(parcel)))
    if dry_run:
        session.report(Said("nothing was sent; without --dry-run it is"))
        return
    session.report(Said(f"sent: {push(parcel, place)}"))
