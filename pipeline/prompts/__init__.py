"""The prompts, word for word, and how a response to each is taken apart.

`thought_specific` and `thought_generic` are Wu et al. 2024 (Thinking LLMs, v1, Fig. 2); `zero_shot` and `cot` are the
paper's evaluation prompts (its Figs. 2 and 3). Each file is data: the names in angle brackets or braces are filled in one
pass, so a question that contains such a name is not filled again.

Two have a second turn. `two_stage` has the scheme of Zhang et al. 2023 (Multimodal-CoT): a rationale, then the answer, given
image, question and rationale; the labels and their order (Question, Options, Solution, Answer) are their code's.
`caption_first` puts a caption in the rationale's place, as LLaVA-CoT (Xu et al. 2024) and Visionary-R1 (Xia et al. 2025)
train models to. None of them gives an instruction for a model that was not trained on its scheme: those sentences are ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

from vcot.pipeline.errors import RecipeError
from vcot.pipeline.open_lists import PROMPT_NAMES
from vcot.pipeline.plugins import Plugins
from vcot.pipeline.records import PromptName, Task

_FIELD = re.compile(r"<question>|<options>|<first>|\{user instruction\}")
_QUESTION = re.compile(r"<question>|\{user instruction\}")
_SPECIAL = re.compile(
    r"<image>|<video>|<image_soft_token>|<start_of_image>|<end_of_image>|<img_context>|<fake_token_around_image>"
    r"|<\|\w+\|>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?INST\]|\[IMG(?:_BREAK|_END)?\]",
    re.IGNORECASE,
)
"""What a tokenizer of some family reads as an image's place, or as the end of a turn."""
_FINAL_ANSWER = re.compile(r"the answer is", re.IGNORECASE)


Parts = tuple[str | None, str | None]
"""Of a response: its thought and its final answer; both None where it did not keep the prompt's format."""


@dataclass(frozen=True)
class Prompt:
    """A user turn, and how a response to it is taken apart. docs/extending.md shows how to write one."""

    template: str
    """Its text, without the image. `<question>` and `<options>` are filled in, these as `(A) red (B) blue`."""
    split: Callable[[str], Parts]
    """A response's thought, and the text after it, not yet parsed into a letter."""
    is_read_whole: bool = False
    """Whether an evaluation looks for the answer in the whole response, not after the thought only."""
    num_tokens: int = 100
    """Of a usual question under it, by LLaVA-1.5's tokenizer; for estimates."""
    then: str | None = None
    """The template of a second turn, asked by itself and with the image: `<first>` is the answer to the first turn."""
    joint: str = "\nAnswer: "
    """What stands between the two answers in a response, which holds both: `split` takes the whole apart."""

    @property
    def lists_options(self) -> bool:
        """Whether it asks for one of several options, so that a question without them cannot be asked."""
        return any("<options>" in template for template in (self.template, self.then or ""))

    def __post_init__(self) -> None:
        if "<first>" in self.template or (self.then is not None and "<first>" not in self.then):
            raise ValueError(
                f"the prompt {self.template[:60]!r}: write <first> in `then`, for the first answer, and not in the "
                "template"
            )
        if not _QUESTION.search(self.template):
            raise ValueError(
                f"the template {self.template[:60]!r} has no place for the question; write <question> there"
            )


PROMPTS: Plugins[Prompt] = PROMPT_NAMES.of_kind(lambda found: isinstance(found, Prompt), "a vcot.Prompt")


def split_at(separator: str, *, leave_out: str = "") -> Callable[[str], Parts]:
    """A `Prompt.split`: what stands before the first `separator` is the thought, without the first `leave_out`."""

    def split(text: str) -> Parts:
        thought, found, answer = text.partition(separator)
        if not found or not answer.strip():
            return None, None
        return (thought.replace(leave_out, "", 1) if leave_out else thought).strip(), answer.strip()

    return split


