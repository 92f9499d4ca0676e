import re
from pathlib import Path

import pytest

from vcot.pipeline.errors import RecipeError
from vcot.pipeline.fields import Section
from vcot.services.cli.target import as_source
from vcot.services.recipes.recipe import Recipe, list_recipes, load_recipe, parse_recipe, render_recipe
from vcot.services.run.directory import RECIPE, open_run


@pytest.mark.parametrize("name", list_recipes())
def test_every_bundled_recipe_is_valid_and_survives_rendering(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert parse_recipe(render_recipe(recipe)) == recipe


def test_every_field_is_documented():
    sections = [f.annotation for f in Recipe.model_fields.values() if isinstance(f.annotation, type)]
    for section in sections:
        if issubclass(section, Section):
            assert all(field.description for field in section.model_fields.values()), section


def test_the_papers_numbers():
    paper = load_recipe("paper")
    assert (paper.sample.k, paper.sample.temperature, paper.judge.model) == (8, 0.5, "gpt-4o-mini")
    train = paper.train
    assert (train.lora_r, train.lora_alpha, train.lora_dropout, train.target_modules) == (64, 128, 0.1, "all-linear")
    assert (train.learning_rate, train.epochs, paper.pairs.validation_fraction) == (1e-5, 2, 0.1)
    assert (paper.eval.temperatures, paper.eval.prompts) == ((0.4, 0.8), ("zero_shot", "cot"))


def test_the_papers_weights_and_data_are_pinned_by_commit():
    paper = load_recipe("paper")
    for section in (paper.model, paper.tasks, paper.eval):
        assert re.fullmatch("[0-9a-f]{40}", section.revision)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epoch=3", r"unknown field train\.epoch \(did you mean epochs\?\)"),
        ("trian.epochs=3", r"unknown field trian \(did you mean train\?\)"),
        ("sample.k=1", r"sample\.k = 1: input should be greater than or equal to 2"),
        ("train.learning_rate=fast", r"train\.learning_rate = 'fast'"),
        ("train.report_to=wandb", r"train\.report_to = 'wandb': it takes a list; write train\.report_to=\[\"wandb\"\]"),
        ("eval.temperatures=2020-01-01", r"eval\.temperatures = datetime.*: it takes a list"),
        ("sample.k", "has no '='"),
        ("name.x=1", "name is a field"),
        ("sample.temperature=0", r"sample\.temperature = 0: input should be greater than 0"),
    ],
)
def test_a_wrong_override_names_field_value_and_nearest(override, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe("nano", [override])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epochs=true", "train.epochs: true is for what is on or off"),
        ("sample.temperature=false", "false is for what is on or off"),
        ("train.seed=-1", "train.seed = -1: input should be greater"),
        ("train.seed=4294967296", "less than 2147483648"),
        ("model.revision=12345678", "model.revision = 12345678: it takes a text; put it in double quotes"),
        ("name=2026-11-28", "name = 2026-11-28: it takes a text"),
        ("train.epochs=1\nname='x'", "train.epochs = \"1\\nname='x'\": input should be a valid number"),
    ],
)
def test_what_would_be_read_as_something_else_or_fail_after_the_judge_was_paid_is_refused(override, said):
    with pytest.raises(RecipeError) as error:
        load_recipe("nano", [override])
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["a\\b.csv", 'a"b.csv', "a\\new.csv", "a'b#c.csv"])
def test_a_path_given_as_a_flag_is_taken_as_it_is(name):
    assert load_recipe("nano", as_source("table", Path("/data") / name)).tasks.path == f"/data/{name}"


def test_overrides_are_toml_values_or_plain_strings():
    recipe = load_recipe(
        "nano", ["sample.k=4", "eval.temperatures=[0.1]", "tasks.path=/some/where", "train.batch-size=2"]
    )
    assert (recipe.sample.k, recipe.eval.temperatures) == (4, (0.1,))
    assert (recipe.tasks.path, recipe.train.batch_size) == ("/some/where", 2)


def test_an_empty_value_goes_back_to_the_default():
    assert load_recipe("nano", ["tasks.path=/x", "tasks.path=", "sample.k="]).tasks.path is None
    with pytest.raises(RecipeError, match=r"tasks\.source is missing"):
        load_recipe("nano", ["tasks.source="])


