"""What a recipe names is found: a built-in, an object of a module of one's own, an entry point; else a sentence says why."""

import hashlib
import importlib
from collections import Counter
from pathlib import Path

import pytest

from vcot.pipeline.errors import RecipeError
from vcot.pipeline.plugins import Plugins

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


def test_an_object_within_another_is_found_and_its_file_is_told(tmp_path, monkeypatch):
    text = "from collections import Counter\nclass Mine:\n    class Own(Counter): pass\n"
    write_module(tmp_path, monkeypatch, "counting_e", text)
    assert COUNTERS.resolve("counting_e:Mine.Own").__qualname__ == "Mine.Own"
    digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    assert COUNTERS.digest_source("counting_e:Mine.Own") == digest
    assert COUNTERS.digest_own("counting_e:Mine.Own") == {"code": digest}


def test_what_is_built_in_adds_nothing_to_a_key():
    assert COUNTERS.digest_own("plain") == {}


def test_a_module_of_machine_code_is_told_by_its_file():
    path = Path(importlib.import_module("pydantic_core._pydantic_core").__file__)
    found = COUNTERS.digest_source("pydantic_core._pydantic_core:SchemaValidator")
    assert found == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("from collections import Counter\n", "does not define Counter; name the module that does"),
        ("class Counter(:\n", r"cannot be read \(SyntaxError"),
    ],
)
def test_a_file_that_does_not_define_the_object_is_not_digested(tmp_path, monkeypatch, text, said):
    write_module(tmp_path, monkeypatch, "counting_f", text)
    with pytest.raises(RecipeError, match=said):
        COUNTERS.digest_source("counting_f:Counter")


def test_a_package_that_has_no_file_is_not_digested(tmp_path, monkeypatch):
    (tmp_path / "counting_g").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=r"counting_g cannot be read .*No module named 'counting_g'"):
        COUNTERS.digest_source("counting_g:Counter")


def test_who_knows_what_the_objects_are_says_so_of_the_same_list():
    names = Plugins("counter", "vcot.test_counters", {"plain": "collections:Counter"})
    others = names.of_kind(lambda _: False, "something else")
    assert names.resolve("plain") is Counter
    with pytest.raises(
        RecipeError, match="counter collections:Counter is the class Counter, and must be something else"
    ):
        others.resolve("plain")
