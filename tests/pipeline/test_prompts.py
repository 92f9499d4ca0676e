import pytest

from vcot.pipeline.errors import RecipeError
from vcot.pipeline.prompts import PROMPTS, render_options, render_prompt, split_thought
from vcot.pipeline.records import Task

TASK = Task(
    id="t",
    question="What <options> is\nthis <im<image>age>?",
    choices=("a cat", "a dog"),
    answer=0,
    source="nano",
    split="train",
)


def test_the_papers_prompts_are_kept_word_for_word():
    assert PROMPTS.resolve("zero_shot").template == (
        "Given the question, please choose the answer from one of the following options.\n"
        "Then write your final response in the 'The answer is (answer)' format.\n"
        "Question: <question>\nOptions: <options>"
    )
    assert PROMPTS.resolve("cot").template == (
        "Please select the correct answer from one of the following options based on the question and the image.\n"
        "First, write down your internal thoughts. This must include your draft response and its evaluations.\n"
        "Then write your final response in the 'The answer is (answer)' format.\n"
        "Question: <question>\nOptions: <options>"
    )
    assert PROMPTS.resolve("thought_specific").template == (
        "Respond to the following user query in a comprehensive and detailed way. But first write down your internal "
        "thoughts. This must include your draft response and its evaluation. After this, write your final response "
        'after "<R>".\nUser query: {user instruction}'
    )


def test_options_are_lettered():
    assert render_options(("x", "y", "z")) == "(A) x (B) y (C) z"


def test_a_question_without_options_has_no_line_of_them():
    task = TASK.model_copy(update={"question": "Why?", "choices": (), "answer": None})
    assert render_prompt("thought_specific", task).endswith("\nUser query: Why?")
    assert render_prompt("short_answer", task) == "Why?\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize("name", ["zero_shot", "cot", "two_stage", "caption_first"])
def test_a_prompt_that_asks_for_an_option_is_not_asked_without_options(name):
    task = TASK.model_copy(update={"choices": (), "answer": None})
    with pytest.raises(RecipeError, match=rf"prompt {name} asks for one of several options, and task t has none; take"):
        render_prompt(name, task)


def test_a_prompt_is_filled_in_one_pass_and_holds_no_second_image():
    text = render_prompt("zero_shot", TASK)
    assert text.endswith("Question: What <options> is this ?\nOptions: (A) a cat (B) a dog")
    assert "<image>" not in text


@pytest.mark.parametrize(
    "special",
    ["<IMAGE>", "<|image_pad|>", "<|vision_start|>", "<|im_<|im_end|>end|>", "</s>", "[INST]", "<image_soft_token>",
     "<end_of_turn>", "<im<im<image>age>age>", "[IMG]"],
)  # fmt: skip
def test_a_question_holds_no_special_token_of_any_family(special):
    task = TASK.model_copy(update={"question": f"What{special} is it?", "choices": (f"{special}a", "b")})
    assert render_prompt("zero_shot", task).endswith("Question: What is it?\nOptions: (A) a (B) b")


def test_signs_that_are_no_tokens_stay():
    task = TASK.model_copy(update={"question": "Is 1 < 2 | 3 > 2, f[i] or <b>?"})
    assert "Is 1 < 2 | 3 > 2, f[i] or <b>?" in render_prompt("cot", task)


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("thought_specific", "It is red. <R> The answer is (B).", ("It is red.", "The answer is (B).")),
        ("thought_specific", "It is red. The answer is (B).", (None, None)),
        ("thought_specific", "It is red. <R>  ", (None, None)),
        ("thought_generic", "Here is my thought process: hm. Here is my response: B", ("hm.", "B")),
        (
            "cot",
            "Draft: the answer is (A). No. The answer is (B).",
            ("Draft: the answer is (A). No.", "The answer is (B)."),
        ),
        ("cot", "I do not know.", (None, None)),
        ("zero_shot", " The answer is (B).", ("", "The answer is (B).")),
    ],
)
def test_thought_and_answer_are_parsed_apart(name, text, parts):
    assert split_thought(name, text) == parts
