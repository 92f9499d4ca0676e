"""`vcot probe` asks about the unusual things beside the benchmark, whose answers stay as they are."""

import pytest

from tests.services.fake_vllm import write_checkpoint
from vcot.pipeline.records import Response
from vcot.services.cli.terminal import Terminal
from vcot.services.run.directory import open_run
from vcot.services.run.probing import load_drawings, load_prior, probe_priors
from vcot.services.run.session import Session


@pytest.fixture
async def session(tmp_path):
    base = write_checkpoint(tmp_path / "base", "base", 1.0, kind="base")
    with open_run(tmp_path / "run", "nano", [f"model.source={base}", "eval.prompts=['zero_shot']"]) as run:
        async with Session(run, Terminal()) as session:
            yield session


def answer(session, checkpoint, pick):
    """Put an answer to each drawing in the ledger; `pick(task)` is its letter."""
    for request in load_drawings(session).requests(checkpoint.ref):
        text = f"The answer is ({pick(request.task)})."
        response = Response(
            key=request.response_key(0), group=request.key, task=request.task.id, index=0, checkpoint=request.checkpoint,
            prompt=request.prompt, sampling=request.sampling, text=text, thought="", answer=text,
        )  # fmt: skip
        session.run.ledger.put([response])


async def test_base_and_policy_are_asked_and_compared(session, tmp_path, capsys):
    policy = session.registry.register(write_checkpoint(tmp_path / "run" / "checkpoints" / "dpo-1", "dpo-1", 2.0))
    answer(session, session.base, lambda task: task.prior_letter)
    answer(session, policy, lambda task: task.answer_letter)
    assert load_prior(session) is None
    report = await probe_priors(session, [session.base, policy])
    assert report == load_prior(session)
    found = [(r.checkpoint.name, r.temperature, r.usual.value, r.seen.value, r.prior.value) for r in report.rows]
    assert found == [("base", t, 1, 0, 1) for t in (0.4, 0.8)] + [("dpo-1", t, 1, 1, 0) for t in (0.4, 0.8)]
    assert [d.accuracy.value for d in report.differences] == [-1, -1]
    assert report.chance == pytest.approx((19 / 4 + 5 / 2) / 24)
    said = capsys.readouterr().err
    assert "96 requested = 0 ok + 96 cached" in said
    assert "how it is served cannot be compared" in said, "which is seen to before a policy is asked"
