"""The plain way: `openai`'s client, a semaphore, and a line of JSON for each task; what has its line is not asked again.

python generate_plain.py SETTINGS.json        (bench/peers/generation.py writes it)
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI


async def main(settings: dict[str, Any]) -> None:
    tasks = [json.loads(line) for line in Path(settings["tasks"]).read_text().splitlines()]
    out = Path(settings["out"]) / "responses.jsonl"
    done = {json.loads(line)["id"] for line in out.read_text().splitlines()} if out.exists() else set()
    client = AsyncOpenAI(base_url=settings["base_url"], api_key="none")
    semaphore = asyncio.Semaphore(settings["concurrency"])

    async def generate(task: dict[str, Any]) -> None:
        content = [{"type": "image_url", "image_url": {"url": task["image"]}}, {"type": "text", "text": task["prompt"]}]
        async with semaphore:
            completion = await client.chat.completions.create(
                model=settings["model"],
                messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
                n=settings["k"],
                temperature=settings["temperature"],
                max_tokens=settings["max_tokens"],
            )
        responses = [choice.message.content for choice in completion.choices]
        file.write(json.dumps({"id": task["id"], "responses": responses}) + "\n")
        file.flush()

    with out.open("a") as file:
        await asyncio.gather(*(generate(task) for task in tasks if task["id"] not in done))


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
