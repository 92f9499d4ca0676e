"""Nano's questions as a task of inspect-ai; run by the harness's own Python, not by ours."""

from inspect_ai import Task, task
from inspect_ai.dataset import Sample, json_dataset
from inspect_ai.model import ChatMessageUser, ContentImage, ContentText, GenerateConfig
from inspect_ai.scorer import accuracy, pattern, scorer  # noqa: F401 - the harness looks scorers up in a task's file
from inspect_ai.solver import generate


@task
def nano(data: str) -> Task:
    """Rows of `data` (JSON lines) hold image, prompt and target."""
    return Task(
        dataset=json_dataset(data, _sample),
        solver=generate(),
        scorer=pattern(r"The answer is \(?([A-Z])"),
        config=GenerateConfig(temperature=0.0, max_tokens=64),
    )


def _sample(row: dict[str, str]) -> Sample:
    content = [ContentImage(image=row["image"]), ContentText(text=row["prompt"])]
    return Sample(id=row["id"], input=[ChatMessageUser(content=content)], target=row["target"])
