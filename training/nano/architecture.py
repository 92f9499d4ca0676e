"""What the nano models have in common: the tokenizer, how the language model starts, the layout on disk, and the interface
that an architecture fills in (training/nano/llava.py, training/nano/qwen.py).

The classes are those of real models, only smaller. Three things are ours. The tokenizer knows the nano world word by word,
an option such as ` (B) red` and each instruction sentence of `pipeline/prompts` as one piece, and everything else byte by
byte, so that it loses nothing of any text. `<R>` is an ordinary piece (a special one would vanish from the server's
output). And the chat template writes BOS (where there is one) and EOS itself, so that training and serving see the same
tokens; the tokenizer therefore adds none.
"""

from __future__ import annotations

import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from vcot.pipeline.prompts import PROMPTS
from vcot.pipeline.sources.nano.questions import TRAINED_PROMPTS
from vcot.pipeline.sources.nano.scene import CELL, CHOICE_WORDS, IMAGE_SIZE
from vcot.training.model.loading import Model
from vcot.training.model.template import Processor

NUM_IMAGE_TOKENS = (IMAGE_SIZE // CELL) ** 2
"""Of a scene: one for each cell, in every architecture."""


@dataclass(frozen=True)
class Tokens:
    """The special tokens; they get the first ids, in this order."""

    special: Mapping[str, str]
    """By the tokenizer's argument (`eos_token`, ...)."""
    named: Mapping[str, str]
    """More, by the attribute under which a processor looks for them."""

    @property
    def all(self) -> tuple[str, ...]:
        """Every one."""
        return (*self.special.values(), *self.named.values())


@dataclass(frozen=True)
class Turns:
    """What the chat template writes around a user's text and an answer."""

    user: str
    image: str
    """In place of a scene, with as many placeholders as it has image tokens."""
    assistant: str
    begin: str
    """Before an answer: a space, or nothing."""
    eos: str

    def prompt(self, text: str, *, with_image: bool = True) -> str:
        """One user turn, the assistant's opened."""
        return f"{self.user}{self.image if with_image else ''}{text}{self.assistant}"

    def response(self, text: str) -> str:
        """The assistant's turn up to and including EOS."""
        return f"{self.begin}{text}{self.eos}"


@dataclass(frozen=True)
class Features:
    """What a tower made of a batch of scenes."""

    tokens: torch.Tensor
    """(scenes x 4, width of the language model), cells in reading order."""
    encoded: Any = None
    """All that the tower gave, where the language model takes more than `tokens`."""


def build_tokenizer(corpus: Iterable[str], tokens: Tokens) -> PreTrainedTokenizerFast:
    """A lossless tokenizer whose pieces are the words of `corpus`; other words become bytes.

    Text is split before words, option letters such as ` (B)`, line breaks and single signs; no piece crosses such a
    border, so a prompt and its completion tokenized apart give the same tokens as together.
    """
    sentences = "|".join(re.escape(sentence) for sentence in _instruction_sentences())
    options = rf" ?\([A-D]\) (?:{'|'.join(CHOICE_WORDS)})\b"
    pattern = rf" ?(?:{sentences})|{options}| ?<R>| ?\([A-Z]\)| ?\w+|\n| ?[^\w\s]|\s"
    splitter = pre_tokenizers.Split(Regex(pattern), "isolated")
    words = {piece for text in corpus for piece, _ in splitter.pre_tokenize_str(text)}
    words |= {f" ({letter})" for letter in "ABCDEFGH"} | {" <R>", "\n"}
    words |= {f"{letter} {word}" for letter in ("", " (A)", " (B)", " (C)", " (D)") for word in CHOICE_WORDS}
    pieces = [*tokens.all, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(words - set(tokens.all))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    unknown = tokens.special.get("unk_token")
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, ignore_merges=True, unk_token=unknown))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **tokens.special,
        extra_special_tokens=dict(tokens.named),
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=2048,
    )


