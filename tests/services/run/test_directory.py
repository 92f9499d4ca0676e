import subprocess
import sys

import pytest

from vcot.pipeline.errors import DataError, InputError, RecipeError
from vcot.pipeline.records import Judgment
from vcot.services.run.directory import RECIPE, open_run


def recipe_of(directory, recipe=None, overrides=()):
    with open_run(directory, recipe, overrides) as run:
        return run.recipe


def test_a_new_run_keeps_its_recipe_and_needs_none_later(tmp_path):
    recipe = recipe_of(tmp_path / "r", "nano", ["sample.k=4"])
    assert recipe_of(tmp_path / "r") == recipe
    assert recipe_of(tmp_path / "r", "nano") == recipe


def test_a_flag_holds_for_one_command_unless_it_is_saved(tmp_path):
    with open_run(tmp_path / "r", "nano", ["eval.seed=3"]) as run:
        assert (run.changes, run.overrides) == ((), ()), "a run is what it was begun with"
    before = (tmp_path / "r" / RECIPE).read_bytes()
    with open_run(tmp_path / "r", None, ["sample.k=5", "eval.seed=3"]) as run:
        assert (run.recipe.sample.k, run.kept.sample.k) == (5, 8)
        assert run.changes == ("sample.k=5",)
    assert (tmp_path / "r" / RECIPE).read_bytes() == before
    with open_run(tmp_path / "r", None, ["sample.k=5"], save=True) as run:
        assert run.changes == ()
    assert recipe_of(tmp_path / "r").sample.k == 5
    assert recipe_of(tmp_path / "r").eval.seed == 3


@pytest.mark.parametrize(
    ("recipe", "overrides", "said"),
    [
        (None, [], "is not a run yet"),
        ("nano", ["sample.kk=3"], r"sample\.kk"),
    ],
)
def test_bad_input_leaves_no_run_behind(tmp_path, recipe, overrides, said):
    with pytest.raises(RecipeError, match=said):
        recipe_of(tmp_path / "r", recipe, overrides)
    assert not (tmp_path / "r").exists()


def test_bad_input_leaves_a_run_as_it_was(tmp_path):
    recipe_of(tmp_path, "nano")
    before = (tmp_path / RECIPE).read_bytes()
    with pytest.raises(RecipeError, match="begun with recipe nano, not paper"):
        recipe_of(tmp_path, "paper")
    with pytest.raises(RecipeError, match="did you mean"):
        recipe_of(tmp_path, overrides=["train.lora_rr=3"])
    assert (tmp_path / RECIPE).read_bytes() == before


def test_an_override_that_turns_out_to_be_bad_input_is_not_kept(tmp_path):
    recipe_of(tmp_path / "old", "nano")
    for directory in (tmp_path / "old", tmp_path / "new"):
        with pytest.raises(DataError), open_run(directory, "nano", ["tasks.num_tasks=3"], save=True):
            raise DataError("no such folder")
    assert recipe_of(tmp_path / "old").tasks.num_tasks != 3
    assert not (tmp_path / "new" / RECIPE).exists()


def test_a_run_that_was_not_begun_leaves_nothing_and_one_with_answers_stays(tmp_path):
    def fail(directory, *records):
        with open_run(directory, "nano") as run:
            run.ledger.put(records)
            raise DataError("no such folder")

    (tmp_path / "mine").mkdir()
    for name in ("new", "mine"):
        with pytest.raises(DataError):
            fail(tmp_path / name)
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "mine").is_dir(), "it was there before"
    with pytest.raises(DataError):
        fail(tmp_path / "paid", Judgment(key="k", response="r", task="t", judge="j", score=1.0))
    assert recipe_of(tmp_path / "paid").name == "nano", "what was answered is found again"


def test_a_run_that_another_command_begins_meanwhile_is_not_taken_away(tmp_path):
    with open_run(tmp_path / "r", "nano", access="alone"):
        with pytest.raises(InputError, match="another vcot"), open_run(tmp_path / "r", "nano", access="alone"):
            pass
        assert (tmp_path / "r" / RECIPE).is_file()


def test_a_reader_makes_nothing(tmp_path):
    with pytest.raises(RecipeError, match="is not a run yet"), open_run(tmp_path / "r", access="read"):
        pass
    with pytest.raises(DataError), open_run(tmp_path / "r", "nano", access="read"):
        raise DataError("as to steer a gateway elsewhere, which is not there")
    assert not (tmp_path / "r").exists()
    recipe_of(tmp_path / "r", "nano")
    with open_run(tmp_path / "r", access="read") as run:
        assert run.ledger.is_empty()
        assert not run.path("report", "index.html").parent.exists()
        run.ledger.close()
    with (
        pytest.raises(InputError, match="only reads"),
        open_run(tmp_path / "r", None, ["sample.k=3"], save=True, access="read"),
    ):
        pass
    assert [path.name for path in (tmp_path / "r").iterdir()] == [RECIPE]


def test_a_directory_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        recipe_of(tmp_path / "file" / "run", "nano")


def test_one_writer_at_a_time_and_the_lock_goes_with_its_process(tmp_path):
    recipe_of(tmp_path, "nano")
    code = (
        "import pathlib, sys; from vcot.services.run.directory import *\n"
        f"with open_run(pathlib.Path({str(tmp_path)!r}), access='alone'):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with (
        open_run(tmp_path) as run,
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder,
    ):
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another vcot command is writing"), open_run(tmp_path, access="alone"):
            pass
        with open_run(tmp_path, access="read"):
            pass
        with (
            pytest.raises(InputError, match="another vcot"),
            open_run(tmp_path, None, ["sample.k=3"], save=True, access="alone"),
        ):
            pass
        assert recipe_of(tmp_path).sample.k == 8, "the recipe is as the one who writes has it"
        holder.kill()
        holder.wait()
        left = run.path("images", "ab.77.partial")
        left.write_bytes(b"half")
        with open_run(tmp_path, access="alone"):
            assert not left.exists(), "what a killed command left is removed"


@pytest.mark.parametrize("value", ["a\rb", "\x1b[31m", "\x7f", 'say "\\"', "two\nlines", "tab\there"])
def test_a_value_that_toml_must_escape_does_not_end_the_run(tmp_path, value):
    with open_run(tmp_path, "nano", [f"judge.model={value}"]):
        pass
    assert recipe_of(tmp_path).judge.model == value


@pytest.mark.parametrize("value", ["inf", "nan", "1e999"])
def test_a_setting_that_is_no_number_is_refused(tmp_path, value):
    with pytest.raises(RecipeError, match="start_timeout_s"):
        recipe_of(tmp_path, "nano", [f"serve.start_timeout_s={value}"])


def test_a_recipe_that_cannot_be_written_leaves_the_run_as_it_was(tmp_path):
    before = recipe_of(tmp_path, "nano")
    with pytest.raises(InputError), open_run(tmp_path, None, ["judge.model=\udce9"], save=True):
        pass
    assert recipe_of(tmp_path) == before
