"""What services/planning/estimate.py assumes, each with its source: hardware, rates, lengths, sizes, prices.

Most are a `Span`: favourable, likely, unfavourable. A guess says that it is one; what the first run measures should replace
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A figure if things go well, as is likely, and if they go badly; for costs, from low to high."""

    low: float
    likely: float
    high: float

    def __add__(self, other: Span) -> Span:
        return Span(self.low + other.low, self.likely + other.likely, self.high + other.high)

    def __mul__(self, factor: float) -> Span:
        return Span(self.low * factor, self.likely * factor, self.high * factor)

    def each(self, other: Span) -> tuple[tuple[float, float], ...]:
        """The three pairs."""
        return (self.low, other.low), (self.likely, other.likely), (self.high, other.high)

    def times(self, other: Span) -> Span:
        """The product of both in each case."""
        return Span(*(a * b for a, b in self.each(other)))


@dataclass(frozen=True)
class CardKind:
    """A kind of GPU, by its data sheet."""

    name: str
    usable_gib: float
    """As CUDA counts it: `total capacity` in torch's out-of-memory messages."""
    bandwidth: float
    """Bytes a second."""
    flops: float
    """A second, dense, 16 bits with float32 sums."""


A100_80 = CardKind("A100 80 GB", 79.1, 2.039e12, 312e12)
H100_80 = CardKind("H100 80 GB", 79.1, 3.35e12, 989e12)
L40S_48 = CardKind("L40S 48 GB", 44.4, 0.864e12, 362e12)
A100_40 = CardKind("A100 40 GB", 39.4, 1.555e12, 312e12)
RTX4090_24 = CardKind("RTX 4090 24 GB", 23.5, 1.008e12, 165e12)
KINDS: tuple[tuple[CardKind, int], ...] = (
    (RTX4090_24, 1),
    (A100_40, 1),
    (L40S_48, 1),
    (A100_80, 1),
    (H100_80, 1),
    (H100_80, 8),
)
"""What a run's table shows: kinds, and how many of each."""
SIZES: Mapping[int, float] = {24: 22.0, 40: 39.4, 48: 44.4, 80: 79.1}
"""GiB that CUDA counts on the smallest card that is sold by each size in GB: L4 or A10G, A100, L40S, A100 or H100."""

THOUGHT_TOKENS = Span(100, 200, 400)
"""Of a response with a thought. A guess: LLaVA-1.5 writes one to four sentences of thought, then an answer."""
ANSWER_TOKENS = Span(5, 20, 60)
"""Of a response without one. A guess."""
DECODE_EFFICIENCY = Span(0.75, 0.6, 0.4)
"""Share of the memory's bandwidth that decoding reaches; 0.77 was measured for Llama-3.1-8B at one request on an A100."""
STEP_OVERHEAD_S = 0.003
"""Scheduling and sampling of a step, beside reading memory."""
PREFILL_EFFICIENCY = Span(0.6, 0.45, 0.3)
"""Share of the card's operations that a prompt's part reaches: long products of matrices."""
PARALLEL_EFFICIENCY = 0.8
"""Of tensor parallel or FSDP over cards in one machine, against as many cards alone."""
MAX_SEQUENCES = 256
"""vLLM 0.32's default of sequences at once on cards below 70 GiB and on A100."""
TRAIN_EFFICIENCY = Span(0.45, 0.3, 0.15)
"""Model FLOPs utilization of a training by transformers with LoRA, few rows at a time. A guess; large batches reach 0.5."""
NF4_EFFICIENCY = 0.7
"""Of a training on a base in 4 bits, against one in 16: each product unpacks its weights first. A guess."""
PAIR_SHARE = Span(0.6, 0.8, 0.95)
"""Tasks whose best and worst response differ in score, where pairs.num does not bind. A guess."""
CANDIDATE_SHARE = Span(0.25, 0.5, 0.8)
"""Of the responses, those whose image gain decides whether they are chosen: right, and above another. A guess."""
OPTIONS = 4
"""Of a question, before the questions are read: A-OKVQA's and most of nano's have 4, ScienceQA's 2 to 5."""
JUDGE_CALL_S = Span(1.5, 3.0, 6.0)
"""One verdict of gpt-4o-mini, image included. A guess."""
JUDGE_TOKENS_PER_MINUTE = Span(10e6, 2e6, 0.2e6)
"""gpt-4o-mini's limits in OpenAI's usage tiers 4, 2 and 1."""
JUDGE_TEXT_TOKENS = 180
"""Instructions, question and options; 174 by LLaVA-1.5's tokenizer over the same questions."""
JUDGE_VERDICT_TOKENS = Span(60, 90, 150)
"""Three sentences and a score, as JSON."""
DOWNLOAD_BYTES_S = Span(200e6, 50e6, 10e6)
DISK_BYTES_S = Span(2e9, 1e9, 0.3e9)
"""Reading, hashing and writing weights, cache included."""
WEIGHT_PASSES = 10
"""Of base and policy together: digest, canary, merge, gate, parity."""
GATE_FORWARDS = 120
"""Passes of the float32 models in canary and gate: 16 pairs twice by three models, and the canaries' tokens."""
STREAM_BYTES_S = Span(50e9, 12e9, 3e9)
"""From the machine's memory to the GPU, where the float32 model does not fit there."""
ENGINE_START_S = Span(60, 150, 400)
"""vLLM on a GPU, compilation and CUDA graphs included."""
RESPONSE_BYTES, JUDGMENT_BYTES = 1_350, 700
"""In the ledger, with 200 tokens of text (test_estimate.py)."""
CHECKPOINTS_KEPT = 2
"""Of TRL's, for resuming (training/dpo/fit.py)."""
NANO_RESPONSES_S = Span(180, 90, 40)
"""Responses a second of the bundled nano on two CPU cores: `make demo` evaluated 7,200 in 78 s with tests beside it."""
ACCURACY = 0.5
"""Of an evaluation that was not made: where differences are hardest to see."""
CORRELATION = Span(0.6, 0.3, 0.0)
"""Of base and policy, response by response. nano's paired differences have 0.2 to 0.4; 0 is for models without kinship."""
ALIKE = 0.6
"""Correlation of two responses of one checkpoint to a question. A guess."""
