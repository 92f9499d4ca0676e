"""Options' log-probabilities from a real vLLM behind the gateway: those of Hugging Face, asked once, in the table."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from vcot.eval.margins import Margin
from vcot.pipeline.odds import OptionScores
from vcot.pipeline.option_scores import key_options
from vcot.pipeline.sample import SampleRequest
from vcot.services.cli.terminal import Terminal
from vcot.services.run.directory import open_run
from vcot.services.run.reporting import evaluate_scores
from vcot.services.run.session import Session
from vcot.services.run.steps import eval_stage, load_scores
from vcot.training.model.loading import completion_logprobs, load_model
from vcot.training.model.template import render

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]
SIZES = (
    "eval.num_tasks=90", "eval.temperatures=[0.4]", "eval.prompts=[\"zero_shot\"]", "eval.margins=true",
    "eval.images=[\"true\", \"blank\", \"options_only\"]", "serve.port=0",
)  # fmt: skip


def compute_logp(session: Session, request: SampleRequest, letter: str, num_last: int) -> float:
    """The log-probability, by Hugging Face, of the last tokens of the words that state the option."""
    directory = session.base.directory
    processor, model = AutoProcessor.from_pretrained(directory), load_model(directory, torch.float32)
    parts = [{"type": "image"} for _ in request.task.images] + [{"type": "text", "text": request.text}]
    said = {"role": "assistant", "content": [{"type": "text", "text": f"The answer is ({letter})"}]}
    shown = [[Image.open(BytesIO(session.run.images.read(image))) for image in request.task.images]]
    text = render(processor, [{"role": "user", "content": parts}, said])
    batch = dict(processor(images=shown, text=[text], add_special_tokens=False, return_tensors="pt"))
    assert batch["input_ids"][0, -1] == processor.tokenizer.eos_token_id
    mask = torch.zeros_like(batch["input_ids"])
    mask[:, -1 - num_last : -1] = 1
    return float(completion_logprobs(model, {**batch, "completion_mask": mask}).sum())


async def test_margins_are_those_of_hugging_face_and_say_what_the_image_is_worth(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", "nano", SIZES, access="alone") as run:
        async with Session(run, Terminal()) as session:
            await eval_stage(session, [session.base], "test")
            (count,) = [count for count in session.counts if count.stage == "margins base"]
            assert count.ok == count.requested == 3 * 90
            questions = session.questions("test")
            for shown in ("true", "blank"):
                request = questions.option_requests(session.base.ref, [shown])[0]
                told = run.ledger.get(OptionScores, [key_options(request)])[key_options(request)]
                letters = "ABCDEFGH"[: len(request.task.choices)]
                # The letter and the bracket behind it, as nano's tokenizer has them.
                theirs = [compute_logp(session, request, letter, 2) for letter in letters]
                assert told.logps == pytest.approx(theirs, abs=1e-3)

            found = evaluate_scores(session, load_scores(session, [session.base], "test"), [session.base])
            rows: dict[str, Margin] = {row.shown: row for row in found.margins}
            assert list(rows) == ["true", "blank", "options_only"]
            assert rows["true"].margin.low > 0
            lost = rows["blank"].lost
            assert lost is not None
            assert lost.low > 0, "nano looks"

            await session.gateway.close()
            await eval_stage(session, [session.base], "test")
            assert session.counts[-1].cached == 3 * 90, "no server is needed for what is there"
