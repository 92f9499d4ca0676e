"""The canary is the same each time, and is what the model answers by itself, token id by token id."""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from vcot.pipeline.identity import compute_digest
from vcot.pipeline.manifest import CheckpointManifest
from vcot.training.model import canary
from vcot.training.model.loading import load_model, load_processor

LLAVA = Path(__file__).parents[4] / "shared" / "data" / "llava-1.5-7b-hf"
needs_shared = pytest.mark.skipif(
    not LLAVA.is_dir(), reason="../shared/data/llava-1.5-7b-hf (LLaVA-1.5's tokenizer) is absent"
)


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
    record = canary.build_canary(model, processor)
    assert record == canary.build_canary(model, processor)
    assert 1 <= len(record.tokens) <= canary.MAX_TOKENS
    with Image.open(io.BytesIO(base64.b64decode(record.image_png_base64))) as image:
        assert image.tobytes() == canary.draw_canary(56).tobytes()

    ids, bos = torch.tensor([record.prompt_tokens]), processor.tokenizer.bos_token_id
    assert record.prompt_tokens[0] == bos
    assert record.prompt_tokens.count(bos) == 1
    assert record.prompt_tokens.count(processor.image_token_id) == 4
    pixels = processor.image_processor(canary.draw_canary(56), return_tensors="pt")["pixel_values"]
    for token, logprob, lead in zip(record.tokens, record.logprobs, record.leads, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits
        best = logits[0, -1].log_softmax(-1).topk(2)
        assert best.indices[0] == token
        assert best.values[0].item() == pytest.approx(logprob, abs=1e-5)
        assert (best.values[0] - best.values[1]).item() == pytest.approx(lead, abs=1e-5)
        ids = torch.cat([ids, best.indices[:1].view(1, 1)], dim=1)


def test_a_checkpoints_own_generation_config_changes_no_answer(model, processor, monkeypatch):
    """A repetition penalty chooses other tokens than those whose log-probs are written down."""
    record = canary.build_canary(model, processor)
    trap = GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=9
    )
    monkeypatch.setattr(model, "generation_config", trap)
    assert canary.build_canary(model, processor) == record
    assert model.generation_config is trap


def test_the_answer_ends_with_eos(model, processor):
    first = canary.build_canary(model, processor).tokens[0]
    processor.tokenizer.eos_token = processor.tokenizer.convert_ids_to_tokens(first)
    assert canary.build_canary(model, processor).tokens == (first,)


@needs_shared
def test_llavas_own_tokenizer_writes_down_the_ids_that_it_read():
    """It has no pre_tokenizer, so that vLLM decodes a piece alone without the space it begins with, and nano's with it."""
    processor, mended = load_processor(LLAVA)
    assert mended
    assert processor.tokenizer.backend_tokenizer.pre_tokenizer is None
    answer = [processor.tokenizer.convert_tokens_to_ids(piece) for piece in ("▁The", "▁circle", "ed", "<0xE2>")]
    record = canary.build_canary(Scripted([*answer, processor.tokenizer.eos_token_id]), processor)
    assert record.tokens == (*answer, 2)
    assert (record.prompt_tokens[0], record.prompt_tokens.count(1)) == (1, 1)
    assert record.prompt_tokens.count(32000) == 576
    rest = [token for token in record.prompt_tokens if token != 32000]
    assert processor.tokenizer.decode(rest[1:]).endswith("(D) yellow ASSISTANT:")


class Scripted:
    """A model that answers with given tokens."""

    device = torch.device("cpu")
    generation_config = None

    def __init__(self, answer):
        self.answer = answer

    def generate(self, **_):
        logits = torch.full((len(self.answer), 1, 32064), -20.0)
        for step, token in enumerate(self.answer):
            logits[step, 0, token] = 5.0
        return type("Output", (), {"logits": tuple(logits)})


def test_command_writes_a_manifest(checkpoint, tmp_path, capsys):
    out = tmp_path / "deep" / "base.json"
    assert canary.main([str(checkpoint), "--out", str(out), "--name", "seed"]) == 0
    manifest = CheckpointManifest.model_validate_json(out.read_text())
    assert (manifest.checkpoint.name, manifest.checkpoint.kind) == ("seed", "base")
    assert manifest.checkpoint.digest == compute_digest(checkpoint)
    assert manifest.canary is not None
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
