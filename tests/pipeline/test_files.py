"""Files are there whole or not at all, and texts in another encoding are a sentence."""

import os
import resource
import subprocess
import sys

import pytest

from pipeline.errors import InputError
from pipeline.files import replace_file
from pipeline.recipe import load_recipe
from pipeline.run import exclusive, open_run


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "kept"
    replace_file(path, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            replace_file(path, b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
    assert path.read_text() == "old"


def test_what_a_killed_writer_left_goes_with_the_next_writer_of_the_run(tmp_path):
    with open_run(tmp_path / "r", "nano") as run:
        left = [run.path(folder, ".a.123.partial") for folder in ("images", "tasks", "report")]
        for path in left:
            path.touch()
        left.append(run.path("pairs", ".key.partial"))
        left[-1].mkdir()
        with exclusive(run):
            assert not any(path.exists() for path in left)


@pytest.mark.parametrize(
    ("encoding", "is_read"), [("utf-8", True), ("utf-8-sig", True), ("utf-16", False), ("latin-1", False)]
)
def test_a_recipe_is_utf_8_or_its_encoding_is_said(tmp_path, encoding, is_read):
    path = tmp_path / "r.toml"
    with open_run(tmp_path / "r", "nano") as run:
        text = (run.directory / "recipe.toml").read_text("utf-8")
    path.write_text(f"# für\n{text}", encoding)
    if is_read:
        assert load_recipe(str(path)).name == "nano"
    else:
        with pytest.raises(InputError, match=r"r\.toml is not in UTF-8 .*save it in that encoding"):
            load_recipe(str(path))


def test_a_run_that_cannot_be_written_to_its_end_is_a_sentence(tmp_path):
    """Under `ulimit -f` no writer is told by an exception of its own that the file is too large."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); "
        "from services.cli import main; sys.argv = ['vcot', 'judge', '--recipe', 'nano', '--run', sys.argv[1]]; main()"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "r")], capture_output=True, text=True, timeout=60, env=os.environ
    )
    assert "Traceback" not in out.stderr
    assert out.stderr.startswith("vcot: ")
    assert out.returncode in (1, 2)
