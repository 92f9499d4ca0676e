"""The house's rules that no linter knows: names are one thing's, and a file can be read in one go."""

import ast
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = [path for room in ("pipeline", "training", "eval", "services") for path in (ROOT / room).rglob("*.py")]
MAX_LINES = 400


def test_no_two_modules_share_a_name():
    named = defaultdict(list)
    for path in MODULES:
        if not path.name.startswith("__"):
            named[path.name].append(str(path.relative_to(ROOT)))
    assert not {name: paths for name, paths in named.items() if len(paths) > 1}


def test_no_module_is_longer_than_a_reader_holds():
    modules = [*MODULES, *(ROOT / "bench").glob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in modules}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


def test_every_python_reads_the_patterns_alike():
    """Before 3.11.5, a possessive or atomic group that backtracks inside matches otherwise (gh-106052), without a word."""
    modules = [*MODULES, *(ROOT / "bench").glob("*.py")]
    assert not [path for path in modules if re.search(r"\)[*+?]\+|\)\{\d*,?\d*\}\+|\(\?>", path.read_text("utf-8"))]


def test_the_api_is_for_others():
    """A module that asked `vcot` for a name would import past the contracts, which see only who imports which module."""
    assert not [
        path
        for path in MODULES
        if re.search(r"^\s*(import vcot$|from vcot import )", path.read_text("utf-8"), re.MULTILINE)
    ]


# Tests assert behaviour

OURS = {"vcot", "bench", "tests"}
LEFT: dict[str, tuple[str, ...]] = {
    # A wait that is a constant of a command or a job, made short.
    "tests/bench/test_soak.py": ("patch hostile _SLOW_S",),
    "tests/training/dpo/test_objective.py": ("patch fit MIN_SAVE_INTERVAL_S", "read _metrics", "read _metrics"),
    # A command that is interrupted, or made careless, at a moment that nothing outside its process can choose.
    "tests/e2e/test_parity.py": (
        *("patch parity_gate check_defaults", "patch parity_gate check_defaults", "patch vllm server_command"),
    ),
    "tests/e2e/test_sweep.py": ("patch trainer train_all", "patch trainer train_all"),
    "tests/services/gateway/fleet/test_fleet.py": ("patch replica watch", "patch replica watch"),
    "tests/services/gateway/test_gateway.py": ("patch bench.registry verify", "read _Call", "read _pass_events"),
    "tests/services/planning/test_doctor.py": (
        *("patch module cuda_of_torch", "patch Session base", "patch commands sample_stage"),
    ),
    "tests/training/merge/test_merge.py": (
        *("patch jobs exclusive", "patch loading free_bytes", "patch loading free_bytes", "patch loading _WORKSPACE"),
        "patch build ask",
    ),
    # What is counted or seen has no other trace: how often 14 GB are read, what one request holds.
    "tests/services/checkpoints/test_registry.py": ("patch integrity compute_digest",),
    "tests/services/gateway/swap/test_waiting.py": ("read _app", "read _app", "read _inference", "read _slots"),
    "tests/training/worker/test_worker.py": ("patch jobs _digest",),
    "tests/training/test_extending_loss.py": ("read _metrics",),
    # A machine with GPUs, a CUDA build of vLLM, or a module that is not there.
    "tests/services/engine/test_vllm.py": ("patch vllm find_build",),
    # The gateway of a command, and the command of a name: these go with the sessions of services/run.
    "tests/services/gateway/fleet/test_rest.py": (*("patch command_side.admin rest", "patch command_side.admin wake"),),
    "tests/services/gateway/test_admin_faults.py": ("patch Endpoint client",),
    "tests/services/run/test_serving.py": (
        *("patch heap settle", "patch rollout end_forgotten_trials"),
        *("read _persist", "read _serve"),
    ),
    # Private names of other libraries, which they give no other way to.
    "tests/pipeline/test_ledger.py": ("read _connection",),
    "tests/pipeline/test_pairs.py": ("read _from_yaml_list",),
    "tests/training/conftest.py": ("read _prepare_inputs",),
    "tests/training/dpo/test_sharing.py": ("patch Packing attention_mask", "read _ChunkedLogProbFunction"),
    # A rule is taken away, to see that it decides.
    "tests/training/dpo/test_quantized.py": ("patch agreement MAX_UNQUANTIZED_LOSS",),
    "tests/training/dpo/test_reference.py": ("patch PreferenceTrainer reference_logprobs",),
}
"""By test file: what of our own names it still patches, and which private names it still reads. It only gets shorter."""


def _roots(tree: ast.Module) -> dict[str, str]:
    """Name in the file -> the top package that it was imported from."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(a.asname or a.name).split(".")[0]: a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {a.asname or a.name: node.module.split(".")[0] for a in node.names}
    return found


def _root(node: ast.expr) -> str:
    """The name that `a.b(c).d` begins with, which is `a`."""
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Constant):
            return str(node.value).split(".")[0]
        inner = getattr(node, "func", None) or getattr(node, "value", None)
        if inner is None:
            return ""
        node = inner
    return node.id


def reaches_inside(source: str) -> Counter[str]:
    """What of our own names a test patches, and which private names of ours it reads or imports."""
    tree = ast.parse(source)
    roots, found = _roots(tree), Counter[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            root = _root(node.args[0])
            if node.func.attr in {"setattr", "setitem", "delattr", "delitem"} and roots.get(root, root) in OURS:
                found["patch " + _told(node.args)] += 1
        elif isinstance(node, ast.Attribute) and _is_private(node.attr) and _root(node) not in {"self", "cls", "super"}:
            found["read " + node.attr] += 1
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
            found.update("read " + a.name for a in node.names if _is_private(a.name))
    return found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _told(arguments: list[ast.expr]) -> str:
    """What `setattr(steps, "x", ...)` or `setattr("vcot.services.run.steps.x", ...)` patches."""
    names = arguments[:1] if isinstance(arguments[0], ast.Constant) else arguments[:2]
    return " ".join(ast.unparse(name).strip("'") for name in names)


def test_no_test_patches_a_name_of_ours_or_reads_a_private_one_anew():
    tests = {str(path.relative_to(ROOT)): path for path in (ROOT / "tests").rglob("*.py")}
    found = {name: reaches_inside(path.read_text("utf-8")) for name, path in tests.items()}
    assert not {name: new for name, here in found.items() if (new := here - Counter(LEFT.get(name, ())))}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from vcot.services.run import steps\nmonkeypatch.setattr(steps, 'x', 1)", "patch steps x"),
        ("monkeypatch.setattr('vcot.services.run.steps.x', 1)", "patch vcot.services.run.steps.x"),
        ("from vcot.services.run.steps import _x", "read _x"),
        ("run()._x", "read _x"),
        ("import os\nmonkeypatch.setattr(os, 'fsync', 1)\nmonkeypatch.setenv('A', 'b')\nself._x = 1", ""),
    ],
)
def test_what_reaches_inside(source, found):
    assert reaches_inside(source) == (Counter([found]) if found else Counter())


# make


def test_make_help_and_contributing_name_every_target():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    told = set(re.findall(r"^([a-z-]+):.*## \S", makefile, re.MULTILINE))
    assert set(phony.split()) == told
    contributing = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert not [name for name in phony.split() if f"make {name}" not in contributing and name != "help"]
