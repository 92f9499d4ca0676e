"""The command line: help, and one sentence with exit code 2 for bad input, before any server is started."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from tests.services.fake_vllm import write_checkpoint
from vcot.services.cli import outcome
from vcot.services.run.directory import RECIPE


@pytest.fixture
def vcot(monkeypatch, capsys, tmp_path):
    """Runs a command in this process; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vcot", *map(str, arguments)])
        code = 0
        try:
            outcome.main()
        except SystemExit as error:
            code = error.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def scienceqa(folder, question=None, image=None):
    """A ScienceQA layout with one question (an image of `image` bytes; None leaves the file out)."""
    fields = {
        "question": "Which?",
        "choices": ["a", "b"],
        "answer": 0,
        "hint": "",
        "image": "image.png",
        "task": "",
        "grade": "grade2",
        "subject": "natural science",
        "topic": "t",
        "category": "c",
        "skill": "s",
        "lecture": "",
        "solution": "",
        "split": "train",
    }
    folder.mkdir()
    (folder / "problems.json").write_text(json.dumps({"7": fields | question} if question is not None else {}))
    splits = {"train": ["7"] if question is not None else [], "val": [], "test": []}
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    if image is not None:
        path = folder / "images" / "train" / "7"
        path.mkdir(parents=True)
        (path / "image.png").write_bytes(image)
    return folder


def png(tmp_path):
    path = tmp_path / "one.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return path.read_bytes()


HEAVY = (
    *("torch", "vllm", "transformers", "trl", "peft", "datasets", "pyarrow", "openai", "PIL", "numpy", "scipy"),
    *("matplotlib", "aiohttp", "httpx", "pydantic", "rich.markdown"),
)
SHOW_HELP = f"""
import sys
from vcot.services.cli.start import main
main()
sys.exit(sorted(set({HEAVY}) & set(sys.modules)) or 0)
"""


def help_of(*command):
    """What `vcot ... --help` prints, if it imported nothing that takes long."""
    done = subprocess.run(
        [sys.executable, "-c", SHOW_HELP, *command, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_lists_every_step_and_imports_nothing_heavy():
    shown = help_of()
    for step in (
        *("serve", "sample", "judge", "pair", "train", "merge", "parity", "swap", "eval", "report"),
        *("run", "rounds", "doctor", "demo"),
    ):
        assert f" {step} " in shown


@pytest.mark.parametrize("command", [("sample",), ("checkpoints",), ("push", "pairs")])
def test_help_of_a_command_imports_nothing_heavy(command):
    assert f"Usage: vcot {' '.join(command)}" in help_of(*command)


@pytest.mark.parametrize("command", [("run",), ("rounds",), ("demo",), ("eval",), ("report",), ("score",), ("status",)])
def test_every_command_that_prints_figures_prints_them_for_programs(command):
    assert "--json" in help_of(*command)


def test_the_version_is_the_packages(vcot):
    pyproject = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))
    assert vcot("--version")[:2] == (0, pyproject["project"]["version"] + "\n")


def test_an_unknown_command_names_the_nearest(vcot):
    code, out, err = vcot("smaple")
    assert code == 2
    assert 'Did you mean "sample"' in out + err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "--set", "sample.temprature=1"], "unknown field sample.temprature (did you mean temperature?)"),
        (["sample", "--recipe", "papr"], "no recipe 'papr' (did you mean paper?)"),
        (["sample", "--source", "scienceqa", "--path", "nowhere"], "does not exist"),
        (["sample", "--source", "sciencqa"], "tasks.source: there is no source 'sciencqa'; do you mean scienceqa?"),
        (["sample", "--set", "model.source=/nowhere/at/all"], "/nowhere/at/all"),
        (["judge"], "runs/nano is not a run yet"),
        (["report", "--run", "runs/nanp"], "runs/nanp is not a run yet"),
        (["eval", "base"], "is not a run yet"),
        (["pair", "--recipe", "nano"], "run `vcot sample` first"),
        (["train", "--recipe", "nano"], "run `vcot sample` first"),
        (["swap", "policy", "none"], "runs/nano is not a run yet"),
        (["swap", "policy", "none", "--recipe", "nano"], "no server runs"),
        (["report", "--recipe", "nano"], "does not hold its model yet"),
        (["serve", "--run", "runs/nanp"], "runs/nanp is not a run yet"),
        (["eval", "bsae", "--recipe", "nano"], "no checkpoint or alias 'bsae'"),
        (["run", "--set", "train.accelerate_config=nope"], "is neither one of ddp, fsdp, zero2, zero3 nor a file"),
    ],
)
def test_bad_input_gives_one_sentence_and_code_2_and_begins_no_run(vcot, tmp_path, arguments, said):
    code, _, err = vcot(*arguments)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("vcot: ")
    assert said in last
    assert not list(tmp_path.rglob(RECIPE))
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("question", "image", "said"),
    [
        (None, None, "holds no question"),
        ({}, None, "image.png"),
        ({}, b"not an image", "cannot be read"),
        ({"choices": ["only"]}, "good", "1 choice"),
        ({"answer": 5}, "good", "answer 5"),
    ],
    ids=["empty", "missing-image", "corrupt-image", "one-choice", "answer-out-of-range"],
)
def test_bad_data_names_the_place_and_leaves_the_run_as_it_was(vcot, tmp_path, question, image, said):
    assert vcot("judge", "--run", "r")[0] == 2
    (tmp_path / "r").mkdir(exist_ok=True)
    (tmp_path / "r" / RECIPE).write_text(vcot("recipe", "nano")[1])
    before = (tmp_path / "r" / RECIPE).read_bytes()
    folder = scienceqa(tmp_path / "data", question, png(tmp_path) if image == "good" else image)
    code, _, err = vcot("sample", "--run", "r", "--source", "scienceqa", "--path", folder)
    last = err.strip().splitlines()[-1]
    assert code == 2, err
    assert said in last
    assert (tmp_path / "r" / RECIPE).read_bytes() == before
    assert vcot("sample", "--run", "r", "--source", "scienceqa", "--path", folder, "--save")[0] == 2
    assert (tmp_path / "r" / RECIPE).read_bytes() == before


