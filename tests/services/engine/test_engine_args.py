import pytest

from vcot.pipeline.errors import RecipeError
from vcot.services.engine.engine_args import check_engine_args
from vcot.services.recipes.recipe import load_recipe


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--max-num-seqs", "64", "--dtype", "auto"), r"--dtype cannot be added \(--dtype\): the recipe.*serve\.dtype"),
        (("--served_model_name=x",), "the gateway must reach"),
        (("--served-model", "x"), r"--served-model cannot be added \(--served-model-name\)"),
        (("--hf-overrides.architectures", "x"), "as it was trained"),
        (("--no-enable-lora",), "as it was trained"),
        (("--allowed-local-media", "/"), "further than the prompt"),
        (("--config", "more.yaml"), "its file could hold any"),
        (("--api-server-count=2",), "a swap must reach every process"),
        (("-tp", "2"), "write vLLM's option out"),
        (("model",), "is no option of vLLM"),
    ],
)
def test_what_vcot_sets_or_rests_on_is_refused_with_the_reason(arguments: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_engine_args(arguments)


def test_other_options_are_passed_on() -> None:
    check_engine_args(("--max-num-seqs", "64", "--no-enable-prefix-caching", "--seed", "-1", "--kv-cache-dtype=fp8"))
    check_engine_args(("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser=qwen3"))
    check_engine_args(("--quantization", "fp8"))


def test_a_recipe_names_the_field() -> None:
    with pytest.raises(RecipeError, match=r"serve\.extra_args: --port cannot be added"):
        load_recipe("nano", ["serve.extra_args=['--port', '1']"])
