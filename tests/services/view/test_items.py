"""What the index says of a task: outcomes and flips of everything that was asked about it."""

from tests.services.view.view_run import respond
from vcot.eval.benchmarks.nano_world import NANO
from vcot.eval.eval_section import EvalSection
from vcot.eval.evaluate import Questions
from vcot.pipeline.images import ImageStore
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.records import CheckpointRef, Task
from vcot.services.view.items import Evaluated

TASKS = [
    Task(id=f"t{number}", question="q?", choices=("red", "blue"), answer=0, source="nano", split="test")
    for number in range(3)
]
BASE, POLICY = (CheckpointRef(name=name, digest=f"sha256:{name}", kind="merged") for name in ("base", "dpo-x"))
ANSWERS = {BASE.name: ["AB", "AA", "AB"], POLICY.name: ["BB", "AB", "BA"]}
"""Of each task, under one seed and the other: one seed alone would call the last two the same, and the first no flip."""


def test_a_flip_is_of_the_answers_under_all_seeds(tmp_path):
    section = EvalSection(benchmark="nano", prompts=("zero_shot",), temperatures=(0.4,), num_seeds=2)
    questions = Questions(NANO, section, "test", TASKS, ImageStore(tmp_path))
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for checkpoint in (BASE, POLICY):
        requests = questions.requests(checkpoint)
        for request, said in zip(
            requests, (letter for turn in (0, 1) for letter in _say(checkpoint, turn)), strict=True
        ):
            ledger.put([respond(request, 0, f"The answer is ({said})", finish_reason="stop")])
    looks = {look.task.id: look for look in Evaluated(questions, [BASE, POLICY], ledger).look(TASKS)}
    flips = {task: {mark for mark in look.marks if mark.startswith(("lost", "gained"))} for task, look in looks.items()}
    told = {f"lost|{one}|{other}" for one in ("dpo-x", "*") for other in ("zero_shot 0.4", "*")}
    assert flips == {"t0": told, "t1": told, "t2": set()}


def _say(checkpoint, turn):
    return [letters[turn] for letters in ANSWERS[checkpoint.name]]