def split_at_last(separator: str) -> Callable[[str], Parts]:
    """A `Prompt.split`: what stands after the last `separator` is the final answer, and all before it the thought."""

    def split(text: str) -> Parts:
        thought, found, answer = text.rpartition(separator)
        return (thought.strip(), answer.strip()) if found and answer.strip() else (None, None)

    return split


def render_options(choices: Sequence[str]) -> str:
    """`(A) red (B) blue`, as ScienceQA's authors and LLaVA write options."""
    return " ".join(f"({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(choices))


def render_prompt(name: PromptName, task: Task) -> str:
    """The user turn for `task`, without a place for images: the first, where the prompt has two.

    Raises RecipeError for a question without options where the prompt lists them.

    What a tokenizer would read as more than text is removed from a question: a literal `<image>` counts as a second image,
    and a literal `<|im_end|>` ends the turn.
    """
    prompt = PROMPTS.resolve(name)
    if prompt.lists_options and not task.choices:
        raise RecipeError(
            f"prompt {name} asks for one of several options, and task {task.id} has none; take thought_specific, "
            "thought_generic or short_answer, or leave such questions out (tasks.filter.options=some)"
        )
    return _render(prompt.template, task)


def render_second(name: PromptName, task: Task, first: str) -> str | None:
    """The second turn, after `first` was answered; None where the prompt has one turn only."""
    then = PROMPTS.resolve(name).then
    return None if then is None else _render(then, task, first)


def join_turns(name: PromptName, first: str, second: str) -> str:
    """The response that both answers make together."""
    return f"{first.strip()}{PROMPTS.resolve(name).joint}{second.strip()}"


def _render(template: str, task: Task, first: str = "") -> str:
    question = " ".join(_remove_special(task.question).split())
    options = _remove_special(render_options(task.choices))
    fields = {
        "<question>": question,
        "<options>": options,
        "{user instruction}": f"{question}\nOptions: {options}" if task.choices else question,
        "<first>": _remove_special(first).strip(),
    }
    return _FIELD.sub(lambda match: fields[match.group()], template)


def _remove_special(text: str) -> str:
    """The text without special tokens, also where removing one makes another of what stood around it."""
    while (shorter := _SPECIAL.sub("", text)) != text:
        text = shorter
    return text


def split_thought(name: PromptName, text: str) -> Parts:
    """A response's parts, as the prompt with this name takes them. Raises RecipeError where that prompt is not found."""
    return PROMPTS.resolve(name).split(text)


def _split_nothing(text: str) -> Parts:
    return "", text.strip()


def _split_at_last_answer(text: str) -> Parts:
    starts = [match.start() for match in _FINAL_ANSWER.finditer(text)]
    return (text[: starts[-1]].strip(), text[starts[-1] :].strip()) if starts else (None, None)


def _read(name: str) -> str:
    """The template's text, without the file's last line break."""
    return resources.files(__name__).joinpath(f"{name}.txt").read_text("utf-8").removesuffix("\n")


THOUGHT_SPECIFIC = Prompt(_read("thought_specific"), split_at("<R>"), num_tokens=95)
THOUGHT_GENERIC = Prompt(
    _read("thought_generic"),
    split_at("Here is my response:", leave_out="Here is my thought process:"),
)
ZERO_SHOT = Prompt(_read("zero_shot"), _split_nothing, is_read_whole=True, num_tokens=87)
COT = Prompt(_read("cot"), _split_at_last_answer, is_read_whole=True, num_tokens=111)
"""The tokens are means over 1,145 A-OKVQA and 58 ScienceQA questions (test_estimate.py)."""
SHORT_ANSWER = Prompt(_read("short_answer"), _split_nothing, is_read_whole=True, num_tokens=20)
"""For questions that are answered in words; LLaVA-1.5's (Liu et al. 2023, Improved Baselines, section 3.2)."""
TWO_STAGE = Prompt(_read("two_stage"), split_at_last("\nAnswer: "), num_tokens=90, then=_read("two_stage_then"))
CAPTION_FIRST = Prompt(
    _read("caption_first"), split_at_last("\nAnswer: "), num_tokens=90, then=_read("caption_first_then")
)
