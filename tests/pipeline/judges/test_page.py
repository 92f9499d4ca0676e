"""docs/judges.md says what the code does."""

import re
from pathlib import Path

import pytest

from tests.pages import list_blocks
from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges import count_requests, find_judge
from vcot.pipeline.open_lists import JUDGE_NAMES
from vcot.pipeline.sections import JudgeSection
from vcot.services.recipes.recipe import load_recipe, parse_recipe, render_recipe

PAGE = (Path(__file__).parents[3] / "docs" / "judges.md").read_text("utf-8")


@pytest.mark.parametrize("block", list_blocks("Judges that go by others", "toml", "judges.md"))
def test_the_recipes_of_judges_that_go_by_others_are_read(tmp_path, block):
    nano = render_recipe(load_recipe("nano"))
    before, _, rest = nano.partition("[judge]")
    recipe = parse_recipe(f"{before}{block}\n[pairs]{rest.partition('[pairs]')[2]}")
    assert find_judge(recipe.judge, ImageStore(tmp_path)).members


def test_every_judge_is_in_the_table():
    assert re.findall(
        r"^\| `(\w+)` \| [^|]*\| [^|]*\| [^|]*\|", PAGE.partition("## Settings")[0], re.MULTILINE
    ) == list(JUDGE_NAMES.built_ins)


def test_the_requests_are_those_of_the_table():
    counted = {kind: count_requests(JudgeSection(kind=kind), 8) for kind in JUDGE_NAMES.built_ins}
    expected = {
        "verifier": 0,
        "pointwise": 8,
        "expected": 8,
        "claims": 64,
        "pairwise": 8 * 7,
        "gated": 0,
        "ensemble": 0,
    }
    assert counted == expected
    assert count_requests(JudgeSection(kind="pairwise", schedule="swiss"), 8) == 32
