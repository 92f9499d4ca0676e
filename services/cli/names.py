"""The vcot command. Only names and help live here: a command's work is imported when it runs, so that help is instant."""

from __future__ import annotations

import errno
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Group, Parameter

from pipeline.printable import printable
from services.cli.stop import SAID, Terminated, ignore_signals, stop_in_order

_STEPS = Group("The steps of a run", sort_key=1)
_RUNS = Group("Whole runs", sort_key=0)
_SERVICES = Group("Servers of their own, as compose.yaml starts them", sort_key=2)
_TOOLS = Group("Tools", sort_key=3)

app = App(
    name="vcot",
    help="Teach a small vision-language model to reason better from AI feedback, and measure whether it worked.",
    version=lambda: metadata.version("vcot"),
    version_flags=["--version"],
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # it would end without a word
)
nano = App(name="nano", help="The embedded nano models.", group=_TOOLS)
app.command(nano)
checkpoints = App(name="checkpoints", help="The run's registered checkpoints (alone: list them).", group=_TOOLS)
app.command(checkpoints)
push = App(name="push", help="Send the run's pairs, or a registered checkpoint, to the Hugging Face hub.", group=_TOOLS)
app.command(push)
replicas = App(name="replicas", help="The servers behind the running gateway (alone: list them).", group=_TOOLS)
app.command(replicas)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Target:
    """Which run a command works on."""

    run: Annotated[Path | None, Parameter(alias="-r")] = None
    """Run directory (default: runs/RECIPE); all a run makes is in it."""
    recipe: str | None = None
    """A bundled recipe (nano, nano-qwen, paper) or a .toml file; needed only to begin a run."""
    set: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=(), show_default=False)] = ()
    """Override fields, as section.field=value, for this command; kept where it begins the run. `vcot recipe` lists them."""
    save: Annotated[bool, Parameter(negative=())] = False
    """Keep what flags override in the run's recipe.toml, for the commands that follow."""


_DEFAULT = Target()
Wandb = Annotated[
    bool,
    Parameter(
        negative=(), help="Send the training's curves to Weights & Biases (short for --set train.report_to=...)."
    ),
]


@app.command(group=_RUNS)
def demo(target: Target = _DEFAULT) -> None:
    """Run the whole mission in miniature on two CPU cores, with real parts, and print the table."""
    run(target)


@app.command(name="run", group=_RUNS)
def run(target: Target = _DEFAULT, *, wandb: Wandb = False) -> None:
    """Run every step: sample, judge, pair, train, merge, evaluate, swap, report. What is done is not done again."""
    from services.cli import commands

    commands.execute("run", target, commands.run_all, commands.as_tracker(wandb))


@app.command(group=_RUNS)
def rounds(target: Target = _DEFAULT, *, num: int | None = None) -> None:
    """Run the loop several times: each round on fresh tasks, from the last one's policy. The same as run, with a number.

    Parameters
    ----------
    num
        How many rounds in all (short for --set rounds.num=...).

    """
    from services.cli import commands

    overrides = () if num is None else (f"rounds.num={num}",)
    commands.execute("rounds", target, commands.run_all, overrides)


@app.command(group=_STEPS, sort_key=0)
def serve(target: Target = _DEFAULT) -> None:
    """Serve the run's model behind one OpenAI-compatible URL, until Ctrl-C."""
    from services.cli import commands

    commands.serve(target)


@app.command(group=_SERVICES)
def prepare(target: Target = _DEFAULT) -> None:
    """Begin a run and fetch its model, with what identifies its answers: what its servers start from."""
    from services.cli import commands

    commands.prepare(target)


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
    from services.cli import commands

    commands.engine(run, host, port, number)


@app.command(group=_SERVICES)
def worker(runs: Path = Path("runs")) -> None:
    """Do the training jobs of runs with train.worker = remote, one by one, until Ctrl-C.

    Parameters
    ----------
    runs
        The folder that holds the runs' directories.

    """
    from services.cli import commands

    commands.work(runs)


@app.command(group=_STEPS, sort_key=1)
def sample(target: Target = _DEFAULT, *, source: str | None = None, path: Path | None = None) -> None:
    """Draw k responses per task.

    Parameters
    ----------
    source
        Where the questions come from: nano, aokvqa or scienceqa (short for --set tasks.source=...).
    path
        The data set's official on-disk layout (short for --set tasks.path=...).

    """
    from services.cli import commands

    commands.execute("sample", target, commands.sample, commands.as_source(source, path))


@app.command(group=_STEPS, sort_key=2)
def judge(target: Target = _DEFAULT) -> None:
    """Score every response."""
    from services.cli import commands

    commands.execute("judge", target, commands.judge)


