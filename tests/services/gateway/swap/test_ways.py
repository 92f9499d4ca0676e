"""Which way leads to a checkpoint, told from its files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.services.bench_fleet import Bench
from vcot.pipeline.errors import SwapError
from vcot.services.gateway.swap.ways import check_reloadable, choose_way

OTHERS = [
    (lambda d: (d / "config.json").write_text('{"rope_theta": 100}'), "config.json says rope_theta = 10000"),
    (
        lambda d: (d / "tokenizer.json").write_text('{"model": {"vocab": {"a": 1}}}'),
        "whose tokenizer.json says model.vocab.a = 0 where it says 1",
    ),
    (lambda d: (d / "chat_template.jinja").write_text("other"), "chat template is another"),
]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Two checkpoints that differ in what each save writes anew."""
    bench = Bench(tmp_path)
    for directory, version in zip([bench.base.directory, bench.tuned.directory], ("1", "2"), strict=True):
        text = json.dumps({"rope_theta": 10000, "transformers_version": version, f"new-{version}": 1})
        (directory / "config.json").write_text(text)
        saved = {"model": {"vocab": {"a": 0}}, "padding": None if version == "1" else {"strategy": "BatchLongest"}}
        (directory / "tokenizer.json").write_text(json.dumps(saved))
        (directory / "chat_template.jinja").write_text("one")
    return bench


@pytest.mark.parametrize("is_live", [True, False])
@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "model.safetensors"])
def test_what_only_one_of_them_has_is_a_difference_in_tensors_alone(bench: Bench, name: str, is_live: bool) -> None:
    check_reloadable(bench.base, bench.tuned)
    ((bench.base if is_live else bench.tuned).directory / name).unlink()
    if name == "model.safetensors":
        with pytest.raises(SwapError, match="2 tensors are of another shape"):
            check_reloadable(bench.base, bench.tuned)
    else:
        check_reloadable(bench.base, bench.tuned)


@pytest.mark.parametrize(("change", "message"), OTHERS)
def test_what_a_server_reads_at_its_start_only_cannot_be_reloaded(
    bench: Bench, change: Callable[[Path], object], message: str
) -> None:
    change(bench.tuned.directory)
    with pytest.raises(SwapError, match=message):
        check_reloadable(bench.base, bench.tuned)
    with pytest.raises(SwapError, match=message):
        choose_way("reload", bench.base, bench.tuned, can_start=True)
    assert choose_way("auto", bench.base, bench.tuned, can_start=True) == "replica"
    with pytest.raises(SwapError, match=rf"takes a server of its own \(.*{message}.*not ours to start"):
        choose_way("auto", bench.base, bench.tuned, can_start=False)
