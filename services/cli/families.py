"""The commands that come in families (`vcot checkpoints list`): their names and help, as in services/cli/names.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Group, Parameter

from vcot.services.cli.flags import Json
from vcot.services.cli.target import DEFAULT, Target

TOOLS = Group("Tools", sort_key=3)

nano = App(name="nano", help="The embedded nano models.", group=TOOLS)
checkpoints = App(name="checkpoints", help="The run's registered checkpoints (alone: list them).", group=TOOLS)
push = App(name="push", help="Send the run's pairs, or a registered checkpoint, to the Hugging Face hub.", group=TOOLS)
replicas = App(name="replicas", help="The servers behind the running gateway (alone: list them).", group=TOOLS)


@checkpoints.default
@checkpoints.command(name="list")
def list_checkpoints(target: Target = DEFAULT, *, json: Json = False) -> None:
    """List the run's registered checkpoints."""
    from vcot.services.cli import checkpoint_commands, opening

    opening.execute("checkpoints list", target, checkpoint_commands.checkpoints, as_json=json)


@checkpoints.command(name="show")
def show_checkpoint(name: str, *, target: Target = DEFAULT, json: Json = False) -> None:
    """Say what a checkpoint is, and what it is used for.

    Parameters
    ----------
    name
        Its name, or an alias.

    """
    from vcot.services.cli import checkpoint_commands, opening

    opening.execute(
        "checkpoints show", target, lambda session: checkpoint_commands.show_checkpoint(session, name), as_json=json
    )


@checkpoints.command(name="add")
def add_checkpoint(directory: Path, *, target: Target = DEFAULT) -> None:
    """Verify and register a checkpoint, so that it can be swapped in.

    Parameters
    ----------
    directory
        Holds weights and their manifest, checkpoint.json.

    """
    from vcot.services.cli import checkpoint_commands, opening

    opening.execute("checkpoints add", target, lambda session: checkpoint_commands.add_checkpoint(session, directory))


@checkpoints.command(name="retire")
def retire_checkpoint(name: str, *, target: Target = DEFAULT) -> None:
    """Forget a checkpoint; its files stay. The live one, and any that an alias means, is refused.

    Parameters
    ----------
    name
        Its name.

    """
    from vcot.services.cli import checkpoint_commands, opening

    opening.execute("checkpoints retire", target, lambda session: checkpoint_commands.retire_checkpoint(session, name))


@replicas.default
@replicas.command(name="list")
def list_replicas(target: Target = DEFAULT, *, json: Json = False) -> None:
    """List the servers behind the running gateway."""
    from vcot.services.cli import gateway_commands, opening

    opening.execute("replicas list", target, gateway_commands.replicas, as_json=json)


@replicas.command(name="add")
def add_replica(url: str | None = None, *, target: Target = DEFAULT) -> None:
    """Start one more server behind the running gateway, or use one that runs already.

    Parameters
    ----------
    url
        Of a vLLM server that runs already, as http://host:port.

    """
    from vcot.services.cli import gateway_commands, opening

    opening.execute("replicas add", target, lambda session: gateway_commands.add_replica(session, url))


@replicas.command(name="remove")
def remove_replica(name: str, *, target: Target = DEFAULT) -> None:
    """Let a server's requests end, then take it away; the last one that serves is refused.

    Parameters
    ----------
    name
        As `vcot replicas` lists it.

    """
    from vcot.services.cli import gateway_commands, opening

    opening.execute("replicas remove", target, lambda session: gateway_commands.remove_replica(session, name))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Sending:
    """How something is sent."""

    revision: str | None = None
    """A branch of the repository (default: main)."""
    public: Annotated[bool, Parameter(negative=())] = False
    """Make it visible to all; else it is private."""
    dry_run: Annotated[bool, Parameter(negative=())] = False
    """Only list what would be sent."""


_SENDING = Sending()


@push.command(name="pairs")
def push_pairs(repo: str, *, sending: Sending = _SENDING, target: Target = DEFAULT) -> None:
    """Send the preference pairs as a data set with its card. The token comes from HF_TOKEN.

    Parameters
    ----------
    repo
        Where it goes, as USER/NAME; it is made if it does not exist.

    """
    from vcot.services.checkpoints.push import Destination
    from vcot.services.cli import checkpoint_commands, opening

    place = Destination(repo, sending.revision, sending.public)
    step = partial(checkpoint_commands.push_pairs, place=place, dry_run=sending.dry_run)
    opening.execute("push pairs", target, step)


@push.command(name="checkpoint")
def push_checkpoint(
    repo: str, checkpoint: str | None = None, *, sending: Sending = _SENDING, target: Target = DEFAULT
) -> None:
    """Send a registered checkpoint, merged or an adapter, with its card. The token comes from HF_TOKEN.

    Parameters
    ----------
    repo
        Where it goes, as USER/NAME; it is made if it does not exist.
    checkpoint
        Its name (default: the recipe's policy).

    """
    from vcot.services.checkpoints.push import Destination
    from vcot.services.cli import checkpoint_commands, opening

    place = Destination(repo, sending.revision, sending.public)
    step = partial(checkpoint_commands.push_checkpoint, place=place, name=checkpoint, dry_run=sending.dry_run)
    opening.execute("push checkpoint", target, step)


@nano.command
def build(out: Path = Path("runs/nano-checkpoint"), *, architecture: Literal["llava", "qwen"] = "llava") -> None:
    """Build a nano model from scratch; the same command resumes.

    Parameters
    ----------
    out
        Where the checkpoint goes.
    architecture
        Whose classes it has: LLaVA-1.5's, or Qwen3-VL's.

    """
    from vcot.services.cli import machine_commands

    machine_commands.build_nano(out, architecture)
