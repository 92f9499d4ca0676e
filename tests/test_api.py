"""`import vcot`: what it gives, what that costs, and what a wheel of it puts into site-packages."""

import importlib.resources
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from inspect import isfunction
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import vcot
from vcot.services.engine.installing import tell_install

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("folder", ["eval", "pipeline", "services", "training"])
def test_a_folder_is_no_package_of_its_own_in_tests(folder):
    """Where vcot is installed it is none, and whoever asks for it there fails: `vcot report` did."""
    with pytest.raises(ModuleNotFoundError, match=f"it is vcot.{folder}"):
        importlib.resources.files(folder)


def test_every_name_is_there_and_described():
    page = (ROOT / "docs" / "notebook.md").read_text("utf-8").partition("## The names")[2]
    described = re.findall(r"`(\w+)`", page.partition("| for | names |")[2])
    assert sorted(described) == sorted(vcot.__all__)
    objects = [getattr(vcot, name) for name in vcot.__all__]
    assert not [each for each in objects if (isinstance(each, type) or isfunction(each)) and not each.__doc__]


def test_a_name_is_imported_when_it_is_used():
    code = "import sys, vcot; assert not {'openai', 'datasets', 'torch', 'vcot.services'} & {*sys.modules}; vcot.Judge"
    subprocess.run([sys.executable, "-c", code], check=True)


def build_wheel(source, folder):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel, set(zipfile.ZipFile(wheel).namelist())


def test_what_docker_is_given_makes_the_same_wheel(tmp_path):
    patterns = (ROOT / ".dockerignore").read_text("utf-8").split("\n")
    given = tmp_path / "given"
    given.mkdir()
    left_out = shutil.ignore_patterns("*.Dockerfile", "__pycache__")
    for name in [line.removeprefix("!") for line in patterns if line.startswith("!") and "*" not in line]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, given / name, symlinks=True, ignore=left_out)
        else:
            shutil.copy(ROOT / name, given / name)
    recipes_of_images = {f"vcot/services/images/{kind}.Dockerfile" for kind in ("cpu", "gpu")}
    assert build_wheel(given, tmp_path / "one")[1] == build_wheel(ROOT, tmp_path / "other")[1] - recipes_of_images


def test_a_source_distribution_makes_the_same_wheel(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (packed,) = tmp_path.glob("*.tar.gz")
    subprocess.run(["tar", "-xzf", packed, "-C", tmp_path], check=True)
    unpacked = tmp_path / packed.name.removesuffix(".tar.gz")
    assert build_wheel(unpacked, tmp_path / "one")[1] == build_wheel(ROOT, tmp_path / "other")[1]


def test_a_wheel_holds_one_package(tmp_path):
    wheel, names = build_wheel(ROOT, tmp_path)
    assert {name.partition("/")[0] for name in names} == {
        "vcot",
        f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info",
    }
    tracked = subprocess.run(
        ["git", "ls-files", "pipeline", "eval", "training", "services"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\n")
    assert {f"vcot/{name}" for name in tracked if name} | {"vcot/py.typed", "vcot/__init__.pyi"} <= {*names}


def read_pins(name):
    """Package -> version, of one of the locks."""
    return dict(re.findall(r"^([\w.-]+)==([^ \\]+)", (ROOT / "requirements" / name).read_text("utf-8"), re.MULTILINE))


def test_what_a_wheel_asks_for_is_what_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert Requirement(*extras["all"]).extras == {*extras} - {"all", "wandb"}, "trackers has wandb"
    pins, asked = read_pins("gpu.txt"), [*project["dependencies"], *extras["serve"], *extras["train"]]
    for each in map(Requirement, asked):
        assert each.specifier.contains(pins[each.name]), each


def test_what_is_missing_is_installed_as_vcot_was(tmp_path):
    assert tell_install("train") == "make setup"
    assert tell_install("serve", makefile=tmp_path / "Makefile") == 'pip install "vcot[serve]"'
