"""The questions as a task of inspect_ai; run by its own Python, not by ours."""

from inspect_ai import Task, task
from inspect_ai.dataset import Sample, json_dataset
from inspect_ai.model import ChatMessageUser, ContentImage, ContentText
from inspect_ai.scorer import pattern
from inspect_ai.solver import generate


@task  # type: ignore[untyped-decorator]
def questions(data: str) -> Task:
    """Rows of `data` (JSON lines) hold id, image, prompt and target."""
    return Task(dataset=json_dataset(data, _sample), solver=generate(), scorer=pattern(r"The answer is \(?([A-Z])"))


def _sample(row: dict[str, str]) -> Sample:
    content = [ContentImage(image=row["image"]), ContentText(text=row["prompt"])]
    return Sample(id=row["id"], input=[ChatMessageUser(content=content)], target=row["target"])
