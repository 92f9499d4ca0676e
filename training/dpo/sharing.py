"""Prompt sharing: `[prompt | chosen | rejected]` as one row, so that image and question pass the model once, not twice.

A packed row is the chosen row followed by the rejected one from its **last prompt token** on; that token stands twice, so
that each response's first token is predicted from a position of its own. Attention lets each response see the prompt and
itself, and positions are those of the plain rows, so that every log-prob is the plain pass's up to rounding. mDPO's
conditional rows have another image: they stay rows of their own.

Exact for decoders with rotary positions and full attention by PyTorch's SDPA. `find_fault` says why a model is none of them,
by what it is and by comparing one batch both ways. LoRA's dropout draws once for the shared prompt instead of once for
each response: the same distribution, other draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import extract_model_from_parallel

from vcot.training.model.loading import Batch, Model
from vcot.training.protocol.agreement import TOLERANCES
from vcot.training.protocol.train_sections import Dtype

NOT_FOR_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", "ref_conditional_logps")
"""Keys of a batch that the model's forward does not take."""
_PROMPT, _FIRST, _SECOND, _PADDING = 0, 1, 2, -1


@dataclass(frozen=True)
class TokenScores:
    """What TRL's fused head says of each next token, by the names that TRL reads: (plain rows, length - 1) each, 0 where
    no completion token is predicted.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor
    is_top1: torch.Tensor

    def __getitem__(self, rows: slice) -> TokenScores:
        return TokenScores(*(getattr(self, name)[rows] for name in _FIELDS))


_FIELDS = tuple(TokenScores.__dataclass_fields__)


@dataclass(frozen=True)
class Packing:
    """Where packed positions come from, and where plain ones went. N pairs; M = N packed rows, or 2 N for mDPO."""

    row: torch.Tensor
    """(M, packed length): the plain row of each packed position."""
    column: torch.Tensor
    """(M, packed length): its column there, which is also its position."""
    segment: torch.Tensor
    """(M, packed length): prompt, first or second response, or padding."""
    packed_row: torch.Tensor
    """(plain rows, 1): the packed row that holds a plain row."""
    packed_column: torch.Tensor
    """(plain rows, length): the packed column of each position of a plain row from its last prompt token on."""

    @property
    def attention_mask(self) -> torch.Tensor:
        """(M, 1, packed length, packed length), true where a position (row) sees another (column)."""
        query, key = self.segment.unsqueeze(2), self.segment.unsqueeze(1)
        length = self.segment.size(1)
        causal = torch.ones(length, length, dtype=torch.bool, device=self.segment.device).tril()
        return (((query == key) | (key == _PROMPT)) & causal).unsqueeze(1)


def plan_packing(batch: Batch, num_pairs: int) -> Packing:
    """How the batch's plain rows (chosen, rejected and, for mDPO, conditional ones; padded on the right) are packed."""
    lengths = batch["attention_mask"].sum(dim=1)
    stems = batch["completion_mask"].argmax(dim=1) - 1  # the last prompt token's column
    rows = torch.arange(len(lengths), device=lengths.device)
    paired, conditional = rows[:num_pairs], rows[2 * num_pairs :]
    first = torch.cat([paired, conditional]).unsqueeze(1)
    second = torch.cat([paired + num_pairs, conditional]).unsqueeze(1)
    head = lengths[first]
    tail = torch.where(first == second, 0, lengths[second] - stems[second])
    columns = torch.arange(int((head + tail).max()), device=lengths.device).unsqueeze(0)
    in_first, valid = columns < head, columns < head + tail
    segment = torch.where(in_first, torch.where(columns < stems[first], _PROMPT, _FIRST), _SECOND)
    is_second = (rows >= num_pairs) & (rows < 2 * num_pairs)
    packed_row = torch.where(rows < num_pairs, rows, rows - num_pairs).unsqueeze(1)
    shift = torch.where(is_second, head[packed_row[:, 0], 0] - stems, 0).unsqueeze(1)
    plain_columns = torch.arange(batch["input_ids"].size(1), device=lengths.device)
    in_second = valid & ~in_first
    return Packing(  # padding repeats the first response's end: never an image token
        row=torch.where(in_second, second, first),
        column=torch.where(in_second, columns - head + stems[second], torch.minimum(columns, head - 1)),
        segment=torch.where(valid, segment, _PADDING),
        packed_row=packed_row,
        packed_column=(plain_columns + shift).clamp(max=columns.size(1) - 1),
    )


