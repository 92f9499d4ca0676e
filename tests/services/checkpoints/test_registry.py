import fcntl
import json
import os
import shutil
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.services.fake_vllm import make_canary, write_checkpoint
from vcot.pipeline.errors import CheckpointError
from vcot.pipeline.identity import MANIFEST, compute_digest
from vcot.pipeline.manifest import CheckpointManifest
from vcot.pipeline.records import CheckpointRef
from vcot.pipeline.sections import ModelSection
from vcot.services.checkpoints import integrity
from vcot.services.checkpoints.registry import Registry


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", "seed", 1.0, kind="base")


def test_base_takes_the_recipes_name_and_both_aliases(tmp_path: Path, source: Path) -> None:
    registry = Registry(tmp_path / "run")
    base = registry.base(ModelSection(source=str(source)))
    assert (base.ref.name, base.ref.digest) == ("base", compute_digest(source))
    assert registry.aliases() == {"base": "base", "policy": "base"}
    assert registry.live() == "base"
    assert Registry(tmp_path / "run").resolve("policy") == base


def test_registered_checkpoints_and_the_live_one_survive_a_restart(tmp_path: Path, source: Path) -> None:
    registry = Registry(tmp_path / "run")
    registry.base(ModelSection(source=str(source)))
    registry.register(write_checkpoint(tmp_path / "a", "dpo-1", 2.0))
    other_process = Registry(tmp_path / "run")
    other_process.set_live("policy", "dpo-1")
    assert registry.live() == "dpo-1"
    assert registry.resolve("policy").ref.name == "dpo-1"
    assert [c.ref.name for c in registry.list()] == ["base", "dpo-1"]


def test_registering_again_changes_nothing_but_other_weights_need_another_name(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "run")
    first = registry.register(write_checkpoint(tmp_path / "a", "dpo", 2.0))
    assert registry.register(tmp_path / "a") == first
    with pytest.raises(CheckpointError, match="registered already"):
        registry.register(write_checkpoint(tmp_path / "b", "dpo", 3.0))
    assert registry.resolve("dpo") == first


def test_a_checkpoint_that_was_moved_is_registered_again_where_it_is_now(tmp_path: Path) -> None:
    """docs/operations.md: a run that was restored at another path."""
    registry = Registry(tmp_path / "run")
    first = registry.register(write_checkpoint(tmp_path / "a", "dpo", 2.0))
    moved = registry.register((tmp_path / "a").rename(tmp_path / "b"))
    assert (moved.ref, moved.directory) == (first.ref, tmp_path / "b")
    assert registry.resolve("dpo") == moved


def test_changed_weights_are_found_at_registration_and_later(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "run")
    directory = write_checkpoint(tmp_path / "a", "dpo", 2.0)
    registry.register(directory)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(CheckpointError, match="files were changed"):
        registry.verify("dpo")
    with pytest.raises(CheckpointError, match="files were changed"):
        Registry(tmp_path / "other").register(directory)


