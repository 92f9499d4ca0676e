"""A plausible run for the report's tests, made from the real records."""

import io
import math
import random
from dataclasses import replace

from PIL import Image, ImageDraw

from vcot.eval.benchmarks.nano_world import NANO
from vcot.eval.breakdown import build_breakdown
from vcot.eval.image_reliance import build_reliance
from vcot.eval.margins import build_margins
from vcot.eval.repeats import build_repeats
from vcot.eval.table import build_chance, build_differences, build_results
from vcot.pipeline.odds import OptionScores
from vcot.pipeline.pairs import PreferencePair
from vcot.pipeline.records import CheckpointRef, ImageRef, Score, StageCount, Task
from vcot.services.recipes.recipe import load_recipe
from vcot.services.report.data import Example, Lesson, ReportData, TrendRow
from vcot.services.run.parity import ParityReport
from vcot.training.protocol.job import Retention, TrainProgress, TrainStatus

BASE = CheckpointRef(name="base", digest="sha256:3f1c" + "a7" * 30, kind="base")
POLICY = CheckpointRef(name="dpo-3fa29b01cc", digest="sha256:9be0" + "c4" * 30, kind="merged", parent=BASE.digest)
FACTS = (
    "The circle is at the top left.", "The square is at the bottom right.", "The circle is blue.", "The square is red.",
)  # fmt: skip


def make_scores(num=400):
    scores = []
    for checkpoint in (BASE, POLICY):
        for prompt in ("zero_shot", "cot"):
            for temperature in (0.4, 0.8):
                rng = random.Random(f"{checkpoint.name} {prompt} {temperature}")
                ease = random.Random(1)
                for number in range(num):
                    gain = 0.12 if checkpoint == POLICY and prompt == "cot" else 0.01
                    right = rng.random() < 0.25 + 0.5 * ease.random() + gain - 0.1 * (temperature > 0.5)
                    failed, unread = rng.random() < 0.003, rng.random() < 0.03
                    value = None if failed else "no_answer" if unread else "correct" if right else "incorrect"
                    scores.append(
                        Score(
                            key=f"{len(scores)}", task=f"nano-{number}", subject=("NAT", "SOC", "LAN")[number % 3],
                            image=f"{number // 2}", checkpoint=checkpoint.digest, prompt=prompt, temperature=temperature,
                            value=value, target="A", num_choices=4, error="timed out" if failed else None,
                        )
                    )  # fmt: skip
    return scores


def make_progress():
    rng = random.Random(2)
    points = []
    for step in range(1, 73):
        loss = 0.45 + 0.24 * math.exp(-step / 25)
        points.append(
            TrainProgress(
                kind="train", step=step, num_steps=72, epoch=step / 36, loss=loss + rng.gauss(0, 0.02), elapsed_s=step,
                reward_accuracy=min(1.0, max(0.0, 0.5 + 0.35 * (1 - math.exp(-step / 20)) + rng.gauss(0, 0.07))),
            )
        )  # fmt: skip
        if step % 8 == 0 or step == 1:
            points.append(
                TrainProgress(
                    kind="validation", step=step, num_steps=72, epoch=step / 36, loss=loss + 0.03, gap=0.03, elapsed_s=step,
                    reward_accuracy=0.5 + 0.28 * (1 - math.exp(-step / 20)),
                )
            )  # fmt: skip
    return tuple(points)


