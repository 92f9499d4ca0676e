"""How long `vcot score --rules all` takes over logged responses, and how much memory.

    make bench-score          (python -m bench.score [--responses N])

A ScienceQA in its official layout is made, 2,017 questions with an image each, and a log in LLaVA's layout of `--responses`
responses to them: chains of 10 to 90 words and an answer in one of the ways in which public models state theirs, no two the
same (identical answers would be the faster ones to read). The command itself is then run on the file, in a process of its
own, after a first one has brought the benchmark into the user's cache.

The last line is JSON: `rows`, `seconds` (wall), `cpu_s` (of all its processes), `peak_mb` (of the largest of them), `rules`,
`mean_chars` (of a response) and `cores`.

Limits: one file; short questions; whoever else uses the machine makes `seconds` longer, and `cpu_s` hardly.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from vcot.eval.rules import RULES

_NUM_QUESTIONS = 2017
_WORDS = (
    "the", "of", "a", "map", "shows", "colony", "magnet", "north", "pole", "attracts", "plant", "leaf", "because", "which",
    "is", "farther", "from", "animal", "skin", "adapted", "to", "water", "solution", "particles", "both", "larger", "state",
    "country", "image", "we", "see", "that", "this", "and", "its", "temperature", "higher", "on", "left", "right", "option",
)  # fmt: skip
_ENDS = (
    "The answer is {letter}.", "Therefore, the answer is ({letter}) {text}.", "The correct answer is {letter}. {text}",
    "So the answer is {text}.", "Answer: {letter}", "ANSWER: {letter}", "I would choose option {letter}.",
    "The answer is {letter}", "\\boxed{{{letter}}}", "It cannot be told from the image.", "**{letter}. {text}**",
    "The answer is {letter} or {other}.",
)  # fmt: skip
_SUBJECTS = ("natural science", "social science", "language science")


def make_benchmark(folder: Path, draw: random.Random) -> dict[str, dict[str, object]]:
    """The official files, each image of one colour."""
    problems: dict[str, dict[str, object]] = {}
    for number in range(_NUM_QUESTIONS):
        choices = [f"{draw.choice(_WORDS)} {draw.choice(_WORDS)} {i}" for i in range(draw.randint(2, 5))]
        problems[str(number)] = {
            "question": f"Which of these is number {number}?", "choices": choices, "answer": draw.randrange(len(choices)),
            "hint": "", "image": "image.png", "subject": draw.choice(_SUBJECTS), "topic": "", "solution": "",
        }  # fmt: skip
        place = folder / "images" / "test" / str(number)
        place.mkdir(parents=True)
        Image.new("RGB", (8, 8), tuple(draw.randrange(256) for _ in range(3))).save(place / "image.png")
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
    return problems


def make_text(problem: dict[str, object], number: int, draw: random.Random) -> str:
    """A chain that no other response has, and an answer that is often right."""
    choices: list[str] = problem["choices"]  # type: ignore[assignment]
    index = problem["answer"] if draw.random() < 0.5 else draw.randrange(len(choices))
    assert isinstance(index, int)
    words = " ".join(draw.choices(_WORDS, k=draw.randint(10, 90)))
    end = draw.choice(_ENDS).format(
        letter=chr(ord("A") + index), other=chr(ord("A") + (index + 1) % len(choices)), text=choices[index]
    )
    answer_first = draw.random() < 0.2
    return f"{end} {words} {number}." if answer_first else f"{words} {number}. {end}"


def write_log(path: Path, problems: dict[str, dict[str, object]], num: int, draw: random.Random) -> float:
    """LLaVA's layout. Returns the mean length of a text."""
    pids, length = list(problems), 0
    with path.open("w") as file:
        for number in range(num):
            pid = pids[number % len(pids)]
            text = make_text(problems[pid], number, draw)
            length += len(text)
            file.write(json.dumps({"question_id": pid, "text": text, "answer_id": str(number), "metadata": {}}) + "\n")
    return length / num


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=1_000_000)
    num = parser.parse_args().responses
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        problems = make_benchmark(folder, draw)
        mean = write_log(folder / "answers.jsonl", problems, num, draw)
        command = [
            sys.executable,
            "-m",
            "vcot.services.cli",
            "score",
            str(folder / "answers.jsonl"),
            "--benchmark",
            "scienceqa",
        ]
        command += ["--path", str(folder), "--rules", "all", "--repeated", "--json"]
        environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
        write_log(folder / "few.jsonl", problems, 10, draw)
        subprocess.run(
            [*command[:4], str(folder / "few.jsonl"), *command[5:]], env=environment, capture_output=True, check=True
        )
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        seconds, used = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    found = json.loads(done.stdout)
    for row in found["results"]:
        print(
            f"{row['rule']:<12} {100 * row['accuracy']['Avg']['value']:5.1f} %, unread {100 * row['no_answer']:5.1f} %"
        )
    figures = {
        "rows": found["accounts"][0]["count"]["ok"], "seconds": round(seconds, 1),
        "cpu_s": round(cpu, 1), "peak_mb": round(used.ru_maxrss / 1024),
        "rules": len(RULES.built_ins), "mean_chars": round(mean), "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
