"""Three ways to put the same questions to one server and score the answers: how each is started."""

from __future__ import annotations

import sys
from pathlib import Path

from bench.peers.ways import HERE, Command, Settings

_LMMS_TASK = """\
task: questions
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tasks}}}
test_split: test
output_type: generate_until
doc_to_visual: !function {code}.read_image
doc_to_text: prompt
doc_to_target: target
generation_kwargs: {{max_new_tokens: {max_tokens}, temperature: {temperature}, do_sample: false}}
process_results: !function {code}.score
metric_list:
  - {{metric: accuracy, aggregation: mean, higher_is_better: true}}
"""
"""A task of lmms-eval: questions_lmms.py, which it looks for beside this file, reads its rows."""


def evaluate_vcot(settings: Settings) -> list[str]:
    """`vcot eval` of the base, which draws the questions that the file holds."""
    num_questions = len(settings.tasks.read_bytes().splitlines())
    chosen = {
        "serve.url": settings.base_url.removesuffix("/v1"),
        "eval.num_tasks": num_questions,
        "eval.prompts": f'["{PROMPT}"]',
        "eval.temperatures": f"[{settings.temperature}]",
        "eval.max_tokens": settings.max_tokens,
        "eval.max_concurrency": settings.concurrency,
    }
    flags = [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]
    command = [str(Path(sys.executable).parent / "vcot"), "eval", "base", "--run", str(settings.out / "run")]
    return [*command, "--recipe", "nano", *flags]


def evaluate_inspect(settings: Settings) -> list[str]:
    """`inspect eval` of questions_inspect.py."""
    asked: dict[str, object] = {"max-connections": settings.concurrency, "max-tokens": settings.max_tokens}
    asked |= {"temperature": settings.temperature, "model-base-url": settings.base_url}
    return [
        *("env", f"--chdir={HERE}", "VCOT_API_KEY=none"),  # it takes no task file by its whole path
        *(str(HERE / ".venv-inspect/bin/inspect"), "eval", "questions_inspect.py"),
        *("-T", f"data={settings.tasks}", "--model", f"openai-api/vcot/{settings.model}"),
        *("--display", "plain", "--log-dir", str(settings.out / "log")),
        *(word for name, value in asked.items() for word in (f"--{name}", str(value))),
    ]


def evaluate_lmms(settings: Settings) -> list[str]:
    """lmms-eval's `async_openai` model."""
    folder = settings.out / "tasks"
    folder.mkdir(exist_ok=True)
    code = (HERE / "questions_lmms.py").read_bytes()
    (folder / "questions_lmms.py").write_bytes(code)
    task = _LMMS_TASK.format(code="questions_lmms", **settings.model_dump())
    (folder / "questions.yaml").write_text(task)
    asked = {"model_version": settings.model, "base_url": settings.base_url, "api_key": "none"}
    asked |= {"num_cpus": str(settings.concurrency)}  # its name for how many requests are in flight
    return [
        *(str(HERE / ".venv-lmms/bin/python"), "-m", "lmms_eval", "eval", "--model", "async_openai"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in asked.items())),
        *("--tasks", "questions", "--include_path", str(folder), "--output_path", str(settings.out / "log")),
        "--log_samples",
    ]


PROMPT = "zero_shot"
HARNESSES: dict[str, Command] = {
    "vcot": evaluate_vcot,
    "inspect": evaluate_inspect,
    "lmms": evaluate_lmms,
}
