"""docs/paper-run.md holds what `vcot doctor --recipe paper` prints, and only commands and settings that exist."""

import re
import shlex
from pathlib import Path

from vcot.services.planning.doctor import needed_memory
from vcot.services.planning.machine import MINIMUM_DRIVERS
from vcot.services.planning.outlook import render_costs, render_fits
from vcot.services.recipes.recipe import load_recipe
from vcot.training.protocol.shape import find_shape, read_shape

PAGE = (Path(__file__).parents[3] / "docs" / "paper-run.md").read_text("utf-8")
RECIPE = load_recipe("paper")
SHAPE = read_shape(find_shape(RECIPE.model.source))


def test_the_figures_are_the_programs_own():
    blocks = re.findall(r"```\n(.*?)\n```", PAGE, re.DOTALL)
    assert blocks == ["\n".join(render_fits(RECIPE, SHAPE)), "\n".join(render_costs(RECIPE, SHAPE))], (
        "take them from `vcot doctor --recipe paper`"
    )
    assert f"asks for {needed_memory(RECIPE):.0f} GiB" in PAGE
    assert f"({MINIMUM_DRIVERS[13]} or newer" in PAGE


def test_the_commands_can_be_given():
    lines = re.findall(r"(?:^    |`)(vcot (?:run|doctor|rounds)[^`#\n]*)", PAGE, re.MULTILINE)
    given = [shlex.split(line) for line in lines if "..." not in line and "NAME" not in line]
    assert len(given) >= 7
    for words in given:
        flags = words[words.index("--set") + 1 :] if "--set" in words else []
        recipe = load_recipe("paper", flags)
        assert recipe.train.batch_size * recipe.train.gradient_accumulation == 32


def test_every_setting_that_is_named_exists():
    for section, field in re.findall(r"`(serve|train|judge|pairs|merge|tasks|eval|model)\.(\w+)", PAGE):
        assert field in type(getattr(RECIPE, section)).model_fields, f"{section}.{field}"
