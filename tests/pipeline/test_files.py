"""What later commands depend on is on disk whole or not at all, can be read again, and has a last good copy."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from vcot.pipeline.errors import CheckpointError, InputError
from vcot.pipeline.files import (
    previous_of,
    read_record,
    replace_file,
    replacing_folder,
    write_kept_record,
    write_record,
)
from vcot.pipeline.manifest import Canary, CheckpointManifest
from vcot.pipeline.records import CheckpointRef, Record, SamplingParams
from vcot.services.recipes.recipe import load_recipe
from vcot.services.run.directory import open_run


class Pair(Record):
    name: str
    value: float


def read(path: Path) -> Pair | None:
    return read_record(path, Pair, CheckpointError, remedy="restore it")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_record_holds_what_json_cannot_say(value: float) -> None:
    with pytest.raises(ValidationError):
        Pair(name="x", value=value)
    with pytest.raises(ValidationError):
        SamplingParams(temperature=value, max_tokens=1, seed=0)
    with pytest.raises(ValidationError):
        Canary(image_png_base64="", prompt="", prompt_tokens=(1,), tokens=(1,), logprobs=(value,), leads=(0.0,))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "null", '"NaN"'])
def test_no_record_is_read_of_what_is_no_number(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(f'{{"name": "x", "value": {text}}}')
    with pytest.raises(CheckpointError, match=r"r.json is not a Pair \(value: .*\); restore it"):
        read(path)


def test_a_record_is_on_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power failure leaves an empty file under the name of a whole one."""
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append("rename"), replace(self, to)))
    write_record(tmp_path / "r.json", Pair(name="x", value=0.5))
    assert events == ["fsync", "rename"]
    assert read(tmp_path / "r.json") == Pair(name="x", value=0.5)


@pytest.mark.parametrize("write", [write_record, write_kept_record])
@pytest.mark.parametrize("change", [{"value": float("nan")}, {"value": None}, {"name": "\ud800"}])
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, write: Any, change: dict[str, Any]) -> None:
    """`model_copy` checks nothing."""
    path, good = tmp_path / "r.json", Pair(name="x", value=0.5)
    write(path, good)
    with pytest.raises(InputError, match=r"r.json stays as it is"):
        write(path, good.model_copy(update=change))
    assert read(path) == good


def test_a_damaged_file_names_the_last_good_copy(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for value in (1.0, 2.0):
        write_kept_record(path, Pair(name="x", value=value))
    path.write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"last good copy is .*r.json.previous: `cp .*` goes back .* or restore it"
    ):
        read(path)
    write_kept_record(path, Pair(name="x", value=3.0))
    assert read(previous_of(path)) == Pair(name="x", value=1.0), "what cannot be read takes no good copy's place"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe{}", "{}".encode("utf-16"), b"[" * 100_000, b"\x00"])
def test_bytes_that_are_no_text_are_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a Pair"):
        read(tmp_path / "r.json")


def test_a_folder_is_one_sentence_and_nothing_is_none(tmp_path: Path) -> None:
    assert read(tmp_path / "absent.json") is None
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path)


def test_a_manifest_with_a_nan_is_refused_before_it_is_registered(tmp_path: Path) -> None:
    from tests.services.fake_vllm import write_checkpoint
    from vcot.services.checkpoints.registry import Registry

    registry = Registry(tmp_path / "run")
    registry.register(write_checkpoint(tmp_path / "good", "good", 1.0))
    bad = write_checkpoint(tmp_path / "bad", "bad", 2.0)
    manifest = (bad / "checkpoint.json").read_text()
    for text in ("NaN", "Infinity", "1e999", "null"):
        (bad / "checkpoint.json").write_text(manifest.replace("-222.0", text, 1))
        with pytest.raises(CheckpointError, match="is not a CheckpointManifest"):
            registry.register(bad)
    assert [checkpoint.ref.name for checkpoint in Registry(tmp_path / "run").list()] == ["good"]


def test_a_damaged_registry_offers_its_last_good_copy(tmp_path: Path) -> None:
    from tests.services.fake_vllm import write_checkpoint
    from vcot.services.checkpoints.registry import Registry

    registry = Registry(tmp_path / "run")
    for name in ("a", "b"):
        registry.register(write_checkpoint(tmp_path / name, name, 1.0 if name == "a" else 2.0))
    path = tmp_path / "run" / "checkpoints" / "registry.json"
    path.write_text(path.read_text().replace("-222.0", "null", 1))
    with pytest.raises(CheckpointError, match=r"registry.json is not a RegistryFile .*registry.json.previous"):
        Registry(tmp_path / "run").list()
    previous_of(path).replace(path)
    assert [checkpoint.ref.name for checkpoint in Registry(tmp_path / "run").list()] == ["a"]


def test_a_manifest_of_a_record_is_itself(tmp_path: Path) -> None:
    ref = CheckpointRef(name="x", digest="sha256:1", kind="base")
    write_record(tmp_path / "m.json", CheckpointManifest(checkpoint=ref))
    assert read_record(tmp_path / "m.json", CheckpointManifest, remedy="") == CheckpointManifest(checkpoint=ref)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "kept"
    replace_file(path, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            replace_file(path, b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
    assert path.read_text() == "old"
    assert caught.value.filename == str(path)


def fill(path: Path) -> None:
    path.write_bytes(b"x" * 2000)


def fill_by_arrow(path: Path) -> None:
    parquet.write_table(pa.table({"x": list(range(10_000))}), path)


@pytest.mark.parametrize("write", [fill, fill_by_arrow])
def test_a_folder_that_cannot_be_written_to_its_end_is_named(tmp_path, write):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught, replacing_folder(tmp_path / "pairs") as folder:
            write(folder / "train.parquet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / "pairs")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_goes_with_the_next_writer_of_the_run(tmp_path):
    with open_run(tmp_path / "r", "nano") as run:
        left = [run.path(folder, ".a.123.partial") for folder in ("images", "tasks", "report")]
        for path in left:
            path.touch()
        left.append(run.path("pairs", ".key.partial"))
        left[-1].mkdir()
    with open_run(tmp_path / "r", access="alone"):
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
        "from vcot.services.cli.outcome import main; "
        "sys.argv = ['vcot', 'judge', '--recipe', 'nano', '--run', sys.argv[1]]; main()"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "r")], capture_output=True, text=True, timeout=60, env=os.environ
    )
    assert "Traceback" not in out.stderr
    assert out.stderr.startswith("vcot: ")
    assert out.returncode in (1, 2)
