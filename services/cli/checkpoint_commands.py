"""What `vcot checkpoints` and `vcot push` do: what the run made is listed, added, forgotten and published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from pipeline.errors import InputError, OwedError
from pipeline.report import Began, Found, Said
from services.checkpoints.push import Parcel, Place, pack, push, render_parcel
from services.checkpoints.registry import CheckpointInfo
from services.cli.terminal import Terminal
from services.gateway import admin
from services.gateway.admin import register, retire
from services.run.rounds import list_rounds
from services.run.steps import Session, parity_stage


async def checkpoints(session: Session) -> None:
    """`vcot checkpoints list`."""
    table = Table("name", "kind", "digest", "aliases", "directory")
    for info in await _registered(session):
        ref = info.checkpoint
        digest = ref.digest[:19] if Terminal().out.is_terminal else ref.digest
        table.add_row(ref.name, ref.kind, digest, ", ".join(info.aliases), info.directory)
    session.report(Found(table))


async def _registered(session: Session) -> Sequence[CheckpointInfo]:
    """What the recipe's gateway has registered, where it names one; else what the run has."""
    if session.run.recipe.serve.url:
        return await admin.list_checkpoints((await session.gateway()).url)
    return [session.registry.describe(checkpoint.ref.name) for checkpoint in session.registry.list()]


async def show_checkpoint(session: Session, name: str) -> None:
    """`vcot checkpoints show`."""
    if session.run.recipe.serve.url:
        info = await admin.show_checkpoint((await session.gateway()).url, name)
    else:
        info = session.registry.describe(name)
    table = Table(show_header=False)
    table.add_row("name", info.checkpoint.name)
    table.add_row("kind", info.checkpoint.kind)
    table.add_row("digest", info.checkpoint.digest)
    table.add_row("directory", info.directory)
    table.add_row("training job", info.job or "none")
    table.add_row("aliases", ", ".join(info.aliases) or "none")
    table.add_row("live", "yes" if info.is_live else "no")
    table.add_row("canary", "yes" if info.has_canary else "no: a swap to it cannot be verified")
    session.report(Found(table))


async def add_checkpoint(session: Session, directory: Path) -> None:
    """`vcot checkpoints add`."""
    checkpoint = session.registry.inspect(directory)
    await parity_stage(session, [checkpoint])
    if session.run.recipe.serve.url:
        await register((await session.gateway()).url, directory)
    else:
        session.registry.register(directory)
    session.report(Said(f"{checkpoint.ref.name} is {checkpoint.ref.digest[:19]}, in {checkpoint.directory}"))


async def retire_checkpoint(session: Session, name: str) -> None:
    """`vcot checkpoints retire`."""
    url = session.run.recipe.serve.url
    ref = await retire((await session.gateway()).url, name) if url else session.registry.retire(name)
    session.report(Said(f"{ref.name} ({ref.digest[:19]}) is retired; its files stay where they are"))


async def push_pairs(session: Session, place: Place, *, dry_run: bool) -> None:
    """`vcot push pairs`."""
    folder = list_rounds(session)[-1].pairs.directory
    if not folder.is_dir():
        raise OwedError(f"run {session.run.directory} has no pairs yet; run `vcot pair` first")
    _push(session, pack(folder, "dataset", f"Preference pairs of {session.run.recipe.name}"), place, dry_run)


async def push_checkpoint(session: Session, place: Place, name: str | None, *, dry_run: bool) -> None:
    """`vcot push checkpoint`."""
    taught = [policy.ref.name for current in list_rounds(session) if (policy := current.policy) is not None]
    if name is None and not taught:
        raise InputError(f"run {session.run.directory} has no policy yet; run `vcot run` first, or name a checkpoint")
    checkpoint = session.registry.resolve(name or taught[-1])
    if checkpoint.ref.kind == "base":
        raise InputError(
            f"{checkpoint.ref.name} is the untaught model, which is published already; name a trained checkpoint"
        )
    _push(
        session, pack(checkpoint.directory, "model", f"{checkpoint.ref.name} ({checkpoint.ref.digest})"), place, dry_run
    )


def _push(session: Session, parcel: Parcel, place: Place, dry_run: bool) -> None:
    session.report(Began("push", f"{parcel.folder} as {parcel.kind} to {place}"))
    session.report(Found(render_parcel(parcel)))
    if dry_run:
        session.report(Said("nothing was sent; without --dry-run it is"))
        return
    session.report(Said(f"sent: {push(parcel, place)}"))