@app.command(group=_STEPS, sort_key=3)
def pair(target: Target = _DEFAULT) -> None:
    """Make preference pairs of best and worst responses, as a Parquet data set."""
    from services.cli import commands

    commands.execute("pair", target, commands.pair)


@app.command(group=_STEPS, sort_key=4)
def train(target: Target = _DEFAULT, *, wandb: Wandb = False) -> None:
    """Train the policy on the pairs, in a process of its own."""
    from services.cli import commands

    commands.execute("train", target, commands.train, commands.as_tracker(wandb))


@app.command(group=_RUNS)
def sweep(target: Target = _DEFAULT) -> None:
    """Search for training settings on a part of the pairs (recipe section sweep), and print the chosen ones as flags."""
    from services.cli import commands

    commands.execute("sweep", target, commands.sweep)


@app.command(group=_STEPS, sort_key=5)
def merge(target: Target = _DEFAULT, *, adapter: bool = False) -> None:
    """Merge the trained adapter into a servable checkpoint with manifest and canary.

    Parameters
    ----------
    adapter
        Write the adapter alone instead, under the names that vLLM's LoRA loader takes.

    """
    from services.cli import commands

    commands.execute("merge", target, lambda session: commands.merge(session, adapter=adapter))


@app.command(group=_STEPS, sort_key=6)
def parity(*checkpoints: str, target: Target = _DEFAULT) -> None:
    """See that vLLM answers as the policy that was trained, and not as its base; else roll back.

    Parameters
    ----------
    checkpoints
        Names of registered checkpoints (default: the recipe's policy).

    """
    from services.cli import commands

    commands.execute("parity", target, lambda session: commands.parity(session, checkpoints))


@app.command(group=_STEPS, sort_key=7)
def swap(alias: str, checkpoint: str, *, target: Target = _DEFAULT) -> None:
    """Make a checkpoint live behind the running gateway, verified, without a restart.

    Parameters
    ----------
    alias
        The name that clients ask for, for example policy.
    checkpoint
        The name of a registered checkpoint, for example base.

    """
    from services.cli import commands

    commands.execute("swap", target, lambda session: commands.swap(session, alias, checkpoint))


@app.command(name="eval", group=_STEPS, sort_key=8)
def evaluate(*checkpoints: str, target: Target = _DEFAULT) -> None:
    """Evaluate checkpoints, each prompt at each temperature, and print the table.

    Parameters
    ----------
    checkpoints
        Names of registered checkpoints (default: the base and the recipe's policy, if it is trained).

    """
    from services.cli import commands

    commands.execute("eval", target, lambda session: commands.evaluate(session, checkpoints))


@app.command(group=_TOOLS)
def probe(*checkpoints: str, target: Target = _DEFAULT) -> None:
    """Ask about drawings of unusual things, such as a green stop sign: whether a model says what it sees or what it expects.

    Parameters
    ----------
    checkpoints
        Names of registered checkpoints (default: the base and the recipe's policy, if it is trained).

    """
    from services.cli import commands

    commands.execute("probe", target, lambda session: commands.probe(session, checkpoints))


@app.command(group=_STEPS, sort_key=9)
def report(target: Target = _DEFAULT) -> None:
    """Write the report page and print the table."""
    from services.cli import commands

    commands.execute("report", target, commands.report)


@app.command(group=_TOOLS)
def doctor(target: Target = _DEFAULT) -> None:
    """Say what this machine can run, and what is missing for a recipe."""
    from services.cli import commands

    if not commands.doctor(target):
        sys.exit(2)


@app.command(group=_TOOLS)
def recipe(name: str = "nano", *, set: tuple[str, ...] = ()) -> None:  # noqa: A002 - the flag's name
    """Print a recipe with every field's documentation.

    Parameters
    ----------
    name
        A bundled recipe or a .toml file.
    set
        Overrides, as section.field=value.

    """
    from pipeline.recipe import load_recipe, render_recipe

    sys.stdout.write(render_recipe(load_recipe(name, set)))


@checkpoints.default
@checkpoints.command(name="list")
def list_checkpoints(target: Target = _DEFAULT) -> None:
    """List the run's registered checkpoints."""
    from services.cli import commands

    commands.execute("checkpoints list", target, commands.checkpoints)


@checkpoints.command(name="show")
def show_checkpoint(name: str, *, target: Target = _DEFAULT) -> None:
    """Say what a checkpoint is, and what it is used for.

    Parameters
    ----------
    name
        Its name, or an alias.

    """
    from services.cli import commands

    commands.execute("checkpoints show", target, lambda session: commands.show_checkpoint(session, name))


