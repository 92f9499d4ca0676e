"""The trainers' comparison: which steps a log shows, what a kill costs, and whether the work was the same."""

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench.peers import trainers
from bench.peers.rounds import PeerError
from bench.peers.training import Log, Outcome, follow, measure, summarise
from vcot.services.recipes.recipe import load_recipe

RECIPE = load_recipe("nano", ["train.target_modules=language-model"]).train

SCRIPT = """
import json, subprocess, sys, time
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
out, drift = Path(sys.argv[1]), float(sys.argv[2])
saved = sorted(int(path.name[11:]) for path in out.glob("checkpoint-*"))
begin = saved[-1] if saved else 0
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
(out / "children").open("a").write(f"{child.pid}\\n")
for step in range(begin + 1, 9):
    time.sleep(0.2)
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps({"loss": 0.7 / step, "rewards/margins": step, "step": step}) + "\\n")
        file.write('{"train_loss": 1}\\n')
    if step % 2 == 0:
        (out / f"checkpoint-{step}").mkdir()
        lines = [{"rewards/margins": float(number)} for number in range(1, step + 1)]
        (out / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": [{}, *lines]}))
    if (out.name, begin, step) == ("half", 0, 5):
        time.sleep(60)  # until it is killed
weights = {"a.lora_A": np.ones(2, "f4"), "a.lora_B": np.full(2, 1 + drift * (begin > 0), "f4")}
save_file(weights, out / "adapter_model.safetensors")
child.kill()
"""


def command(drift):
    return lambda training: [sys.executable, "-c", SCRIPT, str(training.out), str(drift)]


@pytest.fixture
def training(tmp_path):
    return trainers.Training(RECIPE, 2, tmp_path, tmp_path / "out")


PLAIN = trainers.TRAINERS["trl"]


@pytest.mark.parametrize("drift", [0.0, 0.5])
async def test_what_a_kill_costs_and_whether_the_weights_are_the_same(training, drift):
    outcome = await measure(replace(PLAIN, command=command(drift)), training, 60)
    assert (outcome.steps, outcome.modules, outcome.first_loss, outcome.difference) == (8, 1, 0.7, drift)
    assert outcome.steps_anew == 1  # killed after the fifth, saved after the fourth
    assert outcome.margin == 6.5  # of the second of two epochs
    assert 0 < outcome.start_s < outcome.seconds < outcome.total_s + 1
    assert outcome.steps_per_s > 0
    assert outcome.cpu_s > 0
    assert outcome.peak_mb > 5
    killed = (training.out / "half" / "children").read_text().split()
    assert not any(is_running(pid) for pid in killed)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_trainer_that_fails_says_why_and_one_that_hangs_is_ended(training):
    with pytest.raises(PeerError, match=r"(?s)ended with 3 .*no model"):
        await follow(replace(PLAIN, command=lambda _: ["sh", "-c", "echo no model; exit 3"]), training, 20)
    with pytest.raises(PeerError, match="no step is in its log"):
        await follow(replace(PLAIN, command=lambda _: ["true"]), training, 20)
    with pytest.raises(PeerError, match="ended with -9 after"):
        await follow(replace(PLAIN, command=lambda _: ["sleep", "60"]), training, 0.3)


async def test_what_is_logged_just_before_the_end_is_seen(training):
    lines = '{"loss": 0.7, "step": 1}\n{"loss": 0.6, "step": 2}\n'
    quick = replace(
        PLAIN, command=lambda _: ["sh", "-c", 'printf "%s" "$0" > "$1"', lines, str(training.out / "log.jsonl")]
    )
    course = await follow(quick, training, 20)
    assert [(seen.step, seen.loss) for seen in course.steps] == [(1, 0.7), (2, 0.6)]
    assert 0 <= course.steps[-1].cpu_s < 1


def test_a_log_shows_what_came_since_whether_it_was_cut_or_gone_on_with(tmp_path):
    path = tmp_path / "log.jsonl"

    def line(step, at):
        return json.dumps({"loss": 0.5, "step": step, "at": at}) + "\n"

    path.write_text(line(1, 0) + line(2, 1) + line(3, 2))
    log = Log(PLAIN, tmp_path)
    assert log.read() == []
    path.write_text(line(1, 0) + line(2, 1) + line(3, 7) + '{"loss": 0.')
    assert log.read() == [{"step": 3, "loss": 0.5}]
    path.write_text(line(1, 0) + line(2, 1) + line(3, 2) + line(3, 7))
    assert log.read() == [{"step": 3, "loss": 0.5}]


