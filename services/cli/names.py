"""The vcot command. Only names and help live here: a command's work is imported when it runs, so that help is instant."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import App, Group, Parameter

from vcot.services.cli.command_examples import EXAMPLES, show_example
from vcot.services.cli.families import TOOLS, checkpoints, nano, push, replicas
from vcot.services.cli.flags import Audit, Bundle, CardJson, Flag, Json, MaxCost, NumBundled, Tables, Wandb
from vcot.services.cli.target import DEFAULT, HERE, Asking, Target, as_cap, as_source, as_tracker
from vcot.services.cli.tools import doctor, export, probe, recipe, score

_STEPS = Group("The steps of a run", sort_key=1)
_RUNS = Group("Whole runs", sort_key=0)
_SERVICES = Group("Servers of their own, as compose.yaml starts them", sort_key=2)


def _version() -> str:
    from importlib import metadata  # 15 ms, and for this only

    return metadata.version("vcot")


app = App(
    name="vcot",
    help="Teach a small vision-language model to reason better from AI feedback, and measure whether it worked.",
    version=_version,
    version_flags=["--version"],
    result_action="return_value",
    help_format="plaintext",  # a renderer of Markdown takes a fifth of help's time to import
    suppress_keyboard_interrupt=False,  # it would end without a word
)
for family in (nano, checkpoints, push, replicas):
    app.command(family)
for tool in (doctor, export, probe, recipe, score):
    app.command(tool, group=TOOLS)
app.register_install_completion_command(help="Complete commands and options in this shell (bash, zsh, fish).")


@app.command(group=_RUNS)
def demo(target: Target = DEFAULT, *, json: Json = False) -> None:
    """Run the whole mission in miniature on two CPU cores, with real parts, and print the table."""
    run(target, json=json)


@app.command(name="run", group=_RUNS)
def run(
    target: Target = DEFAULT,
    *,
    asking: Asking = HERE,
    dry_run: Flag = False,
    wandb: Wandb = False,
    max_cost: MaxCost = None,
    json: Json = False,
) -> None:
    """Run every step: sample, judge, pair, train, merge, evaluate, swap, report. What is done is not done again.

    Parameters
    ----------
    dry_run
        Only say what the run would do: steps, requests, tokens, time and cost, and what of it is done already.

    """
    from vcot.services.cli import commands, opening

    overrides = (*as_tracker(wandb), *as_cap(max_cost))
    if dry_run:
        from vcot.services.cli import dry_run as planning

        planning.show_run_plan(target, overrides, as_json=json)
        return
    opening.execute("run", target, commands.run_all, overrides, as_json=json, asking=asking)


@app.command(group=_RUNS)
def rounds(target: Target = DEFAULT, *, num: int | None = None, json: Json = False) -> None:
    """Run the loop several times: each round on fresh tasks, from the last one's policy. The same as run, with a number.

    Parameters
    ----------
    num
        How many rounds in all (short for --set rounds.num=...).

    """
    from vcot.services.cli import commands, opening

    overrides = () if num is None else (f"rounds.num={num}",)
    opening.execute("rounds", target, commands.run_all, overrides, as_json=json)


@app.command(group=_STEPS, sort_key=0)
def serve(target: Target = DEFAULT) -> None:
    """Serve the run's model behind one OpenAI-compatible URL, until Ctrl-C."""
    from vcot.services.cli import server_commands

    server_commands.serve(target)


@app.command(group=_SERVICES)
def prepare(target: Target = DEFAULT) -> None:
    """Begin a run and fetch its model, with what identifies its answers: what its servers start from."""
    from vcot.services.cli import server_commands

    server_commands.prepare(target)


@app.command(group=_SERVICES)
def engine(
    *,
    run: Annotated[Path | None, Parameter(alias="-r")] = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    number: int = 0,
) -> None:
    """Serve the run's model by vLLM alone, for a gateway elsewhere (serve.upstreams).

    Whoever reaches the port may do anything with the server: keep it on a network of the gateway's own.

    Parameters
    ----------
    run
        Run directory (default: runs/nano), prepared by `vcot prepare`; it is only read.
    host
        Where it listens.
    port
        Its port.
    number
        Which of several it is, from 0: it takes the GPUs of that place in serve.devices.

    """
    from vcot.services.cli import server_commands

    server_commands.engine(run, host, port, number)


@app.command(group=_SERVICES)
def worker(runs: Path = Path("runs")) -> None:
    """Do the training jobs of runs with train.worker = remote, and help with those on several machines.

    Goes on until Ctrl-C.

    Parameters
    ----------
    runs
        The folder that holds the runs' directories.

    """
    from vcot.services.cli import server_commands

    server_commands.work(runs)


@app.command(group=_STEPS, sort_key=1)
def sample(
    target: Target = DEFAULT, *, asking: Asking = HERE, source: str | None = None, path: Path | None = None
) -> None:
    """Draw k responses per task.

    Parameters
    ----------
    source
        Where the questions come from: nano, aokvqa, aokvqa_da, scienceqa, scienceqa_all, visual_genome, unusual, absent,
        table, mix, or one of your own as module:object (short for --set tasks.source=...).
    path
        The data set's official files, or your table (short for --set tasks.path=...).

    """
    from vcot.services.cli import opening
    from vcot.services.run import steps

    step = opening.on_last_round(steps.sample_stage)
    opening.execute("sample", target, step, as_source(source, path), asking=asking)


