"""What a recipe names is found: a built-in, an object of a module of one's own, an entry point; else a sentence says why."""

from collections import Counter

import pytest

from pipeline.errors import RecipeError
from pipeline.plugins import Plugins

COUNTERS: Plugins[type[Counter]] = Plugins(
    what="counter",
    group="vcot.test_counters",
    built_ins={"plain": "collections:Counter", "broken": "no_such_package.x:Y"},
    is_one=lambda found: isinstance(found, type) and issubclass(found, Counter),
    must_be="a subclass of collections.Counter",
)


def write_module(folder, monkeypatch, name, text):
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)


def test_a_built_in_is_found_by_its_name():
    assert COUNTERS.resolve("plain") is Counter


def test_an_object_of_a_module_of_ones_own_is_found_by_its_path(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, "counting_a", "from collections import Counter\nclass Mine(Counter): pass\n")
    assert COUNTERS.check("counting_a:Mine") == "counting_a:Mine"
    assert COUNTERS.resolve("counting_a:Mine").__name__ == "Mine"


def test_an_entry_point_of_an_installed_package_is_found_by_its_name(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, "counting_b", "from collections import Counter\nclass Mine(Counter): pass\n")
    about = tmp_path / "mine-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[vcot.test_counters_b]\nmine = counting_b:Mine\n")
    counters = Plugins("counter", "vcot.test_counters_b", {}, COUNTERS.is_one, COUNTERS.must_be)
    assert counters.check("mine") == "mine"
    assert counters.resolve("mine").__name__ == "Mine"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("plian", "there is no counter 'plian'; do you mean plain?; built in are plain, broken, and one of your own"),
        ("a b:c", "there is no counter 'a b:c'"),
        ("collections:Conter", "counter collections:Conter: collections has no Conter"),
        ("broken", "importing no_such_package.x failed (ModuleNotFoundError: No module named 'no_such_package')"),
        ("collections:OrderedDict", "is the class OrderedDict, and must be a subclass of collections.Counter"),
        ("string:digits", "is an object of type str, and must be a subclass of collections.Counter"),
    ],
)
def test_what_cannot_be_used_is_said_with_its_remedy(name, said):
    with pytest.raises(RecipeError) as caught:
        COUNTERS.resolve(name)
    assert said in str(caught.value)


def test_a_module_that_fails_as_it_is_imported_is_said_with_its_own_words(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, "counting_c", "raise OSError('the disk is gone')\n")
    with pytest.raises(RecipeError, match=r"importing counting_c failed \(OSError: the disk is gone\)"):
        COUNTERS.resolve("counting_c:Mine")


def test_reading_a_recipe_imports_nothing(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, "counting_d", "raise SystemError\n")
    assert COUNTERS.check("counting_d:Mine") == "counting_d:Mine"
