"""The chat template: what the policy reads while it is trained must be what it reads when it is served.

vLLM's chat endpoint renders the checkpoint's template and tokenizes it without special tokens, so whatever the template
does not write is not there. In both, a message reaches the template as a list of parts (services/engine/vllm.py).
LLaVA-1.5's own template writes neither BOS nor EOS: served prompts lack the BOS that the model was trained with, and a
policy trained on it never learns to stop. `ensure_template` mends that one, and refuses any other with the same fault. The
mended template is saved with the merged checkpoint; a server that starts with the unmended base must be given it
(`--chat-template`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from vcot.pipeline.errors import CheckpointError

Processor: TypeAlias = Any
"""A transformers processor; the library ships no types."""
Messages: TypeAlias = Sequence[Mapping[str, Any]]

_TEXT = "x"
_QUESTION = ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _TEXT}]},)
_ANSWER = ({"role": "assistant", "content": [{"type": "text", "text": _TEXT}]},)
_READS_STRINGS = "reads a message as one string, where it comes as a list of parts, an image or a text each"
_STOCK_LLAVA = ("USER: {image}\nx ASSISTANT:", "USER: {image}\nx ASSISTANT: x ")

LLAVA = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] != 'system' %}{{- message['role'].upper() + ': ' }}{%- endif %}"
    "{%- for part in message['content'] if part['type'] == 'image' %}{{- IMAGE + '\n' }}{%- endfor %}"
    "{%- for part in message['content'] if part['type'] == 'text' %}{{- part['text'] }}{%- endfor %}"
    "{{- eos_token if message['role'] == 'assistant' else ' ' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"
)
"""LLaVA-1.5's turns as its authors trained them (conv_vicuna_v1: `USER: ... ASSISTANT: ...</s>`), with BOS and EOS."""


def render(processor: Processor, messages: Messages, *, prompt: bool = False) -> str:
    """The messages as the text that is tokenized without special tokens; `prompt` opens the assistant's turn."""
    return str(processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))


def closing_tokens(processor: Processor) -> tuple[int, ...]:
    """What the template writes behind an answer's EOS, as ChatML's line break: a later turn reads it, no answer holds it."""
    row = render(processor, (*_QUESTION, *_ANSWER))
    whole, answered = (processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (row, row.rstrip()))
    return tuple(whole[len(answered) :])


def ensure_template(processor: Processor) -> bool:
    """Mend LLaVA's stock template in `processor`; True where it was mended.

    Raises CheckpointError, with the fault, for a template that cannot be trained and served alike.
    """
    fault = find_fault(processor)
    if fault is None:
        return False
    if processor.chat_template and fault != _READS_STRINGS and _is_stock_llava(processor):
        processor.chat_template = LLAVA.replace("IMAGE", repr(processor.image_token))
        processor.tokenizer.chat_template = processor.chat_template
        fault = find_fault(processor)
        if fault is None:
            return True
    raise CheckpointError(f"the chat template {fault}; save a mended chat_template.jinja with the checkpoint")


def find_fault(processor: Processor) -> str | None:
    """What is wrong with the processor's template, as a clause; None where nothing is."""
    if not processor.chat_template:
        return "is missing"
    tokenizer = processor.tokenizer
    try:
        prompt, row = render(processor, _QUESTION, prompt=True), render(processor, (*_QUESTION, *_ANSWER))
    except TypeError:  # a string and a list do not add up
        return _READS_STRINGS
    if str(_ANSWER[0]["content"]) in row:
        return _READS_STRINGS
    ids = tokenizer(row, add_special_tokens=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if not row.startswith(prompt):
        return f"renders a prompt {prompt!r} that its own conversation {row!r} does not begin with"
    if bos is not None and ids[0] != bos:
        return f"does not begin with {tokenizer.bos_token}"
    if bos is not None and bos != eos and ids.count(bos) != 1:
        return f"writes {tokenizer.bos_token} {ids.count(bos)} times"
    if eos is None or not row.rstrip().endswith(tokenizer.eos_token):
        return f"does not end the assistant's turn with {tokenizer.eos_token}, so that it never learns to stop"
    return None


def _is_stock_llava(processor: Processor) -> bool:
    rendered = render(processor, _QUESTION, prompt=True), render(processor, (*_QUESTION, *_ANSWER))
    return rendered == tuple(text.format(image=processor.image_token) for text in _STOCK_LLAVA)