def test_a_digest_is_computed_once_for_unchanged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(tmp_path / "run")
    directory = write_checkpoint(tmp_path / "a", "dpo", 2.0)
    computed: list[Path] = []
    monkeypatch.setattr(integrity, "compute_digest", lambda path: computed.append(path) or compute_digest(path))
    registry.register(directory)
    registry.verify("dpo")
    Registry(tmp_path / "run").register(directory)
    assert len(computed) == 1
    os.utime(directory / "model.safetensors", ns=(1, 1))
    registry.verify("dpo")
    registry.verify("dpo")
    assert len(computed) == 2


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".hidden", "a b", "x" * 101, "ü"])
def test_names_cannot_leave_their_directory(tmp_path: Path, name: str) -> None:
    directory = write_checkpoint(tmp_path / "a", "good", 2.0)
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["checkpoint"]["name"] = name
    (directory / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is not letters"):
        Registry(tmp_path / "run").register(directory)
    with pytest.raises(CheckpointError):
        Registry(tmp_path / "run").base(ModelSection(source=str(directory), name=name))


def test_an_alias_cannot_hide_a_checkpoint(tmp_path: Path, source: Path) -> None:
    registry = Registry(tmp_path / "run")
    registry.base(ModelSection(source=str(source)))
    registry.register(write_checkpoint(tmp_path / "a", "dpo", 2.0))
    with pytest.raises(CheckpointError, match="own name"):
        registry.set_live("base", "dpo")
    registry.set_live("base", "base")


def test_an_unknown_name_says_the_nearest(tmp_path: Path, source: Path) -> None:
    registry = Registry(tmp_path / "run")
    with pytest.raises(CheckpointError, match="known are none"):
        registry.resolve("base")
    registry.base(ModelSection(source=str(source)))
    with pytest.raises(CheckpointError, match="did you mean policy"):
        registry.resolve("polcy")


def test_another_model_in_the_same_run_is_refused(tmp_path: Path, source: Path) -> None:
    registry = Registry(tmp_path / "run")
    registry.base(ModelSection(source=str(source)))
    other = write_checkpoint(tmp_path / "other", "seed", 5.0)
    with pytest.raises(CheckpointError, match="use another run"):
        registry.base(ModelSection(source=str(other)))


def test_a_base_without_a_manifest_is_described_once_by_another_process(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / MANIFEST).unlink()
    maker = tmp_path / "python"
    ref = CheckpointRef(name="base", digest=compute_digest(source), kind="base")
    made = CheckpointManifest(checkpoint=ref, canary=make_canary(1.0)).model_dump_json()
    maker.write_text(
        f'#!/bin/sh\nmkdir -p "$(dirname "$6")"\necho "$@" >> {tmp_path}/calls\n'
        f'cat > "$6" <<\'E\'\n{made}\nE\ntouch "$(dirname "$6")/chat_template.jinja"\n'
    )
    maker.chmod(maker.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(sys, "executable", str(maker))
    for _ in range(2):
        base = Registry(tmp_path / "run").base(ModelSection(source=str(source)))
        assert base.manifest.canary is not None
        assert base.chat_template == tmp_path / "run" / "checkpoints" / "base" / "chat_template.jinja"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 1
    assert calls[0].endswith("--name base")


def test_a_base_that_cannot_be_described_says_why(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / MANIFEST).unlink()
    maker = tmp_path / "python"
    maker.write_text("#!/bin/sh\necho traceback >&2; echo 'no processor here' >&2; exit 2\n")
    maker.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(maker))
    with pytest.raises(CheckpointError, match="could not be described: no processor here"):
        Registry(tmp_path / "run").base(ModelSection(source=str(source)))
    assert Registry(tmp_path / "run").list() == []


def test_a_registry_that_is_damaged_is_not_overwritten(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "run")
    registry.register(write_checkpoint(tmp_path / "a", "dpo", 2.0))
    path = tmp_path / "run" / "checkpoints" / "registry.json"
    path.write_text("{")
    with pytest.raises(CheckpointError, match="is not a RegistryFile"):
        Registry(tmp_path / "run").register(tmp_path / "a")
    assert path.read_text() == "{"


def test_a_checkpoint_that_nothing_uses_is_retired_and_its_files_stay(tmp_path: Path, source: Path) -> None:
    registry = Registry(tmp_path / "run")
    registry.base(ModelSection(source=str(source)))
    tuned = registry.register(write_checkpoint(tmp_path / "a", "dpo", 2.0))
    assert registry.retire("dpo") == tuned.ref
    assert [c.ref.name for c in Registry(tmp_path / "run").list()] == ["base"]
    assert compute_digest(tmp_path / "a") == tuned.ref.digest
    assert registry.register(tmp_path / "a") == tuned


def test_a_checkpoint_in_use_is_not_retired(tmp_path: Path, source: Path) -> None:
    registry = Registry(tmp_path / "run")
    registry.base(ModelSection(source=str(source)))
    registry.register(write_checkpoint(tmp_path / "a", "dpo", 2.0))
    registry.set_live("policy", "dpo")
    with pytest.raises(CheckpointError, match="dpo is live"):
        registry.retire("dpo")
    with pytest.raises(CheckpointError, match="base cannot be retired while base means it"):
        registry.retire("base")
    with pytest.raises(CheckpointError, match="policy is an alias of dpo"):
        registry.retire("policy")
    with pytest.raises(CheckpointError, match="known are base, dpo"):
        registry.retire("nobody")
    assert [c.ref.name for c in registry.list()] == ["base", "dpo"]


def test_what_was_retired_meanwhile_does_not_go_live(tmp_path: Path, source: Path) -> None:
    registry = Registry(tmp_path / "run")
    registry.base(ModelSection(source=str(source)))
    registry.register(write_checkpoint(tmp_path / "a", "dpo", 2.0))
    Registry(tmp_path / "run").retire("dpo")
    with pytest.raises(CheckpointError, match="retired"):
        registry.set_live("policy", "dpo")
    assert registry.live() == "base"


def test_a_checkpoint_is_described_by_name_or_alias(tmp_path: Path, source: Path) -> None:
    registry = Registry(tmp_path / "run")
    base = registry.base(ModelSection(source=str(source)))
    info = registry.describe("policy")
    assert (info.checkpoint, info.directory) == (base.ref, str(source))
    assert (info.aliases, info.is_live, info.has_canary) == (("base", "policy"), True, True)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors", "model.safetensors.index.json", "config.json", "adapter_config.json", "tokenizer.json",
        "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
        "preprocessor_config.json", "processor_config.json", "chat_template.jinja", "chat_template.json",
    ],
)  # fmt: skip
def test_a_digest_holds_every_file_that_can_change_an_answer(tmp_path: Path, name: str) -> None:
    directory = write_checkpoint(tmp_path / "c", "c", 1.0)
    before = compute_digest(directory)
    path = directory / name
    path.write_bytes(b'{"weight_map": {}}' if "index" in name else path.read_bytes() + b" " if path.exists() else b"{}")
    assert compute_digest(directory) != before


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "spiece.model"])
def test_a_digest_holds_what_a_tokenizer_is_made_of_where_no_file_holds_it_whole(tmp_path: Path, name: str) -> None:
    """Two bases with other words would have been one; beside a tokenizer.json the same files are not read."""
    directory = write_checkpoint(tmp_path / "c", "c", 1.0)
    (directory / "tokenizer.json").unlink(missing_ok=True)
    before = compute_digest(directory)
    (directory / name).write_text("{}")
    assert compute_digest(directory) != before
    (directory / "tokenizer.json").write_text("{}")
    whole = compute_digest(directory)
    (directory / name).write_text("{ }")
    assert compute_digest(directory) == whole


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}'])
def test_an_index_that_names_no_shards_is_said(tmp_path: Path, text: str) -> None:
    directory = write_checkpoint(tmp_path / "c", "c", 1.0)
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index.json names no shards .*; copy it again"):
        compute_digest(directory)