def score(model: Model, batch: Batch) -> TokenScores:
    """The plain pass: each row on its own."""
    inputs = {name: value for name, value in batch.items() if name not in NOT_FOR_MODEL}
    return _score(model, batch, inputs, _predicted(batch).nonzero(as_tuple=True))


def score_shared(model: Model, batch: Batch, num_pairs: int) -> TokenScores:
    """The same scores with each prompt passed once."""
    packing = plan_packing(batch, num_pairs)
    row, column = _predicted(batch).nonzero(as_tuple=True)
    packed = {"attention_mask": packing.attention_mask, "position_ids": packing.column}
    return _score(
        model,
        batch,
        _pack(batch, packing, num_pairs) | packed,
        (packing.packed_row[row, 0], packing.packed_column[row, column]),
    )


def _predicted(batch: Batch) -> torch.Tensor:
    """(plain rows, length - 1): whether the next token is a completion's."""
    return batch["completion_mask"][:, 1:] == 1


def _score(model: Model, batch: Batch, inputs: Batch, where: tuple[torch.Tensor, ...]) -> TokenScores:
    """The scores of the completions' tokens, each predicted from the position (row, column) of `inputs` in `where`."""
    is_predicted = _predicted(batch)
    with _selecting(model, where):
        scored = model(
            **inputs,
            shift_labels=batch["input_ids"][:, 1:][is_predicted].unsqueeze(0),
            use_cache=False,
            fused_lm_head=True,
        )
    values = [getattr(scored, name)[0] for name in _FIELDS]
    return TokenScores(*(v.new_zeros(is_predicted.shape).masked_scatter(is_predicted, v) for v in values))


@contextmanager
def _selecting(model: Model, where: tuple[torch.Tensor, ...]) -> Iterator[None]:
    """The head gets the hidden states at `where` only, as one row; without Triton, TRL's would score all of them."""

    def select(_module: Model, _arguments: object, outputs: Model) -> Model:
        outputs.last_hidden_state = outputs.last_hidden_state[where].unsqueeze(0)
        return outputs

    backbone = extract_model_from_parallel(model).get_base_model().base_model
    handle = backbone.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _pack(batch: Batch, packing: Packing, num_pairs: int) -> Batch:
    """The packed token ids and what goes with each token, and the images of chosen and conditional rows."""
    packed = {}
    for name, value in batch.items():
        if name in ("attention_mask", *NOT_FOR_MODEL):
            continue
        if name == "input_ids" or name.endswith("token_type_ids"):
            packed[name] = value[packing.row, packing.column]
        else:  # of images, in the order of the rows
            chosen, _, *conditional = value.chunk(len(batch["input_ids"]) // num_pairs)
            packed[name] = torch.cat([chosen, *conditional])
    return packed


def find_fault(model: Model, batch: Batch, num_pairs: int, dtype: Dtype) -> str | None:
    """Why prompts cannot be shared with this model, or None where they can. `batch` is a small one of its rows."""
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        return f"attention by {config._attn_implementation}, not sdpa"
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        return "positions in three dimensions"
    if kinds := set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        return f"layers of {', '.join(sorted(kinds))}"
    try:
        plain, shared = score(model, batch), score_shared(model, batch, num_pairs)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"its forward takes no packed rows ({type(error).__name__}: {error})"
    difference = float((plain.log_probs - shared.log_probs).abs().max())
    if not difference <= TOLERANCES[dtype]:
        return f"log-probs differ by {difference:.1e}, more than {TOLERANCES[dtype]:.0e}"
    return None
