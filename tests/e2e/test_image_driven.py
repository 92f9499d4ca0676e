"""Image gains from a real vLLM behind the gateway: those of Hugging Face, asked once, and what pairs go by."""

from __future__ import annotations

from collections.abc import AsyncIterator
from io import BytesIO

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from vcot.eval.image_reliance import choose_images
from vcot.pipeline.errors import OwedError
from vcot.pipeline.pairs import Judged
from vcot.pipeline.prompts import render_prompt
from vcot.pipeline.records import ImageRef, Task
from vcot.services.cli.terminal import Terminal
from vcot.services.run.directory import open_run
from vcot.services.run.rounds import list_rounds
from vcot.services.run.session import Session
from vcot.services.run.steps import judge_stage, pair_stage, sample_stage
from vcot.training.model.loading import completion_logprobs, load_model
from vcot.training.model.template import render

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]
SIZES = ("tasks.num_tasks=24", "sample.k=4", "eval.num_tasks=9", "serve.port=0", "pairs.policy=image_driven")


@pytest.fixture(scope="module")
async def session(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Session]:
    """A run of nano that is sampled and judged."""
    with open_run(tmp_path_factory.mktemp("runs") / "run", "nano", SIZES, access="alone") as run:
        async with Session(run, Terminal()) as session:
            current = list_rounds(session)[0]
            await sample_stage(current)
            await judge_stage(current)
            yield session


def compute_logp(session: Session, task: Task, images: tuple[ImageRef, ...], one: Judged) -> float:
    """The text's log-probability by Hugging Face, without what the template puts behind it."""
    directory = session.base.directory
    processor, model = AutoProcessor.from_pretrained(directory), load_model(directory, torch.float32)
    parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": render_prompt(one.response.prompt, task)}]
    turns = [{"role": "user", "content": parts}]
    said = {"role": "assistant", "content": [{"type": "text", "text": one.response.text}]}
    shown = [[Image.open(BytesIO(session.run.images.read(image))) for image in images]]
    options = {"add_special_tokens": False, "return_tensors": "pt"}
    prompt = render(processor, turns, prompt=True)
    before = processor(images=shown, text=[prompt], **options)["input_ids"].shape[1]
    batch = dict(processor(images=shown, text=[render(processor, [*turns, said])], **options))
    mask = torch.ones_like(batch["input_ids"])
    mask[:, :before] = 0
    mask[:, -1] = 0  # the end of the turn
    assert batch["input_ids"][0, -1] == processor.tokenizer.eos_token_id
    return float(completion_logprobs(model, {**batch, "completion_mask": mask}).sum())


async def test_gains_are_those_of_hugging_face_and_are_asked_once(session: Session) -> None:
    current = list_rounds(session)[0]
    with pytest.raises(OwedError, match=r"what the image adds to \d+ responses is not asked yet"):
        _ = current.pairs
    await pair_stage(current)
    (count,) = [count for count in session.counts if count.stage == "gain"]
    assert count.ok == count.requested > 10
    found = [(task, one) for task, candidates in current.candidates() for one in candidates]
    assert len(found) == count.requested
    for task, one in found[:4]:
        assert one.gain is not None
        true = compute_logp(session, task, task.images, one)
        blank = compute_logp(session, task, choose_images([task], "blank", session.run.images)[task.id], one)
        assert one.gain.logp_true == pytest.approx(true, abs=1e-3)
        assert one.gain.logp_blank == pytest.approx(blank, abs=1e-3)
    gains = sorted(one.gain.value for _, one in found if one.gain is not None and one.gain.value is not None)
    assert gains[len(gains) // 2] > 1, "nano looks"

    by_response = {one.response.key: one.gain for _, one in found}
    chosen = [by_response[pair.chosen_key] for pair in current.pairs.pair_set.pairs]
    assert chosen
    assert all(gain is not None and (gain.value or 0) > session.run.recipe.pairs.image_margin for gain in chosen)

    await session.gateway.close()
    await pair_stage(list_rounds(session)[0])
    assert session.counts[-2].cached == count.requested, "no server is needed for what is there"


async def test_a_wider_margin_leaves_fewer_pairs_and_says_why(session: Session) -> None:
    pairs = session.run.recipe.pairs.model_copy(update={"image_margin": 10_000.0})
    object.__setattr__(session.run, "recipe", session.run.recipe.model_copy(update={"pairs": pairs}))
    shown = {row.policy: row for row in list_rounds(session)[0].preview().policies}
    row = shown["image_driven"]
    assert row.num_pairs == 0
    assert row.count.reasons["below_image_margin"] > 10
    assert shown["right_wrong"].num_pairs > 0
