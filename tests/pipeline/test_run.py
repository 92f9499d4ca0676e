import subprocess
import sys

import pytest

from pipeline.errors import InputError, RecipeError
from pipeline.run import RECIPE, exclusive, open_run


def test_a_new_run_keeps_its_recipe_and_needs_none_later(tmp_path):
    run = open_run(tmp_path / "r", "nano", ["sample.k=4"])
    assert open_run(tmp_path / "r").recipe == run.recipe
    assert open_run(tmp_path / "r", overrides=["sample.k=5"]).recipe.sample.k == 5
    assert open_run(tmp_path / "r", "nano").recipe.sample.k == 5


@pytest.mark.parametrize(
    ("recipe", "overrides", "said"),
    [
        (None, [], "is not a run yet"),
        ("nano", ["sample.kk=3"], r"sample\.kk"),
    ],
)
def test_bad_input_leaves_no_run_behind(tmp_path, recipe, overrides, said):
    with pytest.raises(RecipeError, match=said):
        open_run(tmp_path / "r", recipe, overrides)
    assert not (tmp_path / "r").exists()


def test_bad_input_leaves_a_run_as_it_was(tmp_path):
    open_run(tmp_path, "nano")
    before = (tmp_path / RECIPE).read_bytes()
    with pytest.raises(RecipeError, match="begun with recipe nano, not paper"):
        open_run(tmp_path, "paper")
    with pytest.raises(RecipeError, match="did you mean"):
        open_run(tmp_path, overrides=["train.lora_rr=3"])
    assert (tmp_path / RECIPE).read_bytes() == before


def test_a_directory_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        open_run(tmp_path / "file" / "run", "nano")


def test_one_writer_at_a_time_and_the_lock_goes_with_its_process(tmp_path):
    run = open_run(tmp_path, "nano")
    code = (
        "import os, pathlib, sys; from pipeline.run import *; "
        f"run = open_run(pathlib.Path({str(tmp_path)!r}))\n"
        "with exclusive(run):\n    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another vcot command is writing"), exclusive(run):
            pass
        holder.kill()
    with exclusive(run):
        pass
