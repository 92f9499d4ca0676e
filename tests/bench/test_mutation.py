"""What `make mutation` counts: changes of behaviour, in files and by tests that are there."""

import pytest

from bench.mutation import ROOT, find_mutants, lift_decorators, list_mutants, read_spec, run_mutants

MODULE = """
class Box:
    @property
    def is_full(self):
        return self.size > 3

    @other
    def empty(self):
        pass
"""


def test_every_file_and_test_that_it_names_is_there():
    tests, equivalent = read_spec()
    named = [each.removeprefix("--deselect=") for chosen in tests.values() for each in chosen]
    for path in {*tests, *(file for file, *_ in equivalent), *(name.partition("::")[0] for name in named)}:
        assert (ROOT / path).exists(), path
    for name in (name for name in named if "::" in name):
        path, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / path).read_text("utf-8"), name


def test_a_property_is_written_so_that_mutmut_changes_it():
    lifted = lift_decorators(MODULE)
    assert "    is_full = property(is_full)" in lifted
    assert "@property" not in lifted
    assert "    @other\n    def empty(self):" in lifted
    scope: dict = {"other": lambda function: function}
    exec(lifted, scope)
    box = scope["Box"]()
    box.size = 4
    assert box.is_full is True


@pytest.mark.parametrize(
    ("was", "becomes", "is_counted"),
    [
        ("return size > 3", "return size >= 3", True),
        ("return 'open'", "return 'XXopenXX'", True),
        ("raise Fault(size, kind='late')", "raise Fault(None, kind='late')", False),
        ("raise Fault(size, kind='late')", "raise Fault(size, kind=None)", True),
        ("say('it is open')", "say('XXit is openXX')", False),
        ("self.is_on = False", "self.is_on = None", False),
        ("self.is_on = False", "self.is_on = True", True),
    ],
)
def test_words_for_people_do_not_count(was, becomes, is_counted):
    mutated = f"def x_f__mutmut_orig(size):\n    {was}\n\ndef x_f__mutmut_1(size):\n    {becomes}\n"
    found = list(list_mutants("eval/table.py", mutated, ["x_f__mutmut_1"]))
    assert [(mutant.name, mutant.key) for mutant in found] == (
        [("vcot.eval.table.x_f__mutmut_1", ("eval/table.py", was, becomes))] if is_counted else []
    )


COUNTED = """
def count_down(number):
    while number > 0:
        number -= 1
    return number

def unasked(number):
    return number + 1
"""
FATES = {
    "while number > 1:": "killed",
    "number += 1": "timeout",  # it never ends
    "return number + 2": "survived",  # no test reaches it
}
TESTS = """
from functools import lru_cache
from vcot import box

once = lru_cache(box.count_down)

def test_first():
    assert once(2) == 0

def test_second():
    assert once(2) == 0
"""


def run_on_each_mutant(directory, tests):
    (directory / "vcot").mkdir()
    (directory / "vcot" / "__init__.py").touch()
    (directory / "vcot" / "box.py").write_text(COUNTED, "utf-8")
    (directory / "setup.cfg").write_text("[mutmut]\nsource_paths=vcot\n", "utf-8")
    (directory / "test_box.py").write_text(tests, "utf-8")
    (directory / "bench").symlink_to(ROOT / "bench")
    mutants = [mutant for mutant in find_mutants(directory, "box.py") if mutant.becomes in FATES]
    fates = run_mutants(directory, "box.py", ["test_box.py"], mutants)
    return {mutant.becomes: fates[mutant.name] for mutant in mutants}


def test_each_mutant_is_killed_survives_or_does_not_end_whatever_was_cached_for_another(tmp_path):
    assert run_on_each_mutant(tmp_path, TESTS) == FATES


def test_tests_that_fail_without_a_change_end_the_command(tmp_path):
    with pytest.raises(SystemExit, match="test_first fails without any change"):
        run_on_each_mutant(tmp_path, TESTS.replace("== 0", "== 3"))


def test_tests_that_cannot_be_imported_end_the_command(tmp_path):
    with pytest.raises(SystemExit, match="No module named 'boxes'"):
        run_on_each_mutant(tmp_path, "import boxes")