def make_image():
    image = Image.new("RGB", (56, 56), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((4, 4, 22, 22), "#2060d0")
    draw.rectangle((33, 33, 51, 51), "#d03030")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_example(number, **fields):
    ref = ImageRef(sha256=f"{number:064d}", path=f"images/{number:064d}.png", width=56, height=56)
    task = Task(
        id=f"nano-{number}", question="What colour is the circle?", choices=("red", "blue", "green", "yellow"), answer=1,
        facts=FACTS, images=(ref,), subject="NAT", family="colour", source="nano", split="train",
    )  # fmt: skip
    texts = {
        "chosen": "The circle is at the top left. The circle is blue. <R> The answer is (B)",
        "rejected": "The circle is at the bottom right. The circle is blue. The square is red. <R> The answer is (A)",
    }
    pair = PreferencePair(
        task=task.id, images=(ref,), prompt=task.question, chosen_key="c", rejected_key="r", chosen_score=1.0,
        rejected_score=0.33, judge="verifier/1", policy=BASE.digest, **(texts | fields),
    )  # fmt: skip
    wrong = "answer A, gold B; 2 of 3 statements true; false: the circle is at the bottom right"
    return Example(task, [make_image()], pair, "answer right; 2 of 2 statements true", wrong)


HOSTILE = (
    "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title='hacked'\"></p></section></main>",
    "<svg onload=alert(1)><style>* { display: none }</style><iframe srcdoc='x'></iframe><!-- <textarea> ]]> --></td>",
    "{{ 7 * 7 }}{% raw %}{# x #}{{ data.__class__ }} ${7*7} #{7*7}",
    "--- \nlicense: mit\n---\n# Heading\n[x](javascript:alert(1)) ![i](http://192.0.2.1/i.png) `code`",
    "\x1b]0;hacked\x07\x1b[2J\x1b[31m\x00\x08\x7f\x85\u2028\r",
    "\u202edesrever \u2066 \u200f \u05d0\u05d1 \u0627\u0644 \u200b\ufeff " + "Z\u0351\u036b\u0343" * 40,
    "w" * 3000,
)
"""What a model, a data set or a judge may say."""


def make_hostile(text):
    """A run in which every text that is not ours is `text`."""
    recipe = load_recipe("paper")
    recipe = recipe.model_copy(
        update={"name": text, "model": recipe.model.model_copy(update={"source": text, "revision": text})}
    )
    example = make_example(1, chosen=f"{text} <R> {text}", rejected=f"{text}.")
    task = example.task.model_copy(
        update={"question": text, "choices": (text, text + "b", text + "c", "d"), "family": text, "facts": (text,)}
    )
    example = replace(example, task=task, chosen_rationale=text, rejected_rationale=text)
    counts = (StageCount(stage="judge", requested=3, ok=2, refused=1, reasons={text: 1}),)
    labelled = tuple(row.model_copy(update={"kind": text, "label": text}) for row in make_breakdown(make_scores(20)))
    return make_data(recipe=recipe, judge=f"pointwise/1:{text}", counts=counts, examples=(example,), breakdown=labelled)


def make_reliance(scores):
    """As if a blank image, and another question's, cost a third of the right answers."""
    rng = random.Random(5)
    lost = [s.model_copy(update={"value": "incorrect"} if s.value and rng.random() < 0.33 else {}) for s in scores]
    return tuple(build_reliance({"true": scores, "blank": lost, "other": lost}, [BASE, POLICY]))


def make_margins():
    """As if the right option led by about 2 nats, and by nothing with a blank image."""
    rng = random.Random(6)
    tasks = [
        Task(id=f"nano-{n}", question="q?", choices=("a", "b"), answer=0, source="nano", split="test")
        for n in range(50)
    ]
    found = {
        shown: [
            OptionScores(
                key=f"{shown} {task.id} {ref.name}",
                task=task.id,
                checkpoint=ref.digest,
                logps=(rng.gauss(mean, 1), 0.0),
            )
            for ref in (BASE, POLICY)
            for task in tasks
        ]
        for shown, mean in (("true", 2), ("blank", 0))
    }
    return tuple(build_margins(found, tasks, [BASE, POLICY]))


def make_breakdown(scores):
    labelled = [s.model_copy(update={"labels": (("grade", f"G{1 + int(s.key) % 2}"),)}) for s in scores]
    return tuple(build_breakdown(labelled, [BASE, POLICY]))


def make_repeats(scores):
    """As if each question had been asked again under another seed."""
    again = [s.model_copy(update={"seed": 1}) for s in reversed(scores)]
    return tuple(build_repeats([*scores, *again], [BASE, POLICY]))


def make_trend(scores):
    rows = []
    for number, checkpoint in enumerate((BASE, POLICY)):
        lesson = Lesson(
            reference="base",
            num_tasks=600,
            num_pairs=324,
            ties=0.46,
            mean_score=0.79,
            mean_tokens=22.5,
            reward_margin=0.81,
        )
        rows.append(
            TrendRow(
                number=number, checkpoint=checkpoint, lesson=lesson if number else None, accuracy=0.5,
                is_chosen=bool(number),
                results=tuple(build_results(scores, [checkpoint], NANO.columns, seed=0, num_samples=1)),
                reliance=tuple(row for row in make_reliance(scores) if row.checkpoint == checkpoint),
            )
        )  # fmt: skip
    return tuple(rows)


def make_data(**fields):
    scores, rng = make_scores(), random.Random(4)
    kinds = [0.0, 0.17, 0.25, 0.33, 0.5, 0.5, 0.67, 0.75, 0.83, 1.0, 1.0, 1.0]
    values = {
        "recipe": load_recipe("nano"),
        "benchmark": NANO,
        "settings": "eval.seed=1; all else as in runs/nano/recipe.toml",
        "checkpoints": (BASE, POLICY),
        "counts": (
            StageCount(stage="sample", requested=2400, ok=2392, cached=8),
            StageCount(stage="judge", requested=2400, ok=2388, refused=12, reasons={"refusal": 9, "cut_by_length": 3}),
            StageCount(stage="pair", requested=300, ok=262, refused=38, reasons={"tie": 38}),
            StageCount(stage="eval base", requested=1600, ok=1597, failed=3, reasons={"overloaded": 3}),
        ),
        "judge": "verifier/1",
        "judge_cost": None,
        "judge_scores": tuple(rng.choice(kinds) for _ in range(2400)),
        "gaps": tuple(rng.choice(kinds[3:]) for _ in range(262)),
        "num_left_out": 0,
        "results": tuple(build_results(scores, [BASE, POLICY], NANO.columns, seed=0, num_samples=1)),
        "differences": tuple(build_differences(scores, BASE, [POLICY])),
        "chance": build_chance(scores, NANO.columns),
        "training": TrainStatus(
            state="done", num_train=236, num_validation=26, num_steps=72, num_adapted_modules=34,
            num_trainable_parameters=1_212_416,
        ),
        "parity": (
            ParityReport(
                checkpoint=POLICY, dtype="float32", tolerance=1e-3, max_abs_logp={"HF, vLLM": 6.2e-6},
                differs_from_base=1.7,
                retention=Retention(before=0.1811, after=0.181, kept=0.9994, kept_se=1e-4, error=6e-4),
            ),
        ),
        "progress": make_progress(),
        "examples": (make_example(1), make_example(2)),
    }  # fmt: skip
    return ReportData(**values | fields)
