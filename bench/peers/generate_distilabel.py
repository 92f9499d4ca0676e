"""distilabel's way: its task for questions with an image, on an OpenAI-compatible server; its cache on, as it is by default.

    python generate_distilabel.py SETTINGS.json        (bench/peers/generation.py writes it)

The image goes as a data URL (`image_type="url"`): `"base64"` and `"PIL"` would call every image a JPEG. A batch's requests
go out together and the next batch follows when all are answered, so the batch's size is the concurrency.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import TextGenerationWithImage


def main(settings: dict[str, Any]) -> None:
    tasks = [json.loads(line) for line in Path(settings["tasks"]).read_text().splitlines()]
    out = Path(settings["out"])
    with Pipeline(name="peers", cache_dir=out / "cache") as pipeline:
        load = LoadDataFromDicts(
            data=[{"id": task["id"], "instruction": task["prompt"], "image": task["image"]} for task in tasks],
            batch_size=settings["concurrency"],
        )
        generate = TextGenerationWithImage(
            name="generate",
            llm=OpenAILLM(
                model=settings["model"],
                base_url=settings["base_url"],
                api_key="none",
                generation_kwargs={"temperature": settings["temperature"], "max_new_tokens": settings["max_tokens"]},
            ),
            image_type="url",
            num_generations=settings["k"],
            group_generations=True,
            input_batch_size=settings["concurrency"],
        )
        load >> generate
    distiset = pipeline.run()
    distiset["default"]["train"].to_parquet(out / "responses.parquet")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