@pytest.mark.parametrize("name", ["README.md", "generation_config.json", "checkpoint.json", "probe.json"])
def test_a_digest_holds_nothing_else(tmp_path: Path, name: str) -> None:
    directory = write_checkpoint(tmp_path / "c", "c", 1.0)
    before = compute_digest(directory)
    (directory / name).write_text("{}")
    assert compute_digest(directory) == before


@pytest.mark.parametrize("call", ["register", "verify"])
def test_what_is_changed_while_files_are_read_is_not_undone(tmp_path: Path, call: str) -> None:
    """Reading 14 GB takes a minute, in which another process may register the name anew, or retire it."""
    registry, later = Registry(tmp_path / "run"), Registry(tmp_path / "later")
    mine = write_checkpoint(tmp_path / "mine", "dpo", 2.0)
    theirs = write_checkpoint(tmp_path / "theirs", "other" if call == "verify" else "dpo", 3.0)
    later.register(theirs)
    registry.register(write_checkpoint(tmp_path / "first", "first", 1.0))
    if call == "verify":
        registry.register(mine)
        os.utime(mine / "model.safetensors")
    folder = tmp_path / "run" / "checkpoints"
    with (folder / "registry.lock").open("w") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = pool.submit(registry.verify, "dpo") if call == "verify" else pool.submit(registry.register, mine)
        time.sleep(0.3)  # it has read the files, and waits to write
        shutil.copyfile(tmp_path / "later" / "checkpoints" / "registry.json", folder / "registry.json")
        fcntl.flock(lock, fcntl.LOCK_UN)
        with pytest.raises(CheckpointError, match=r"was changed in .*registry\.json while|is registered already"):
            done.result()
    assert [checkpoint.directory for checkpoint in registry.list()] == [theirs]


def test_a_base_that_is_registered_by_its_directory_stays_the_recipes(tmp_path: Path) -> None:
    """`vcot swap` and the API register a directory; the run then refused its own recipe, and forgot the mended template."""
    source, registry = write_checkpoint(tmp_path / "source", "base", 1.0, kind="base"), Registry(tmp_path / "run")
    base = registry.base(ModelSection(source=str(source)))
    assert registry.register(source) == base
    assert registry.base(ModelSection(source=str(source))) == base
