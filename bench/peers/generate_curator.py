"""curator's way: an `LLM` whose prompt is a text with an image, on an OpenAI-compatible server; its cache stays in the run.

    python generate_curator.py SETTINGS.json        (bench/peers/generation.py writes it)

The image goes as a data URL (`curator.types.Image(url=...)`). The backend is `openai`, since curator's `litellm`, which its
page on vLLM names, takes images only for models that LiteLLM knows to see. Of n answers curator keeps the first, unless
`return_completions_object` hands `parse` the whole completion, which is done here. Its limits by the minute are lifted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bespokelabs import curator


class Sampler(curator.LLM):  # type: ignore[misc]
    return_completions_object = True

    def prompt(self, input: dict[str, Any]) -> tuple[str, Any]:  # noqa: A002
        return input["prompt"], curator.types.Image(url=input["image"])

    def parse(self, input: dict[str, Any], response: dict[str, Any]) -> dict[str, Any]:  # noqa: A002
        return {"id": input["id"], "responses": [choice["message"]["content"] for choice in response["choices"]]}


def main(settings: dict[str, Any]) -> None:
    tasks = [json.loads(line) for line in Path(settings["tasks"]).read_text().splitlines()]
    out = Path(settings["out"])
    sampler = Sampler(
        model_name=settings["model"],
        backend="openai",
        generation_params={
            "n": settings["k"],
            "temperature": settings["temperature"],
            "max_tokens": settings["max_tokens"],
        },
        backend_params={
            "base_url": settings["base_url"],
            "api_key": "none",
            "max_concurrent_requests": settings["concurrency"],
            "max_requests_per_minute": 1_000_000,
            "max_tokens_per_minute": 1_000_000_000,
        },
    )
    sampler(tasks, working_dir=str(out / "cache")).dataset.to_parquet(out / "responses.parquet")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
