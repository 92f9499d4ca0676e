"""Each import contract of pyproject.toml goes red for what it forbids, and no other one does."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "training", "eval", "services")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
CONTRACTS = {contract["name"]: contract for contract in SETTINGS["contracts"]}
ONE_WAY, TORCH, ROOMS, CONSOLE, VLLM = CONTRACTS
FORBIDDEN = [
    (ONE_WAY, {"pipeline/files.py": "import vcot.services.jobs.submitted"}),
    (ONE_WAY, {"pipeline/files.py": "from vcot.eval import table"}),
    (ONE_WAY, {"eval/table.py": "from vcot.training.protocol import job"}),
    (ONE_WAY, {"training/protocol/job.py": "from vcot.eval import table"}),
    (ONE_WAY, {"training/worker/__main__.py": "def late():\n    from vcot.services.jobs import submitted"}),
    (TORCH, {"training/protocol/job.py": "import torch"}),
    (TORCH, {"training/protocol/job.py": "from vcot.training import told", "training/told.py": "import torch.nn"}),
    (TORCH, {"training/protocol/job.py": "from vcot.pipeline import told", "pipeline/told.py": "import transformers"}),
    (TORCH, {"services/jobs/trainer.py": "from vcot.training.model import loading"}),
    (TORCH, {"eval/table.py": "from peft import LoraConfig"}),
    (TORCH, {"training/__init__.py": "import torch"}),
    (TORCH, {"training/__init__.py": "from vcot.training.model import loading"}),
    (TORCH, {"training/__init__.py": "from vcot.training import told", "training/told.py": "import trl"}),
    (ROOMS, {"training/model/loading.py": "import vcot.training.dpo.fit"}),
    (ROOMS, {"training/dpo/fit.py": "from vcot.training.merge import build"}),
    (ROOMS, {"training/merge/build.py": "import vcot.training.worker.jobs"}),
    (CONSOLE, {"services/run/steps.py": "from vcot.services.cli.terminal import Terminal"}),
    (
        CONSOLE,
        {
            "services/planning/doctor.py": "from vcot.services.run import told",
            "services/run/told.py": "import vcot.services.cli",
        },
    ),
    (VLLM, {"services/engine/vllm.py": "from vllm import LLM"}),
    (VLLM, {"training/worker/jobs.py": "import vllm"}),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The packages and their contracts, where nobody else reads them."""
    folder = tmp_path_factory.mktemp("copy")
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "checkpoints" if package == "training" else "")
        shutil.copytree(ROOT / package, folder / "vcot" / package, ignore=ignored)
    (folder / "vcot" / "__init__.py").touch()
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder / "vcot"


def broken_contracts(folder):
    command = [Path(sys.executable).with_name("lint-imports"), "--cache-dir", folder.parent / "cache"]
    environment = os.environ | {"COLUMNS": "400", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, check=False)
    assert "Contracts:" in done.stdout, done.stdout + done.stderr
    return re.findall(r"^(.*) BROKEN$", done.stdout, re.MULTILINE)


def test_the_contracts_hold_as_the_code_is(copy):
    assert broken_contracts(copy) == []


@pytest.mark.parametrize(("contract", "added"), FORBIDDEN)
def test_a_forbidden_import_breaks_its_contract_and_no_other(copy, contract, added):
    before = {name: (copy / name).read_text("utf-8") if (copy / name).exists() else None for name in added}
    for name, line in added.items():
        (copy / name).write_text(f"{before[name] or ''}\n{line}\n", "utf-8")
    try:
        assert broken_contracts(copy) == [contract]
    finally:
        for name, text in before.items():
            (copy / name).unlink() if text is None else (copy / name).write_text(text, "utf-8")


def rooms(package):
    return {f"vcot.{package}.{path.parent.name}" for path in (ROOT / package).glob("*/__init__.py")}


def test_a_new_room_must_be_named_in_its_contract():
    assert rooms("training") == set(CONTRACTS[ROOMS]["layers"])
    assert rooms("services") - {"vcot.services.cli"} == {
        name for name in CONTRACTS[CONSOLE]["source_modules"] if name.startswith("vcot.services.")
    }