@pytest.mark.parametrize(
    ("name", "steps", "others"),
    [
        ("vcot", {"kind": "train", "step": 4, "loss": 1}, {"kind": "validation", "step": 4, "loss": 1}),
        ("trl", {"loss": 1, "step": 4}, {"train_loss": 1, "step": 4}),
        ("swift", {"loss": 1, "global_step/max_steps": "4/9"}, {"train_loss": 1, "global_step/max_steps": "9/9"}),
        ("llamafactory", {"loss": 1, "current_steps": 4}, {"current_steps": 9}),
    ],
)
def test_how_each_logs_a_step(name, steps, others):
    read_step = trainers.TRAINERS[name].read_step
    assert (read_step(steps), read_step(others)) == (4, None)


def test_the_published_pairs_in_the_words_of_others(tmp_path):
    def say(role, *parts):
        return [{"role": role, "content": [{"type": kind, "text": text} for kind, text in parts]}]

    row = {
        "images": [{"bytes": b"png", "path": "a.png"}],
        "prompt": say("user", ("image", None), ("text", "Which?")),
        "chosen": say("assistant", ("text", "The red one.")),
        "rejected": say("assistant", ("text", "None.")),
    }
    folder = tmp_path / trainers.RUN / "pairs" / "key"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row]), folder / "train.parquet")
    trainers.write_pairs(tmp_path)
    swift = json.loads((tmp_path / "swift.jsonl").read_text())
    (factory,) = json.loads((tmp_path / "llamafactory.json").read_text())
    columns = json.loads((tmp_path / "dataset_info.json").read_text())["pairs"]["columns"]
    assert [turn["content"] for turn in swift["messages"]] == ["<image>Which?", " The red one."]
    assert swift["rejected_response"] == " None."
    assert {role: factory[column] for role, column in columns.items()} == {
        "messages": [{"from": "human", "value": "<image>\nWhich?"}],
        "chosen": {"from": "gpt", "value": " The red one."},
        "rejected": {"from": "gpt", "value": " None."},
        "images": swift["images"],
    }
    assert (tmp_path / "images" / "a.png").read_bytes() == b"png"
    assert swift["images"] == [str(tmp_path / "images" / "a.png")]


def test_all_are_told_the_recipe_and_swift_where_to_go_on(training):
    training.out.mkdir()
    flags = {name: read_flags(trainers.TRAINERS[name].command(training)) for name in ("swift", "llamafactory")}
    for told in flags.values():
        assert (told["--lora_rank"], told["--lora_alpha"], told["--lora_dropout"]) == ("64", "128", "0.1")
        assert (told["--learning_rate"], told["--lr_scheduler_type"], told["--seed"]) == ("0.0001", "linear", "0")
        assert (told["--per_device_train_batch_size"], told["--save_steps"]) == ("8", "2")
        assert "--resume_from_checkpoint" not in told
    for step in (8, 10):
        (training.out / f"checkpoint-{step}").mkdir()
    (training.out / "checkpoint-8" / "trainer_state.json").write_text("{}")
    saved = read_flags(trainers.train_swift(training))["--resume_from_checkpoint"]
    assert saved == str(training.out / "checkpoint-8")  # the other was not written whole


def read_flags(words):
    return {word: value for word, value in pairwise(words) if word.startswith("--")}


def test_who_is_ahead_and_what_a_trainer_said_that_failed():
    ours = Outcome(10, 2, 4.0, 8, 0.2, 100, 15, 3, 50, 28, 0.6931, 2.0, 0.0)
    theirs = replace(ours, seconds=20, steps_per_s=2.0, step_cpu_s=0.1, margin=4.0)
    figures = summarise([{"vcot": ours, "swift": theirs}], {"trl": "no", "llamafactory": "it broke"})
    ratios = figures["ratios"]
    assert (ratios["seconds_vs_swift"], ratios["steps_per_s_vs_swift"], ratios["step_cpu_s_vs_swift"]) == (2, 2, 0.5)
    assert not any(name.startswith(("margin", "steps_vs")) or name.endswith(("_trl", "_vcot")) for name in ratios)
    assert figures["trainers"]["llamafactory"] == "it broke"
    assert figures["trainers"]["vcot"]["first_loss"] == 0.6931
