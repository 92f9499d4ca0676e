"""The documentation is built, without a link that leads nowhere, and says of recipes what the types say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vcot.services.recipes.recipe import Recipe
from vcot.services.recipes.settings_page import render_page

ROOT = Path(__file__).parent.parent
BESIDE = (
    *("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "compose.yaml"),
    *("services", "pipeline", "training", "eval", "tests", "requirements"),
)


def build(folder):
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in BESIDE:
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_the_site_is_built_and_holds_every_page(copy):
    code, said = build(copy)
    assert code == 0, said
    pages = {path.stem for path in (copy / "site").glob("*.html")} - {"404"}
    assert pages == {path.stem for path in (ROOT / "docs").glob("*.md")} | {"index", "contributing", "changelog"}
    first = (copy / "site" / "index.html").read_text("utf-8")
    assert 'href="judges.html"' in first
    assert 'src="http' not in first, "a page is read without a network"


@pytest.mark.parametrize("link", ["gone.md", "judges.md#no-such-heading", "../gone.py"])
def test_a_link_that_leads_nowhere_fails(copy, link):
    with (copy / "docs" / "sampling.md").open("a", encoding="utf-8") as page:
        page.write(f"\n[somewhere]({link})\n")
    code, said = build(copy)
    assert code
    assert link.rpartition("/")[2].partition("#")[0] in said


def test_the_page_of_recipes_is_as_the_types_are():
    assert (ROOT / "docs" / "recipes.md").read_text("utf-8") == render_page(), "`make docs` writes it anew"
    for name, field in Recipe.model_fields.items():
        for setting in getattr(field.annotation, "model_fields", {}):
            assert f"| `{setting}` |" in render_page().partition(f"## {name}\n")[2], f"{name}.{setting}"


def test_each_rule_of_correctness_has_a_guard_and_tests_that_are_there():
    text = (ROOT / "docs" / "correctness.md").read_text("utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rules = [(guard, tests) for rule, guard, tests in rows if rule != "rule"]
    assert len(rules) >= 40
    for guard, tests in rules:
        assert all((ROOT / path).exists() for path in re.findall("`([^`]+)`", guard)), guard
        named = re.findall(r"`(tests/[^`]+)::(\w+)`", tests)
        assert named, tests
        for path, name in named:
            assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text("utf-8"), re.MULTILINE), name
