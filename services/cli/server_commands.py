"""What the commands do that serve until a signal, and the one that readies their model."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NoReturn

from vcot.pipeline.errors import CheckpointError
from vcot.services.checkpoints.registry import Registry
from vcot.services.cli.opening import open_target, showing_logs_of
from vcot.services.cli.stop import Terminated, cancel_at_sigterm
from vcot.services.cli.target import Target, run_directory
from vcot.services.cli.terminal import Terminal
from vcot.services.engine.command import Address
from vcot.services.engine.vllm import become_server
from vcot.services.jobs import submitted
from vcot.services.run import serving
from vcot.services.run.directory import open_run


def prepare(target: Target) -> None:
    """`vcot prepare`: what servers of the run start from."""
    terminal = Terminal(quiet=target.quiet)
    with open_target("prepare", target, terminal) as run:
        terminal.heading("prepare", run.recipe.model.source)
        base = Registry(run.directory).base(run.recipe.model, terminal.say)
        terminal.say(f"{base.ref.name} is {base.ref.digest[:19]}, in {base.directory}")


def engine(directory: Path | None, host: str, port: int, number: int) -> NoReturn:
    """`vcot engine`: this process becomes vLLM, on the devices of the `number`-th server. The run is only read."""
    with open_run(run_directory(directory, None), access="read") as run:
        base = Registry(run.directory).find(run.recipe.model.name)
        if base is None:
            raise CheckpointError(f"run {run.directory} does not hold its model yet; run `vcot prepare` first")
        become_server(
            base,
            run.recipe.serve,
            Address(host, port),
            devices=run.recipe.serve.devices_of(number),
            max_lora_rank=serving.served_lora_rank(run.recipe),
        )


def work(runs: Path) -> None:
    """`vcot worker`: until a signal."""
    try:
        asyncio.run(_work(runs, Terminal()))
    except asyncio.CancelledError:
        raise Terminated from None


async def _work(runs: Path, terminal: Terminal) -> None:
    cancel_at_sigterm()
    await submitted.work(runs, terminal.say)


def serve(target: Target) -> None:
    """Serve the run until a signal."""
    terminal = Terminal(quiet=target.quiet)
    with open_target("serve", target, terminal) as run, showing_logs_of(run, target, terminal):
        terminal.heading("serve", f"{run.recipe.model.source}, run {run.directory}")
        serving.serve(run, terminal.say)
