"""An example of each command, shown below its help; a test reads every line as the command line would."""

from __future__ import annotations

from collections.abc import Mapping

from cyclopts import App

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "demo": ("vcot demo", "vcot demo --run runs/hot --set sample.temperature=1.0"),
    "run": (
        "vcot run --recipe paper --max-cost 60",
        "vcot run --recipe mine.toml --dry-run",
        "vcot run --run runs/mine --set train.seed=1",
        "vcot run --engine ray --set serve.ray_address=auto",
    ),
    "rounds": ("vcot rounds --num 3",),
    "status": ("vcot status --run runs/paper",),
    "sweep": ("vcot sweep --set 'sweep.lora_alpha=[128]'",),
    "view": ("vcot view runs/one runs/two", "vcot view runs/nano --bundle pages --tasks 200"),
    "serve": ("vcot serve --recipe nano --set serve.port=0",),
    "sample": (
        "vcot sample --source scienceqa --path /data/ScienceQA",
        "vcot sample --engine ray --shards s3://bucket/mine",
    ),
    "judge": ("vcot judge --audit", "vcot judge --max-cost 5", "vcot judge --engine ray"),
    "pair": ("vcot pair --preview --set pairs.max_per_task=3",),
    "train": ("vcot train --wandb", "vcot train --save --set train.epochs=2"),
    "merge": ("vcot merge",),
    "parity": ("vcot parity",),
    "swap": ("vcot swap policy base",),
    "eval": (
        "vcot eval --plan",
        'vcot eval --set \'eval.images=["true", "blank"]\' --tables tables',
        "vcot eval base --engine ray",
    ),
    "report": ("vcot report --tables tables",),
    "prepare": ("vcot prepare --recipe paper",),
    "engine": ("vcot engine --run runs/paper --port 8000",),
    "worker": ("vcot worker runs",),
    "checkpoints": ("vcot checkpoints --json",),
    "checkpoints list": ("vcot checkpoints list",),
    "checkpoints show": ("vcot checkpoints show policy",),
    "checkpoints add": ("vcot checkpoints add /data/another-policy",),
    "checkpoints retire": ("vcot checkpoints retire dpo-12ebe4527c",),
    "doctor": ("vcot doctor --recipe paper",),
    "export": ("vcot export runs/nano --out tables --format csv",),
    "nano": ("vcot nano build",),
    "nano build": ("vcot nano build runs/nano-qwen --architecture qwen",),
    "probe": ("vcot probe base policy",),
    "push": ("vcot push pairs USER/NAME --dry-run",),
    "push pairs": ("vcot push pairs USER/NAME --dry-run",),
    "push checkpoint": ("vcot push checkpoint USER/NAME --revision v1",),
    "recipe": ("vcot recipe paper > mine.toml",),
    "replicas": ("vcot replicas",),
    "replicas list": ("vcot replicas list",),
    "replicas add": ("vcot replicas add http://10.0.0.2:8000",),
    "replicas remove": ("vcot replicas remove r1",),
    "score": (
        "vcot score answers.jsonl --benchmark scienceqa --rules all",
        "vcot score runs/nano --rules vcot llava --tables tables",
    ),
}


def show_example(app: App, command: str, lines: tuple[str, ...]) -> None:
    """Have a command's help end with its example."""
    for name in command.split():
        app = app[name]
    app.help_epilogue = "\n".join(("For example:", *(f"  {line}" for line in lines)))