@app.command(group=_STEPS, sort_key=2)
def judge(
    target: Target = DEFAULT,
    *,
    asking: Asking = HERE,
    audit: Audit = False,
    max_cost: MaxCost = None,
    json: CardJson = False,
) -> None:
    """Score every response, or find out first whether the judge can be trusted."""
    from vcot.services.cli import commands, opening
    from vcot.services.run import steps

    step = commands.audit if audit else steps.judge_stage
    opening.execute("judge", target, opening.on_last_round(step), as_cap(max_cost), as_json=json, asking=asking)


@app.command(group=_STEPS, sort_key=3)
def pair(target: Target = DEFAULT, *, preview: Flag = False, json: Json = False) -> None:
    """Make preference pairs of the responses, as a Parquet data set.

    Parameters
    ----------
    preview
        Show what every pair policy would make of them, with ten pairs of the recipe's; nothing is written.

    """
    from vcot.services.cli import opening, pair_commands
    from vcot.services.run import steps

    if preview or json:
        opening.execute("pair --preview", target, pair_commands.preview, as_json=json)
    else:
        opening.execute("pair", target, opening.on_last_round(steps.pair_stage))


@app.command(group=_STEPS, sort_key=4)
def train(target: Target = DEFAULT, *, wandb: Wandb = False) -> None:
    """Train the policy on the pairs, in a process of its own."""
    from vcot.services.cli import commands, opening

    opening.execute("train", target, commands.train, as_tracker(wandb))


@app.command(group=_RUNS)
def sweep(target: Target = DEFAULT, *, json: Json = False) -> None:
    """Search for training settings on a part of the pairs (recipe section sweep), and print the chosen ones as flags."""
    from vcot.services.cli import commands, opening

    opening.execute("sweep", target, commands.sweep, as_json=json)


@app.command(group=_STEPS, sort_key=5)
def merge(target: Target = DEFAULT, *, adapter: bool = False) -> None:
    """Merge the trained adapter into a servable checkpoint with manifest and canary.

    Parameters
    ----------
    adapter
        Write the adapter alone instead, under the names that vLLM's LoRA loader takes.

    """
    from vcot.services.cli import commands, opening

    opening.execute("merge", target, lambda session: commands.merge(session, adapter=adapter))


@app.command(group=_STEPS, sort_key=6)
def parity(*checkpoints: str, target: Target = DEFAULT, json: Json = False) -> None:
    """See that vLLM answers as the policy that was trained, and not as its base; else roll back.

    Parameters
    ----------
    checkpoints
        Names of registered checkpoints (default: the recipe's policy).

    """
    from vcot.services.cli import commands, opening

    opening.execute("parity", target, lambda session: commands.parity(session, checkpoints), as_json=json)


@app.command(group=_STEPS, sort_key=7)
def swap(alias: str, checkpoint: str, *, target: Target = DEFAULT) -> None:
    """Make a checkpoint live behind the running gateway, verified, without a restart.

    Parameters
    ----------
    alias
        The name that clients ask for, for example policy.
    checkpoint
        The name of a registered checkpoint, for example base.

    """
    from vcot.services.cli import gateway_commands, opening

    opening.execute("swap", target, lambda session: gateway_commands.swap(session, alias, checkpoint))


@app.command(name="eval", group=_STEPS, sort_key=8)
def evaluate(
    *checkpoints: str,
    target: Target = DEFAULT,
    asking: Asking = HERE,
    plan: Flag = False,
    tables: Tables = None,
    json: Json = False,
) -> None:
    """Evaluate checkpoints, each prompt at each temperature, and print the table.

    Parameters
    ----------
    checkpoints
        Names of registered checkpoints (default: the base and the recipe's policy, if it is trained).
    plan
        Only say what it will take (requests, tokens, time, cost) and the smallest difference that it could see.

    """
    from vcot.services.cli import commands, eval_commands, opening

    if plan:
        eval_commands.plan(target, checkpoints, as_json=json)
        return
    step = partial(commands.evaluate, names=checkpoints, tables=tables)
    opening.execute("eval", target, step, as_json=json, asking=asking)


@app.command(group=_STEPS, sort_key=9)
def report(target: Target = DEFAULT, *, tables: Tables = None, json: Json = False) -> None:
    """Write the report page and print the table."""
    from vcot.services.cli import commands, opening

    opening.execute("report", target, lambda session: commands.report(session, tables), as_json=json)


@app.command(group=_RUNS)
def status(target: Target = DEFAULT, *, json: Json = False) -> None:
    """Say how far a run is, what it took, and which command works on it; works beside that command, and only reads."""
    from vcot.services.cli import status_command

    status_command.show(target, as_json=json)


@app.command(group=_RUNS)
def view(*runs: Path, port: int = 0, bundle: Bundle = None, tasks: NumBundled = None) -> None:
    """Show runs in a browser, as they go on: how far they are, what came of them, and every task with all its chains.

    Parameters
    ----------
    runs
        Run directories (default: runs/nano).
    port
        Where it answers, on this machine only (default: any that is free).

    """
    from vcot.services.cli import view_command

    view_command.view(runs, port, bundle, tasks)


for path, lines in EXAMPLES.items():
    show_example(app, path, lines)