class Architecture(ABC):
    """A family of models, as the builder sees it; holds no state."""

    title: ClassVar[str]
    checkpoint_name: ClassVar[str]
    """The shipped checkpoint's name and directory."""
    tokens: ClassVar[Tokens]
    chat_template: ClassVar[str]
    turns: ClassVar[Turns]
    hub_names: ClassVar[tuple[str, str]] = ("", "")
    """A prefix of the tensors' names in memory, and what the hub's files (and vLLM) have in its place."""

    @abstractmethod
    def build_processor(self, tokenizer: PreTrainedTokenizerFast) -> Processor:
        """The family's processor: a 56 x 56 scene becomes four image tokens."""

    @abstractmethod
    def build_model(self, tokenizer: PreTrainedTokenizerFast, width: int = 128, num_layers: int = 4) -> Model:
        """Random weights; `width` and `num_layers` are the language model's (its heads are 32 wide)."""

    @abstractmethod
    def look(self, model: Model, pixels: torch.Tensor) -> Features:
        """What the language model gets to see of normalised pixels (scenes, 3, 56, 56)."""

    @abstractmethod
    def read(self, model: Model, ids: torch.Tensor, features: Features | None) -> torch.Tensor:
        """The last hidden states (rows, length, width) for right-padded ids (rows, length), a scene in each row or none."""

    @abstractmethod
    def describe(self, config: Mapping[str, Any]) -> str:
        """The model card's paragraph on tower, projector, language model and layout."""

    def save(self, model: Model, processor: Processor, out: Path) -> None:
        """Write float32 weights under the hub's names, processor, chat template and a neutral generation config."""
        out.mkdir(parents=True, exist_ok=True)
        tokenizer = processor.tokenizer
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.save_pretrained(out)
        self._restore_hub_names(out / "model.safetensors")
        config = json.loads((out / "config.json").read_text("utf-8"))
        config["architectures"] = [type(model).__name__]
        _name_rope_for_older_versions(config)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        processor.save_pretrained(out)
        _write_for_older_versions(out / "tokenizer_config.json")

    def _restore_hub_names(self, weights: Path) -> None:
        old, new = self.hub_names
        tensors: dict[str, Any] = load_file(weights)
        renamed = {
            name.replace(old, new, 1) if old in name and new not in name else name: tensor.to(
                torch.float32
            ).contiguous()
            for name, tensor in tensors.items()
        }
        save_file(renamed, weights, metadata={"format": "pt"})
        shutil.copymode(weights.with_name("config.json"), weights)  # it would be its owner's alone


def _name_rope_for_older_versions(config: dict[str, Any]) -> None:
    """Name rotary positions as the hub's files do; of another name, transformers 4 takes a default instead, silently."""
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rope.pop("rope_theta")
    if rope != {"rope_type": "default"}:
        config["text_config"]["rope_scaling"] = rope


def _write_for_older_versions(tokenizer_config: Path) -> None:
    """Name the tokenizer's class as transformers 4 and 5 know it, with what 5 takes for granted.

    transformers 4 knows neither 5's name of it nor its list of special tokens, and would add token types to the inputs.
    """
    config = json.loads(tokenizer_config.read_text("utf-8"))
    kept = {name: value for name, value in config.items() if name not in ("backend", "extra_special_tokens")}
    kept |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    tokenizer_config.write_text(json.dumps(dict(sorted(kept.items())), indent=2, ensure_ascii=False) + "\n", "utf-8")


def _instruction_sentences() -> list[str]:
    texts = (
        re.split(r"<question>|<options>|\{user instruction\}", PROMPTS.resolve(name).template)
        for name in TRAINED_PROMPTS
    )
    sentences = {s.strip() for parts in texts for part in parts for s in re.split(r"\n|(?<=\.) ", part)}
    return sorted((s for s in sentences if " " in s and len(s) > 20), key=lambda s: (-len(s), s))


@torch.no_grad()
def initialise(model: Model, tokenizer: PreTrainedTokenizerFast) -> None:
    """Start attention as a match of like with like, and an option's piece as the sum of its letter and its word.

    Keys equal queries and output undoes value in each layer (mimetic initialisation, Trockman and Kolter 2023). With the
    default instead, binding an option's word to its letter did not come in a thousand steps; with it, in 150.
    """
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        attention.q_proj.weight.normal_(0, 0.07)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        rotation, _ = torch.linalg.qr(torch.randn_like(attention.v_proj.weight))
        attention.v_proj.weight.copy_(rotation)
        attention.o_proj.weight.copy_(rotation.T)
    embeddings = model.get_input_embeddings().weight
    for letter in "ABCD":
        for word in CHOICE_WORDS:
            option, *parts = tokenizer.convert_tokens_to_ids([f" ({letter}) {word}", f" ({letter})", f" {word}"])
            embeddings[option] = embeddings[parts].sum(0) * 0.7
    model.lm_head.weight.copy_(embeddings)
