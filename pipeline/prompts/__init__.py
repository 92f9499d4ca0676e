"""The prompts, word for word, and how a response to each is taken apart.

`thought_specific` and `thought_generic` are Wu et al. 2024 (Thinking LLMs, v1, Fig. 2); `zero_shot` and `cot` are the
paper's evaluation prompts (its Figs. 2 and 3). Each file is data: the names in angle brackets or braces are filled in one
pass, so a question that contains such a name is not filled again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib import resources

from pipeline.records import PromptName, Task

_FIELD = re.compile(r"<question>|<options>|\{user instruction\}")
_SPECIAL = re.compile(
    r"<image>|<video>|<image_soft_token>|<start_of_image>|<end_of_image>|<img_context>|<fake_token_around_image>"
    r"|<\|\w+\|>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?INST\]|\[IMG(?:_BREAK|_END)?\]",
    re.IGNORECASE,
)
"""What a tokenizer of some family reads as an image's place, or as the end of a turn."""
_FINAL_ANSWER = re.compile(r"the answer is", re.IGNORECASE)


@cache
def load_prompt(name: PromptName) -> str:
    """The template's text, without the file's last line break."""
    return resources.files(__name__).joinpath(f"{name}.txt").read_text("utf-8").removesuffix("\n")


def render_options(choices: Sequence[str]) -> str:
    """`(A) red (B) blue`, as ScienceQA's authors and LLaVA write options."""
    return " ".join(f"({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(choices))


def render_prompt(name: PromptName, task: Task) -> str:
    """The user turn for `task`, without the image placeholder.

    What a tokenizer would read as more than text is removed from a question: a literal `<image>` counts as a second image,
    and a literal `<|im_end|>` ends the turn.
    """
    question = " ".join(_remove_special(task.question).split())
    options = _remove_special(render_options(task.choices))
    fields = {
        "<question>": question,
        "<options>": options,
        "{user instruction}": f"{question}\nOptions: {options}",
    }
    return _FIELD.sub(lambda match: fields[match.group()], load_prompt(name))


def _remove_special(text: str) -> str:
    """The text without special tokens, also where removing one makes another of what stood around it."""
    while (shorter := _SPECIAL.sub("", text)) != text:
        text = shorter
    return text


def split_thought(name: PromptName, text: str) -> tuple[str | None, str | None]:
    """A response's (thought, final answer); (None, None) where it did not keep the prompt's format.

    The final answer is the text after the prompt's own separator, not yet parsed into a letter.
    """
    match name:
        case "thought_specific":
            thought, separator, answer = text.partition("<R>")
        case "thought_generic":
            thought, separator, answer = text.partition("Here is my response:")
            thought = thought.replace("Here is my thought process:", "", 1)
        case "zero_shot":
            return "", text.strip()
        case "cot":
            starts = [match.start() for match in _FINAL_ANSWER.finditer(text)]
            if not starts:
                return None, None
            thought, separator, answer = text[: starts[-1]], "the answer is", text[starts[-1] :]
    if not separator or not answer.strip():
        return None, None
    return thought.strip(), answer.strip()