@pytest.mark.parametrize(("name", "said"), [("nanno", "did you mean nano"), ("none.toml", "does not exist")])
def test_an_unknown_recipe_names_the_nearest(name, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(name)


def test_a_missing_field_and_broken_toml_are_said(tmp_path):
    with pytest.raises(RecipeError, match="model is missing"):
        parse_recipe('name = "x"')
    with pytest.raises(RecipeError, match="is not TOML"):
        parse_recipe("name = ")


def test_many_greedy_samples_make_no_sense():
    with pytest.raises(RecipeError, match=r"eval: at temperature 0 all responses are the same"):
        load_recipe("nano", ["eval.temperatures=[0, 0.4]", "eval.num_samples=2"])


def test_an_adapter_that_vllm_would_serve_in_part_is_refused():
    with pytest.raises(RecipeError, match=r"serve_as = adapter, but .* = all-linear: .* set language-model there"):
        load_recipe("nano", ["merge.serve_as=adapter"])
    recipe = load_recipe("nano", ["merge.serve_as=adapter", "train.target_modules=language-model"])
    assert recipe.merge.serve_as == "adapter"


OLDER = """
[eval]
# The data set.
source = "nano"
split = "test"
num_tasks = 9
"""
"""As the runs of 0.1 keep it."""


def test_a_recipe_of_an_older_run_names_its_benchmark_as_a_source(tmp_path):
    text = render_recipe(load_recipe("nano"))
    older = text[: text.index("[eval]")] + OLDER
    assert parse_recipe(older).eval.benchmark == "nano"
    assert parse_recipe(older, ["eval.benchmark=scienceqa"]).eval.benchmark == "scienceqa"
    (tmp_path / RECIPE).write_text(older)
    with open_run(tmp_path, None, ["eval.seed=1"]) as run:
        assert (run.recipe.eval.benchmark, run.recipe.eval.num_tasks, run.changes) == ("nano", 9, ("eval.seed=1",))
    assert (tmp_path / RECIPE).read_text() == older


def test_a_flag_of_the_old_name_is_told_the_new_one():
    with pytest.raises(RecipeError, match=r"eval\.source is called eval\.benchmark now"):
        load_recipe("nano", ["eval.source=scienceqa"])


def test_a_benchmark_that_cannot_be_meant_is_said_as_the_recipe_is_read():
    with pytest.raises(
        RecipeError, match=r"eval\.benchmark: there is no benchmark 'scienceq'; do you mean scienceqa\?"
    ):
        load_recipe("nano", ["eval.benchmark=scienceq"])
    assert load_recipe("nano", ["eval.benchmark=mine.clocks:CLOCKS"]).eval.benchmark == "mine.clocks:CLOCKS"


def test_sections_in_a_section_are_read_and_written_and_their_private_fields_are_nobodys_business():
    member = '{kind = "pointwise", model = "some/where/gpt", base_url = "http://secret/v1", api_key_env = "MY_KEY"}'
    recipe = load_recipe("nano", [f'judge.members=[{member}, {{kind = "verifier"}}]', "judge.kind=ensemble"])
    assert [each.kind for each in recipe.judge.members] == ["pointwise", "verifier"]
    assert parse_recipe(render_recipe(recipe)) == recipe
    public = render_recipe(recipe, public=True)
    assert 'members = [{"kind" = "pointwise", "model" = "gpt"}, {}]' in public
    assert "secret" not in public
    assert "MY_KEY" not in public


def test_a_wrong_field_of_a_section_in_a_section_is_named_with_its_place():
    with pytest.raises(RecipeError, match=r"unknown field judge\.members\.1\.knd \(did you mean kind\?\)"):
        load_recipe("nano", ['judge.members=[{}, {knd = "x"}]'])


@pytest.mark.parametrize("override", ["judge.image=blank", 'judge.members=[{kind = "pointwise", image = "other"}]'])
def test_the_controls_of_the_audit_are_no_settings_of_a_run(override):
    with pytest.raises(RecipeError, match=r"judge\.image is own or none"):
        load_recipe("nano", [override])