@checkpoints.command(name="add")
def add_checkpoint(directory: Path, *, target: Target = _DEFAULT) -> None:
    """Verify and register a checkpoint, so that it can be swapped in.

    Parameters
    ----------
    directory
        Holds weights and their manifest, checkpoint.json.

    """
    from services.cli import commands

    commands.execute("checkpoints add", target, lambda session: commands.add_checkpoint(session, directory))


@checkpoints.command(name="retire")
def retire_checkpoint(name: str, *, target: Target = _DEFAULT) -> None:
    """Forget a checkpoint; its files stay. The live one, and any that an alias means, is refused.

    Parameters
    ----------
    name
        Its name.

    """
    from services.cli import commands

    commands.execute("checkpoints retire", target, lambda session: commands.retire_checkpoint(session, name))


@replicas.default
@replicas.command(name="list")
def list_replicas(target: Target = _DEFAULT) -> None:
    """List the servers behind the running gateway."""
    from services.cli import commands

    commands.execute("replicas list", target, commands.replicas)


@replicas.command(name="add")
def add_replica(url: str | None = None, *, target: Target = _DEFAULT) -> None:
    """Start one more server behind the running gateway, or use one that runs already.

    Parameters
    ----------
    url
        Of a vLLM server that runs already, as http://host:port.

    """
    from services.cli import commands

    commands.execute("replicas add", target, lambda session: commands.add_replica(session, url))


@replicas.command(name="remove")
def remove_replica(name: str, *, target: Target = _DEFAULT) -> None:
    """Let a server's requests end, then take it away; the last one that serves is refused.

    Parameters
    ----------
    name
        As `vcot replicas` lists it.

    """
    from services.cli import commands

    commands.execute("replicas remove", target, lambda session: commands.remove_replica(session, name))


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
def push_pairs(repo: str, *, sending: Sending = _SENDING, target: Target = _DEFAULT) -> None:
    """Send the preference pairs as a data set with its card. The token comes from HF_TOKEN.

    Parameters
    ----------
    repo
        Where it goes, as USER/NAME; it is made if it does not exist.

    """
    from services.checkpoints.push import Place
    from services.cli import commands

    place = Place(repo, sending.revision, sending.public)
    commands.execute("push pairs", target, lambda s: commands.push_pairs(s, place, dry_run=sending.dry_run))


@push.command(name="checkpoint")
def push_checkpoint(
    repo: str, checkpoint: str | None = None, *, sending: Sending = _SENDING, target: Target = _DEFAULT
) -> None:
    """Send a registered checkpoint, merged or an adapter, with its card. The token comes from HF_TOKEN.

    Parameters
    ----------
    repo
        Where it goes, as USER/NAME; it is made if it does not exist.
    checkpoint
        Its name (default: the recipe's policy).

    """
    from services.checkpoints.push import Place
    from services.cli import commands

    place = Place(repo, sending.revision, sending.public)
    commands.execute(
        "push checkpoint", target, lambda s: commands.push_checkpoint(s, place, checkpoint, dry_run=sending.dry_run)
    )


@nano.command
def build(out: Path = Path("runs/nano-checkpoint"), *, architecture: str = "llava") -> None:
    """Build a nano model from scratch; the same command resumes.

    Parameters
    ----------
    out
        Where the checkpoint goes.
    architecture
        `llava` (LLaVA-1.5's classes) or `qwen` (Qwen3-VL's).

    """
    from services.cli import commands

    commands.build_nano(out, architecture)


def main() -> None:
    """The entry point: one sentence and an exit code for whatever goes wrong."""
    stop_in_order()
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=True)
    except CycloptsError:
        sys.exit(2)
    except KeyboardInterrupt as stop:
        ignore_signals()
        _say(SAID)
        sys.exit(143 if isinstance(stop, Terminated) else 130)
    except OSError as error:
        if (said := _explain(error)) is None:
            raise
        _say(f"{said}, and the same command goes on where it was")
        sys.exit(1)
    except Exception as error:
        from pipeline.errors import VcotError

        if not isinstance(error, VcotError):
            raise
        _say(str(error))
        sys.exit(error.exit_code)


def _explain(error: OSError) -> str | None:
    """What its owner can do about a file or disk that cannot be used; None for what is no fault of a file."""
    where = f" at {error.filename}" if error.filename else ""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"the disk is full{where}; make room"
        case errno.EFBIG:
            return f"a file would be larger than is allowed here{where}; raise the limit (`ulimit -f`)"
        case errno.EMFILE | errno.ENFILE:
            return f"too many files are open{where}; raise the limit (`ulimit -n`)"
        case errno.EIO:
            return f"the disk cannot be read or written{where}; see to it"
    if not error.filename:
        return None
    return f"{error.filename} cannot be used ({error.strerror}); see that it is there and may be read and written"


def _say(text: str) -> None:
    sys.stderr.write(f"vcot: {printable(text)}\n")
