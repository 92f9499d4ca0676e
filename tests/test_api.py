"""`import vcot`: what it gives, what that costs, and what a wheel of it puts into site-packages."""

import re
import subprocess
import sys
import zipfile
from inspect import isfunction
from pathlib import Path

import vcot

ROOT = Path(__file__).parent.parent


def test_every_name_is_there_and_described():
    page = (ROOT / "docs" / "notebook.md").read_text("utf-8").partition("## The names")[2]
    described = re.findall(r"`(\w+)`", page.partition("| for | names |")[2])
    assert sorted(described) == sorted(vcot.__all__)
    objects = [getattr(vcot, name) for name in vcot.__all__]
    assert not [each for each in objects if (isinstance(each, type) or isfunction(each)) and not each.__doc__]


def test_a_name_is_imported_when_it_is_used():
    code = "import sys, vcot; assert not {'openai', 'datasets', 'torch', 'vcot.services'} & {*sys.modules}; vcot.Judge"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_wheel_holds_one_package(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
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
