"""The nano models: tokenizer, layout on disk, training batches, and a build that is killed half-way."""

import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from vcot.pipeline.errors import CheckpointError
from vcot.pipeline.identity import verify_checkpoint
from vcot.pipeline.prompts import render_prompt
from vcot.pipeline.records import ImageRef
from vcot.pipeline.sources.nano.questions import FAMILIES, TRAINED_PROMPTS, build_task, make_question, render_target
from vcot.training.nano.architecture import NUM_IMAGE_TOKENS, build_tokenizer
from vcot.training.nano.batches import IGNORED, MEAN, STD, build_corpus, draw_conversations, draw_lookups
from vcot.training.nano.building import ARCHITECTURES, Build, build_nano
from vcot.training.nano.quiz import draw_examples, measure_accuracy, sample_responses
from vcot.training.nano.schedule import STAGES, NanoPlan, make_plan

SHIPPED = Path(__file__).parents[3] / "training/checkpoints"


def tiny_plan(architecture):
    two = dict.fromkeys(STAGES, 2)
    return NanoPlan(architecture, 0, steps=two, rows=two, save_every=1, eval_every=100, num_eval_tasks=3)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="module")
def checkpoint(architecture, tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = build_tokenizer(build_corpus(architecture, 0, num_questions=300), architecture.tokens)
    directory = tmp_path_factory.mktemp("nano")
    architecture.save(architecture.build_model(tokenizer), architecture.build_processor(tokenizer), directory)
    return directory


@pytest.fixture(scope="module")
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModelForImageTextToText.from_pretrained(checkpoint).eval()


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


@pytest.mark.parametrize("prompt", TRAINED_PROMPTS)
def test_prompt_and_response_tokenize_apart_as_they_do_together(processor, architecture, prompt):
    rng = random.Random(1)
    for family in FAMILIES:
        task = build_task(make_question(rng, family, "test"), ImageRef(sha256="", path="", width=56, height=56), "test")
        text = render_prompt(prompt, task)
        before = processor.apply_chat_template(messages(text), add_generation_prompt=True)
        whole = processor.apply_chat_template(messages(text, render_target(task, prompt))).rstrip()
        expanded = before.replace(processor.image_token, processor.image_token * NUM_IMAGE_TOKENS)
        assert expanded == architecture.turns.prompt(text)
        assert whole == before + architecture.turns.response(render_target(task, prompt))
        ids = encode(processor, before) + encode(processor, whole.removeprefix(before))
        assert ids == encode(processor, whole)
        assert not any(piece.startswith("<0x") for piece in processor.tokenizer.convert_ids_to_tokens(ids))
        if processor.tokenizer.bos_token_id is not None:
            assert ids.count(processor.tokenizer.bos_token_id) == 1
            assert ids[0] == processor.tokenizer.bos_token_id
        assert ids[-1] == processor.tokenizer.eos_token_id


def test_the_processor_makes_four_image_tokens_and_no_second_bos(processor):
    example = draw_examples("test", 1, seed=0)[0]
    text = processor.apply_chat_template(messages("Look."), add_generation_prompt=True)
    inputs = processor(text=text, images=[example.image], return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == NUM_IMAGE_TOKENS
    assert ids.count(processor.tokenizer.bos_token_id) == (processor.tokenizer.bos_token_id is not None)


def test_the_layout_is_the_hubs_and_loads_back_unchanged(checkpoint, architecture, model):
    stored = load_file(checkpoint / "model.safetensors")
    tower, decoder, head = {
        "nano": ("vision_tower.vision_model.encoder", "language_model.model.layers.0.", "language_model.lm_head"),
        "nano-qwen": ("model.visual.blocks.0.", "model.language_model.layers.0.", "lm_head"),
    }[architecture.checkpoint_name]
    assert any(name.startswith(tower) for name in stored)
    assert any(name.startswith(decoder) for name in stored)
    assert not any(name.startswith("vision_tower.") and "vision_model" not in name for name in stored)
    assert torch.equal(model.lm_head.weight, stored[f"{head}.weight"])
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_the_training_loss_is_that_of_the_models_own_forward_pass(processor, architecture, model):
    """With the processor's own image tensors."""
    build = Build(
        model,
        processor.tokenizer,
        make_plan(next(name for name, known in ARCHITECTURES.items() if known is architecture)),
    )
    batch = draw_conversations(random.Random(0), processor.tokenizer, architecture.turns, 1, {"cot": 1.0}, {})
    image = Image.fromarray(((batch.pixels[0] * STD + MEAN) * 255).round().byte().permute(1, 2, 0).numpy())
    inputs = processor(text=processor.image_token, images=[image], return_tensors="pt")
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (batch.ids == processor.image_token_id).int()
    logits = model(**{**inputs, "input_ids": batch.ids, "attention_mask": torch.ones_like(batch.ids)}).logits
    losses = torch.nn.functional.cross_entropy(logits[0], batch.labels[0], reduction="none", ignore_index=IGNORED)
    weights = batch.weights * (batch.labels != IGNORED)
    expected = (losses * weights[0]).sum() / weights.sum()
    torch.testing.assert_close(build.response_loss(batch, build.look(batch)), expected)


def test_only_the_response_carries_loss(processor, architecture):
    turns, tokenizer = architecture.turns, processor.tokenizer
    batch = draw_conversations(random.Random(0), tokenizer, turns, 4, {"zero_shot": 1.0}, {})
    for labels in batch.labels:
        text = tokenizer.decode(labels[labels != IGNORED])
        assert text.startswith(f"{turns.begin}The answer is (")
        assert text.endswith(f".{turns.eos}")
    lookups = draw_lookups(random.Random(0), tokenizer, turns, 4)
    letters = tokenizer.decode(lookups.labels[lookups.labels != IGNORED]).split()
    assert set(letters) <= {"(A)", "(B)", "(C)", "(D)"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_killed_build_ends_with_the_weights_of_an_undisturbed_one(name, tmp_path):
    def die(line):
        if line.startswith("joint"):
            raise KeyboardInterrupt

    plan = tiny_plan(name)
    build_nano(tmp_path / "whole", plan, report=lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        build_nano(tmp_path / "killed", plan, report=die)
    lines = []
    build_nano(tmp_path / "killed", plan, report=lines.append)
    assert not any(line.startswith(("tower", "lookup")) for line in lines)
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    card = (tmp_path / "whole/README.md").read_text("utf-8")
    assert card == (tmp_path / "killed/README.md").read_text("utf-8")
    assert "apache-2.0" in card
    assert verify_checkpoint(tmp_path / "whole").checkpoint.name == ARCHITECTURES[name].checkpoint_name
    with pytest.raises(CheckpointError, match="another plan"):
        build_nano(tmp_path / "killed", make_plan(name, seed=1), report=lambda _: None)


@pytest.mark.slow
def test_the_shipped_checkpoint_is_well_above_chance_and_well_below_perfect(architecture):
    torch.manual_seed(0)
    shipped = SHIPPED / architecture.checkpoint_name
    verify_checkpoint(shipped)
    processor = AutoProcessor.from_pretrained(shipped)
    model = AutoModelForImageTextToText.from_pretrained(shipped).eval()
    examples = draw_examples("validation", 180, seed=5)
    for prompt in ("zero_shot", "cot"):
        texts = sample_responses(model, processor, examples, prompt, temperature=0.4)
        shares = measure_accuracy(examples, texts)
        low = {"nano": 0.35, "nano-qwen": 0.29}[architecture.checkpoint_name]
        assert low < shares["all"] < 0.88, (prompt, shares)  # sd 0.037
        assert shares["format"] > 0.95
