"""The nano-LLaVA: its tokenizer, its layout on disk, its training batches, and a build that is killed half-way."""

import random
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from pipeline.errors import CheckpointError
from pipeline.prompts import render_prompt
from pipeline.records import ImageRef, PromptName
from pipeline.sources.nano import FAMILIES, build_task, make_question, render_target
from training.nano import Build, build_nano
from training.nano_data import IGNORED, build_corpus, draw_conversations, draw_lookups, normalise_pixels
from training.nano_eval import draw_examples, measure_accuracy, sample_responses
from training.nano_model import build_model, build_processor, build_tokenizer, save_checkpoint
from training.nano_plan import STAGES, NanoPlan

PROMPTS = get_args(PromptName)
SHIPPED = Path(__file__).parents[2] / "training/checkpoints/nano"
TINY = NanoPlan(
    steps=dict.fromkeys(STAGES, 2), rows=dict.fromkeys(STAGES, 2), save_every=1, eval_every=100, num_eval_tasks=3
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = build_tokenizer(build_corpus(0, num_questions=300))
    directory = tmp_path_factory.mktemp("nano")
    save_checkpoint(build_model(tokenizer), build_processor(tokenizer), directory)
    return directory


@pytest.fixture(scope="module")
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint):
    return LlavaForConditionalGeneration.from_pretrained(checkpoint).eval()


def messages(prompt, response=None):
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": response}]}
    return [user] if response is None else [user, assistant]


def encode(processor, text):
    return processor.tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    "text",
    [
        "The star is red. <R> The answer is (B).",
        "Which of these is a compound sentence?\n(E) naïve  café\t— 日本 🙂",
        "  two  spaces, <0x41> and (Z)(A) 'quotes' \r\n",
        "",
    ],
)
def test_the_tokenizer_loses_nothing(processor, text):
    ids = encode(processor, text)
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text
    assert processor.tokenizer.unk_token_id not in ids


def test_letters_and_the_separator_are_one_ordinary_piece(processor):
    for text in (" (A)", " (D)", " <R>"):
        assert len(encode(processor, text)) == 1
        assert processor.tokenizer.decode(encode(processor, text), skip_special_tokens=True) == text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_and_response_tokenize_apart_as_they_do_together(processor, prompt):
    rng = random.Random(1)
    for family in FAMILIES:
        task = build_task(make_question(rng, family, "test"), ImageRef(sha256="", path="", width=56, height=56), "test")
        text = render_prompt(prompt, task)
        before = processor.apply_chat_template(messages(text), add_generation_prompt=True)
        whole = processor.apply_chat_template(messages(text, render_target(task, prompt)))
        assert whole.startswith(before)
        ids = encode(processor, before) + encode(processor, whole.removeprefix(before))
        assert ids == encode(processor, whole)
        assert not any(piece.startswith("<0x") for piece in processor.tokenizer.convert_ids_to_tokens(ids))
        assert ids.count(processor.tokenizer.bos_token_id) == 1
        assert ids[0] == processor.tokenizer.bos_token_id
        assert ids[-1] == processor.tokenizer.eos_token_id


def test_the_processor_makes_four_image_tokens_and_no_second_bos(processor):
    example = draw_examples("test", 1, seed=0)[0]
    text = processor.apply_chat_template(messages("Look."), add_generation_prompt=True)
    inputs = processor(text=text, images=[example.image], return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<image>")) == 4
    assert ids.count(processor.tokenizer.bos_token_id) == 1
    torch.testing.assert_close(inputs["pixel_values"], normalise_pixels([example.image]))


def test_the_layout_is_the_hubs_and_loads_back_unchanged(checkpoint, model):
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert any(name.startswith("vision_tower.vision_model.encoder.layers.0.") for name in names)
    assert any(name.startswith("language_model.model.layers.0.") for name in names)
    assert not any(name.startswith("vision_tower.") and "vision_model" not in name for name in names)
    stored = load_file(checkpoint / "model.safetensors")
    assert torch.equal(model.lm_head.weight, stored["language_model.lm_head.weight"])
    patch = model.model.vision_tower.embeddings.patch_embedding.weight
    assert torch.equal(patch, stored["vision_tower.vision_model.embeddings.patch_embedding.weight"])


def test_the_training_loss_is_that_of_the_models_own_forward_pass(processor, model):
    build = Build(model, processor.tokenizer, NanoPlan())
    batch = draw_conversations(random.Random(0), processor.tokenizer, 1, {"cot": 1.0}, {})
    logits = model(input_ids=batch.ids, pixel_values=batch.pixels).logits
    losses = torch.nn.functional.cross_entropy(logits[0], batch.labels[0], reduction="none", ignore_index=IGNORED)
    weights = batch.weights * (batch.labels != IGNORED)
    expected = (losses * weights[0]).sum() / weights.sum()
    torch.testing.assert_close(build.response_loss(batch, build.patch_features(batch.pixels)), expected)


def test_only_the_response_carries_loss(processor):
    batch = draw_conversations(random.Random(0), processor.tokenizer, 4, {"zero_shot": 1.0}, {})
    for labels in batch.labels:
        text = processor.tokenizer.decode(labels[labels != IGNORED])
        assert text.startswith(" The answer is (")
        assert text.endswith(".</s>")
    lookups = draw_lookups(random.Random(0), processor.tokenizer, 4)
    assert set(processor.tokenizer.decode(lookups.labels[lookups.labels != IGNORED]).split()) <= {
        "(A)",
        "(B)",
        "(C)",
        "(D)",
    }


def test_a_killed_build_ends_with_the_weights_of_an_undisturbed_one(tmp_path):
    def die(line):
        if line.startswith("joint"):
            raise KeyboardInterrupt

    build_nano(tmp_path / "whole", plan=TINY, report=lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        build_nano(tmp_path / "killed", plan=TINY, report=die)
    lines = []
    build_nano(tmp_path / "killed", plan=TINY, report=lines.append)
    assert not any(line.startswith(("tower", "lookup")) for line in lines)
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    card = (tmp_path / "whole/README.md").read_text("utf-8")
    assert card == (tmp_path / "killed/README.md").read_text("utf-8")
    assert "apache-2.0" in card
    with pytest.raises(CheckpointError, match="another plan"):
        build_nano(tmp_path / "killed", plan=NanoPlan(seed=1), report=lambda _: None)


def test_the_shipped_checkpoint_is_well_above_chance_and_well_below_perfect():
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(SHIPPED)
    model = LlavaForConditionalGeneration.from_pretrained(SHIPPED).eval()
    examples = draw_examples("validation", 180, seed=5)
    for prompt in ("zero_shot", "cot"):
        texts = sample_responses(model, processor, examples, prompt, temperature=0.4)
        shares = measure_accuracy(examples, texts)
        assert 0.35 < shares["all"] < 0.88, (prompt, shares)  # sd 0.037
        assert shares["format"] > 0.95
