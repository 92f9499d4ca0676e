"""The canary is the same each time, is what a server would answer, and ends before any doubtful token."""

from __future__ import annotations

import base64
import hashlib
import io
import shutil

import pytest
import torch
from PIL import Image

from pipeline.checkpoints import compute_digest
from pipeline.records import CheckpointManifest
from training import canary
from training.models import load_model, served_tokens
from training.parity import TOLERANCES


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint, torch.float32)


def test_image_is_drawn_the_same_each_time():
    image = canary.draw_canary(56)
    assert (image.mode, image.size) == ("RGB", (56, 56))
    assert hashlib.sha256(image.tobytes()).hexdigest() == hashlib.sha256(canary.draw_canary(56).tobytes()).hexdigest()
    colours = {image.getpixel(point) for point in ((14, 14), (42, 14), (14, 42), (42, 42), (0, 0))}
    assert len(colours) == 5


def test_answer_is_greedy_and_its_logprobs_are_the_models(model, processor):
    record = canary.build_canary(model, processor, "float32")
    assert record == canary.build_canary(model, processor, "float32")
    assert 1 <= len(record.tokens) == len(record.logprobs) <= canary.MAX_TOKENS
    with Image.open(io.BytesIO(base64.b64decode(record.image_png_base64))) as image:
        assert image.tobytes() == canary.draw_canary(56).tobytes()

    batch = canary.canary_batch(processor)
    ids = batch["input_ids"]
    assert ids[0, 0] == processor.tokenizer.bos_token_id
    assert (ids == processor.tokenizer.bos_token_id).sum() == 1
    for token, logprob in zip(record.tokens, record.logprobs, strict=True):
        with torch.inference_mode():
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=batch["pixel_values"]
            ).logits
        best = logits[0, -1].log_softmax(-1).max(-1)
        assert served_tokens(processor.tokenizer, [best.indices]) == [token]
        assert best.values.item() == pytest.approx(logprob, abs=1e-5)
        ids = torch.cat([ids, best.indices.view(1, 1)], dim=1)


class Scripted:
    """Answers with given tokens and leads."""

    device = torch.device("cpu")

    def __init__(self, answer, num_pieces):
        self.answer, self.num_pieces = answer, num_pieces

    def generate(self, **_):
        logits = torch.full((len(self.answer), 1, self.num_pieces), -20.0)
        for i, (token_id, lead) in enumerate(self.answer):
            logits[i, 0, token_id] = 5.0
            logits[i, 0, (token_id + 1) % self.num_pieces] = 5.0 - lead
        return type("Output", (), {"logits": tuple(logits)})


@pytest.mark.parametrize(
    ("pieces", "dtype", "length"),
    [
        ([(".", 1.0), (":", 1.0)], "float32", 2),
        ([(".", 1.0), (":", 0.001), (".", 1.0)], "float32", 1),
        ([(".", 1.0), (":", 0.2), (".", 1.0)], "float16", 3),
        ([(".", 1.0), (":", 0.2), (".", 1.0)], "bfloat16", 1),
        ([(".", 0.0), (":", 1.0)], "float32", 2),
        ([(".", 1.0), ("</s>", 1.0), (".", 1.0)], "float32", 1),
        ([(".", 1.0), ("<0xE2>", 1.0), (".", 1.0)], "float32", 1),
    ],
)
def test_answer_ends_before_the_first_doubtful_token(processor, pieces, dtype, length):
    ids = [(processor.tokenizer.convert_tokens_to_ids(piece), lead) for piece, lead in pieces]
    record = canary.build_canary(Scripted(ids, len(processor.tokenizer)), processor, dtype)
    assert len(record.tokens) == length
    assert record.tolerance == TOLERANCES[dtype]


def test_leading_space_is_restored_as_vllm_does():
    class SentencePiece:
        """Its decoder drops the space that a piece begins with."""

        def decode(self, ids):
            return {1: "The", 2: "ed", 3: " x"}[ids[0]]

        def convert_ids_to_tokens(self, token_id):
            return {1: "▁The", 2: "ed", 3: "▁x"}[token_id]

    assert served_tokens(SentencePiece(), [1, 2, 3]) == [" The", "ed", " x"]


def test_command_writes_a_manifest(checkpoint, tmp_path, capsys):
    out = tmp_path / "deep" / "base.json"
    assert canary.main([str(checkpoint), "--out", str(out), "--name", "seed", "--serve-dtype", "bfloat16"]) == 0
    manifest = CheckpointManifest.model_validate_json(out.read_text())
    assert (manifest.checkpoint.name, manifest.checkpoint.kind) == ("seed", "base")
    assert manifest.checkpoint.digest == compute_digest(checkpoint)
    assert manifest.canary.tolerance == TOLERANCES["bfloat16"]
    assert [path.name for path in out.parent.iterdir()] == ["base.json"]
    assert canary.main([str(tmp_path / "none"), "--out", str(tmp_path / "x.json")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_mended_template_is_written_beside_the_manifest(checkpoint, stock_template, tmp_path):
    stock = shutil.copytree(checkpoint, tmp_path / "stock")
    (stock / "chat_template.jinja").write_text(stock_template)
    out = tmp_path / "run" / "checkpoint.json"
    assert canary.main([str(stock), "--out", str(out)]) == 0
    template = (out.parent / "chat_template.jinja").read_text()
    assert "bos_token" in template
    assert CheckpointManifest.model_validate_json(out.read_text()).checkpoint.digest == compute_digest(stock)
