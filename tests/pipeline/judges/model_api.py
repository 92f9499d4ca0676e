"""A judge's model behind a transport: a function of the question answers, and every question is kept."""

import json
from dataclasses import dataclass, field

import httpx2
from PIL import Image

from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges import judgment_keys
from vcot.pipeline.judges.cost import Meter
from vcot.pipeline.judging import find_standing, judge_responses
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.records import CheckpointRef, Judgment, Response, SamplingParams, Task, Usage
from vcot.pipeline.sample import Group

CHECKPOINT = CheckpointRef(name="base", digest="sha256:aa", kind="base")
SAMPLING = SamplingParams(temperature=0.5, max_tokens=8, n=8, seed=0)
NOTHING = Usage(prompt_tokens=0, completion_tokens=0)


def make_response(index, text, **changes):
    thought, _, answer = text.partition(" <R> ")
    fields = {"key": f"r{index}-{text}", "group": "g", "task": "t", "index": index, "checkpoint": CHECKPOINT}
    fields |= {"prompt": "thought_specific", "sampling": SAMPLING, "text": text}
    return Response(**(fields | {"thought": thought, "answer": answer or None} | changes))


def make_choice(content, top=None, finish_reason="stop"):
    """One choice; `top` is a mapping of tokens to log-probs for each position."""
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": content}}
    if top is not None:
        content = [
            {"token": max(step, key=step.get), "logprob": max(step.values()), "bytes": None,
             "top_logprobs": [{"token": token, "logprob": value, "bytes": None} for token, value in step.items()]}
            for step in top
        ]  # fmt: skip
        choice["logprobs"] = {"content": content, "refusal": None}
    return choice


def make_answer(*choices):
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": usage}
    return httpx2.Response(200, json=body | {"choices": [c | {"index": i} for i, c in enumerate(choices)]})


@dataclass
class Table:
    """A judge and the responses that it is to judge."""

    kind: type
    section: object
    directory: object
    answer: object
    """Takes the text of a question, and gives a text, choices or a response."""
    texts: tuple[str, ...] = ("good <R> The answer is (A).", "bad <R> The answer is (B).")
    task_fields: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)
    """The questions' texts."""
    bodies: list = field(default_factory=list)

    def __post_init__(self):
        self.directory.mkdir(exist_ok=True)
        self.images = ImageStore(self.directory)
        self.ledger = Ledger(self.directory / "ledger.sqlite")
        self.image = self.images.put_png(Image.new("RGB", (8, 8), "red"))
        fields = {
            "id": "t",
            "question": "What is it?",
            "choices": ("red", "blue"),
            "answer": 0,
            "images": (self.image,),
        }
        self.task = Task(**(fields | {"source": "nano", "split": "train"} | self.task_fields))
        self.responses = [make_response(index, text) for index, text in enumerate(self.texts)]
        self.meter = Meter(None, NOTHING)

    @property
    def groups(self):
        return [Group(self.task, self.responses)]

    def _reply(self, request):
        body = json.loads(request.content)
        content = body["messages"][0]["content"]
        self.bodies.append(body)
        self.asked.append(content[-1]["text"])
        said = self.answer(content[-1]["text"])
        if isinstance(said, httpx2.Response):
            return said
        return make_answer(*([make_choice(said)] if isinstance(said, str) else said))

    def make(self):
        transport = httpx2.MockTransport(self._reply)
        return self.kind(self.section, self.images, transport=transport) if self.section.model else self.kind(
            self.section, self.images
        )  # fmt: skip

    async def judge(self):
        """Judge what is owed; gives the count."""
        async with self.make() as judge:
            standing = find_standing(judge, self.groups, self.ledger, self.section)
            return await judge_responses(
                judge, self.groups, self.ledger, self.section, standing=standing, meter=self.meter
            )

    @property
    def judgments(self):
        """By index; None of a response without one."""
        keys = judgment_keys(self.make(), self.task, self.responses)
        found = self.ledger.get(Judgment, keys)
        return [found.get(key) for key in keys]

    @property
    def scores(self):
        return [judgment and judgment.score for judgment in self.judgments]
