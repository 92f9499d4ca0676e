"""docs/models.md says of vLLM what the installed vLLM says of itself."""

import ast
import re
from importlib import util
from pathlib import Path

PAGE = (Path(__file__).parents[3] / "docs" / "models.md").read_text("utf-8")


def registered(name):
    """The architectures in one of the tables of vLLM's registry, which is read, not imported."""
    registry = Path(util.find_spec("vllm").origin).parent / "model_executor" / "models" / "registry.py"
    for node in ast.parse(registry.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return {key.value: value for key, value in zip(node.value.keys, node.value.values, strict=True) if key}
    raise AssertionError(name)


def test_every_family_that_is_named_is_served_and_mllama_is_not():
    served = registered("_MULTIMODAL_MODELS")
    named = re.findall(r"^\| [^|]+ \| `[^`]+` \| `(\w+)` \|", PAGE, re.MULTILINE)
    assert len(named) == 8
    assert set(named) <= served.keys()
    assert "MllamaForConditionalGeneration" not in served
    last = registered("_PREVIOUSLY_SUPPORTED_MODELS")["MllamaForConditionalGeneration"].value
    assert f"`MllamaForConditionalGeneration`, after {last}" in PAGE
