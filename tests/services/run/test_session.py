"""What the steps of a command share."""

from pathlib import Path

import pytest

from tests.services.fake_vllm import write_checkpoint
from vcot.pipeline.errors import CheckpointError
from vcot.services.cli.terminal import Terminal
from vcot.services.run.directory import open_run
from vcot.services.run.session import Session


async def test_checkpoints_that_are_named_twice_are_taken_once(tmp_path: Path) -> None:
    """`vcot eval base policy`, where policy means the base still: each answer was counted twice, as several responses."""
    base = write_checkpoint(tmp_path / "base", "base", 1.0, kind="base")
    with open_run(tmp_path / "run", "nano", [f"model.source={base}"]) as run:
        async with Session(run, Terminal()) as session:
            first = session.base
            tuned = session.registry.register(write_checkpoint(tmp_path / "tuned", "tuned", 2.0))
            session.registry.register(write_checkpoint(tmp_path / "copy", "copy", 1.0))
            assert session.find(["base", "policy", "tuned", "copy", "tuned"]) == [first, tuned]
            assert session.find(["tuned", "policy", "tuned"]) == [tuned, first]
            session.registry.set_live("policy", "tuned")
            assert session.find(["base", "tuned", "policy"]) == [first, tuned]
            assert session.find([]) == []
            with pytest.raises(CheckpointError, match="did you mean tuned"):
                session.find(["tunde"])
