"""Four ways to draw k responses to each task from one server: how each is started, and what it leaves on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
import pyarrow.parquet as pq
from pydantic import BaseModel

HERE = Path(__file__).parent


class Settings(BaseModel):
    """What every way is told, as the file that the peers' scripts read."""

    tasks: Path
    """Lines of JSON with `id`, `prompt` and `image`, a data URL."""
    out: Path
    base_url: str
    """Ends with /v1."""
    model: str = "policy"
    k: int = 8
    temperature: float = 0.5
    max_tokens: int = 64
    concurrency: int = 16


Command = Callable[[Settings], list[str]]
"""A command line, from what it is told."""


@dataclass(frozen=True)
class Way:
    """One of them."""

    command: Command
    """The same command begins and goes on."""
    kept: Callable[[Path], int]
    """Of the folder that the way wrote to: responses in its finished data set."""
    left: Callable[[Path], int]
    """Responses on disk at any moment, finished or not, that its own command finds again."""


def run_script(name: str, python: Path | None = None) -> Command:
    """Of generate_<name>.py, by its own environment's interpreter or by `python`."""

    def command(settings: Settings) -> list[str]:
        given = settings.out / "settings.json"
        given.write_text(settings.model_dump_json())
        interpreter = python or HERE / f".venv-{name}" / "bin" / "python"
        return [str(interpreter), str(HERE / f"generate_{name}.py"), str(given)]

    return command


def _sample(settings: Settings) -> list[str]:
    """`vcot sample`, of the nano tasks that the file holds, too."""
    num_tasks = len(settings.tasks.read_text().splitlines())
    chosen = {
        "tasks.num_tasks": num_tasks,
        "serve.url": settings.base_url.removesuffix("/v1"),
        "sample.k": settings.k,
        "sample.temperature": settings.temperature,
        "sample.max_tokens": settings.max_tokens,
        "sample.max_concurrency": settings.concurrency,
    }
    flags = [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]
    return [*_vcot("sample"), "--run", str(settings.out / "run"), "--recipe", "nano", *flags]


def _vcot(name: str) -> list[str]:
    return [str(Path(sys.executable).parent / "vcot"), name]


def _count_vcot(out: Path) -> int:
    """By `vcot status`, whose `ok` is what the ledger holds of what the recipe asks."""
    told = subprocess.run(
        [*_vcot("status"), "--run", str(out / "run"), "--json"], check=True, stdout=subprocess.PIPE
    ).stdout
    return sum(int(stage["ok"]) for stage in orjson.loads(told)["stages"] if stage["stage"] == "sample")


def _read_lines(paths: Sequence[Path]) -> list[dict[str, object]]:
    """Of all whole lines; a torn one is none."""
    return [json.loads(line) for path in paths for line in path.read_bytes().split(b"\n")[:-1]]


def _count(responses: object) -> int:
    assert isinstance(responses, list)
    return sum(isinstance(response, str) for response in responses)


def count_lines(out: Path) -> int:
    """Of the plain loop, at any moment."""
    return sum(_count(row["responses"]) for row in _read_lines([*out.glob("responses.jsonl")]))


def count_table(out: Path, column: str) -> int:
    """Of a finished Parquet file whose column holds a list for each task; 0 without one."""
    path = out / "responses.parquet"
    return sum(map(_count, pq.read_table(path)[column].to_pylist())) if path.exists() else 0


def count_batches(out: Path) -> int:
    """Of distilabel's batches that are written whole, from which it goes on."""
    batches = [orjson.loads(path.read_bytes()) for path in out.glob("cache/*/steps_data/generate_*/batch_*.json")]
    return sum(_count(row["generation"]) for batch in batches for rows in batch["data"] for row in rows)


def count_answers(out: Path) -> int:
    """Of curator's response file."""
    rows = _read_lines([*out.glob("cache/*/responses_*.jsonl")])
    found = [parsed for row in rows for parsed in row["parsed_response_message"] or ()]  # type: ignore[attr-defined]
    return sum(_count(parsed["responses"]) for parsed in found)


WAYS = {
    "vcot": Way(_sample, _count_vcot, _count_vcot),
    "plain": Way(run_script("plain"), count_lines, count_lines),
    "distilabel": Way(run_script("distilabel"), lambda out: count_table(out, "generation"), count_batches),
    "curator": Way(run_script("curator"), lambda out: count_table(out, "responses"), count_answers),
}