def nano_copy(tmp_path):
    source = Path(outcome.__file__).parents[2] / "training" / "checkpoints" / "nano"
    return Path(shutil.copytree(source, tmp_path / "copy"))


def test_a_checkpoint_without_weights_is_named(vcot, tmp_path):
    copy = nano_copy(tmp_path)
    (copy / "model.safetensors").unlink()
    code, _, err = vcot("sample", "--set", f"model.source={copy}")
    assert code == 2
    assert "has no *.safetensors weights" in err


def test_a_checkpoint_that_was_altered_is_refused(vcot, tmp_path):
    copy = nano_copy(tmp_path)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    code, _, err = vcot("sample", "--set", f"model.source={copy}")
    assert code == 2
    assert "its files were changed" in err


def test_a_key_that_is_not_set_is_named_before_anything_is_asked(vcot, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    code, out, _ = vcot("doctor", "--recipe", "paper")
    assert code == 2
    assert "OPENAI_API_KEY is not set" in out
    code, _, err = vcot("run", "--recipe", "paper")
    assert code == 2
    assert err.strip() == "vcot: judge gpt-4o-mini needs an API key; set OPENAI_API_KEY in the environment"


def test_the_doctor_says_what_a_training_would_lack(vcot):
    code, out, _ = vcot("doctor", "--set", "train.accelerate_config=nope")
    assert code == 2
    assert "missing for nano: train.*" in out


def test_the_doctor_finds_nothing_missing_for_nano(vcot):
    code, out, err = vcot("doctor", "--set", "serve.port=0")
    assert code == 0, out + err
    assert "this machine can run nano" in out


def test_a_rendered_recipe_begins_the_same_run(vcot, tmp_path):
    code, out, _ = vcot("recipe", "nano", "--set", "sample.k=4")
    (tmp_path / "mine.toml").write_text(out)
    assert code == 0
    assert vcot("recipe", "mine.toml")[1] == out


def test_checkpoints_are_added_listed_shown_and_retired(vcot, tmp_path):
    write_checkpoint(tmp_path / "weights", "tuned", 2.0)
    target = ("--run", tmp_path / "run")
    code, _, err = vcot("checkpoints", "add", tmp_path / "weights", *target, "--recipe", "nano")
    assert (code, "tuned is sha256:" in err) == (0, True)
    for command in ((), ("list",)):
        code, out, _ = vcot("checkpoints", *command, *target)
        assert (code, str(tmp_path / "weights") in out) == (0, True)
        assert re.search("sha256:[0-9a-f]{64}", out), "whole, for a pipe"
    code, out, _ = vcot("checkpoints", "show", "tuned", *target)
    assert code == 0
    assert "merged" in out
    code, out, err = vcot("checkpoints", "show", "tunde", *target)
    assert (code, out) == (2, "")
    assert "did you mean tuned?" in err
    code, _, err = vcot("checkpoints", "retire", "tuned", *target)
    assert (code, "is retired" in err) == (0, True)
    assert "tuned" not in vcot("checkpoints", *target)[1]
    code, _, err = vcot("checkpoints", "retire", "tuned", *target)
    assert (code, "no checkpoint 'tuned'" in err) == (2, True)


@pytest.mark.parametrize("command", ["run", "train"])
def test_wandb_is_one_flag_away_and_is_looked_for_at_once(vcot, monkeypatch, command):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find_spec(name, *rest)
    )
    code, _, err = vcot(command, "--recipe", "nano", "--wandb")
    assert (code, "train.report_to needs the package wandb, which is not installed" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [(("pair", "--run", ""), "--run"), (("pair", "--run="), "--run="), (("eval", ""), "eval"), (("",), "vcot")],
)
def test_an_empty_argument_is_refused(vcot, arguments, option):
    """As a path it would be the current folder."""
    code, _, said = vcot(*arguments)
    assert (code, said) == (2, f"vcot: what follows {option} is empty; is a variable in the command line not set?\n")
