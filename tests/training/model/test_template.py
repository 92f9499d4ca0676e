"""The chat template: BOS and EOS where the model was trained to see them, in training and in serving."""

from __future__ import annotations

import pytest

from vcot.pipeline.errors import CheckpointError
from vcot.training.model.template import closing_tokens, ensure_template, find_fault, render

USER = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}
ASSISTANT = {"role": "assistant", "content": [{"type": "text", "text": "This."}]}


def test_stock_llava_template_is_mended(processor, stock_template):
    processor.chat_template = stock_template
    assert "<s>" in find_fault(processor)
    assert ensure_template(processor)
    assert render(processor, [USER], prompt=True) == "<s>USER: <image>\nWhich? ASSISTANT:"
    assert render(processor, [USER, ASSISTANT]) == "<s>USER: <image>\nWhich? ASSISTANT: This.</s>"
    system = {"role": "system", "content": [{"type": "text", "text": "Be kind."}]}
    assert render(processor, [system, USER], prompt=True) == "<s>Be kind. USER: <image>\nWhich? ASSISTANT:"
    assert processor.tokenizer.chat_template == processor.chat_template
    assert find_fault(processor) is None


def test_the_checkpoints_own_template_is_left_alone(processor):
    before = processor.chat_template
    assert not ensure_template(processor)
    assert processor.chat_template == before


def test_what_stands_behind_eos_is_known(processor):
    assert closing_tokens(processor) == ()
    processor.chat_template += "{{ '\n\n' }}"
    assert processor.tokenizer.decode(closing_tokens(processor)) == "\n\n"


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda t: t.replace("{{ bos_token }}", ""), "does not begin with <s>"),
        (lambda t: t.replace("{{ bos_token }}", "{{ bos_token + bos_token }}"), "writes <s> 2 times"),
        (lambda t: t.replace(" + eos_token", ""), "never learns to stop"),
        (lambda t: t.replace("{{ 'ASSISTANT:' }}", "{{ 'ASSISTANT: <R>' }}"), "does not begin with"),
        (
            lambda t: "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "reads a message as one string",
        ),
        (
            lambda t: "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}",
            "reads a message as one string",
        ),
        (lambda t: "", "is missing"),
        (lambda t: None, "is missing"),
    ],
)
def test_any_other_fault_is_refused(processor, edit, fault):
    processor.chat_template = edit(processor.chat_template)
    with pytest.raises(CheckpointError, match=fault):
        ensure_template(processor)
