"""The records that cross disk or HTTP: frozen, closed and addressed by what determines them.

A key is a hash of what determines a record: weights digest, image hash, rendered prompt, sampling settings, seed and
sample index (a judgment adds the judge and its prompt). No path, clock or machine name enters a key, so a record made on
one machine is found again on another, and nothing is ever reused across weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Split = Literal["train", "validation", "test"]
PromptName = str
"""As a recipe names a prompt: a built-in such as `cot`, or one of one's own."""
Outcome = Literal["correct", "incorrect", "no_answer"]
ShownImage = Literal["true", "blank", "other", "cropped", "question_only", "options_only"]
"""What a question is asked with: its own image, an empty one, another question's, the middle of its own; or without an
image, and with neither image nor question."""


def content_key(**parts: Any) -> str:
    """The SHA-256 hex digest of `parts` as canonical JSON. Models are dumped; the order of keywords does not matter."""
    plain = {k: v.model_dump(mode="json") if isinstance(v, BaseModel) else v for k, v in parts.items()}
    return hashlib.sha256(canonical_json(plain)).hexdigest()


def canonical_json(value: object) -> bytes:
    """`value` in the one way that hashes see it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


class Record(BaseModel):
    """A frozen record that refuses unknown fields, and numbers that JSON cannot say: a NaN would be read back as null."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ImageRef(Record):
    """An image in a run's image store, normalised once at the source (RGB, upright, PNG or JPEG)."""

    sha256: str
    """Of the stored file's bytes; what every key uses."""
    path: str
    """Relative to the run directory; never part of a key."""
    width: Annotated[int, Field(ge=1)]
    height: Annotated[int, Field(ge=1)]


def name_images(images: Sequence[ImageRef]) -> str | None:
    """What keys and statistics know images by: the hash of the only one, or a hash of all in order; None for none."""
    if len(images) == 1:
        return images[0].sha256
    return content_key(images=[image.sha256 for image in images]) if images else None


class Task(Record):
    """One question, with its options, its images and, where the source has it, its gold answer."""

    id: str
    question: str
    choices: tuple[str, ...]
    """Its options; none of a question that is answered in words."""
    answer: int | None
    """Index into `choices`; None where the source keeps it secret."""
    gold: str = ""
    """The gold answer of a question that is answered in words."""
    accepted: tuple[str, ...] = ()
    """The answers in words that several people gave, each as often as it was given; `gold` is one of them."""
    prior: int | None = None
    """Index of the choice that one would expect without looking, where the source knows one; it may be the right one."""
    rationale: str = ""
    facts: tuple[str, ...] = ()
    """Statements known to be true of the image (nano world only); what the verifier checks a thought against."""
    images: tuple[ImageRef, ...] = ()
    """In the order in which they are shown, before the text."""
    subject: str | None = None
    """The source's coarse label, by which a benchmark's table may have its columns: NAT, SOC or LAN of ScienceQA."""
    family: str = ""
    """The source's finer label: a nano question family, a ScienceQA topic; empty where it has none."""
    labels: dict[str, str] = {}
    """The source's other labels by their kind: grade and context (TXT, IMG, TXT IMG or NO) of ScienceQA."""
    source: str
    split: Split

    @model_validator(mode="before")
    @classmethod
    def _read_older(cls, data: Any) -> Any:
        """Earlier versions kept `image`, one or none."""
        if isinstance(data, dict) and "image" in data:
            image = data["image"]
            return {name: value for name, value in data.items() if name != "image"} | {
                "images": [image] if image else []
            }
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.choices and not 2 <= len(self.choices) <= 26:
            raise ValueError(f"task {self.id} has {len(self.choices)} choice(s); a question needs 2 to 26, or none")
        if self.choices and (self.gold or self.accepted):
            raise ValueError(f"task {self.id} has options and an answer in words; a question has one or the other")
        if self.accepted and self.gold not in self.accepted:
            raise ValueError(f"task {self.id}: gold {self.gold!r} is not among the accepted answers")
        for name, index in (("answer", self.answer), ("prior", self.prior)):
            if index is not None and not 0 <= index < len(self.choices):
                raise ValueError(f"task {self.id}: {name} {index} is not an index into {len(self.choices)} choices")
        return self

    @property
    def picture(self) -> str | None:
        """What keys and statistics know its images by."""
        return name_images(self.images)

    @property
    def answer_letter(self) -> str | None:
        """The gold option's letter, A for the first."""
        return None if self.answer is None else chr(ord("A") + self.answer)

    @property
    def prior_letter(self) -> str | None:
        """The expected option's letter."""
        return None if self.prior is None else chr(ord("A") + self.prior)

    def is_right(self, letter: str) -> bool:
        """Whether an option's letter is the gold one, or that of an option that says the same."""
        return self.answer is not None and is_same_option(self.choices, ord(letter) - ord("A"), self.answer)

    @property
    def right_options(self) -> list[bool]:
        """Whether each option is right: the gold one, and those that say the same."""
        return [self.is_right(chr(ord("A") + place)) for place in range(len(self.choices))]


def is_same_option(choices: Sequence[str], one: int, other: int) -> bool:
    """Whether two options say the same, so that whoever names either is right (A-OKVQA holds some such questions)."""
    return choices[one].split() == choices[other].split()


class SamplingParams(Record):
    """How a response is drawn."""

    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)]
    n: Annotated[int, Field(ge=1)] = 1
    seed: int


class CheckpointRef(Record):
    """Which weights: a readable name, and the digest that identifies them."""

    name: str
    digest: str
    kind: Literal["base", "adapter", "merged"]
    parent: str | None = None
    """Digest of the checkpoint that it was trained from."""


class Usage(Record):
    """Tokens billed for one request."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def num_tokens(self) -> int:
        """All of them."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        """Of both."""
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )


def add_usages(usages: Iterable[Usage | None]) -> Usage | None:
    """The sum of those that are known; None where none is."""
    known = [usage for usage in usages if usage is not None]
    return sum(known[1:], known[0]) if known else None


class Response(Record):
    """One sampled response of a group of `n`, or the error that came instead."""

    key: str
    group: str
    """Key of the request that it came in; the n responses of a group share it."""
    task: str
    index: int
    checkpoint: CheckpointRef
    prompt: PromptName
    sampling: SamplingParams
    text: str | None = None
    thought: str | None = None
    answer: str | None = None
    """The part of `text` after the thought, unparsed; None where the response did not keep the prompt's format."""
    finish_reason: str | None = None
    usage: Usage | None = None
    """The whole group's, on its first response only."""
    latency_s: float | None = None
    error: str | None = None
    reason: str = ""
    """The error in one word, as `too_long`, for accounts."""
    refused: bool = False
    """The server will never answer this request (it does not fit the context, say)."""
    is_first_turn: bool = False
    """It answers the first of a prompt's two turns, kept to be asked once; a response holds its text and tokens."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.text is None) == (self.error is None):
            raise ValueError("a response has either a text or an error")
        return self

    @property
    def words(self) -> str:
        """What it says, however it is spaced: responses with the same words are judged once, and are no pair."""
        return " ".join((self.text or "").split())


class Answered(Record):
    """What came of asking a judge, or the sampled model once more: an answer, or the error in its place."""

    usage: Usage | None = None
    """Of all attempts, those without an answer included."""
    error: str | None = None
    reason: str = ""
    """The error in one word, as `refusal`, for accounts."""
    refused: bool = False
    """The judge answered, and not with what can be read: it is not asked for ever."""

    @property
    def is_final(self) -> bool:
        """Whether it is not asked again: answered, or refused for good."""
        return self.error is None or self.refused


class Verdict(Answered):
    """What a judge says of one response: a score, or why there is none. Higher is better."""

    score: float | None = None
    low: float | None = None
    """With `high`, the 95 % interval of the score, from a judge that knows one."""
    high: float | None = None
    rationale: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.score is None) == (self.error is None):
            raise ValueError("a verdict has either a score or an error")
        return self


class Judgment(Verdict):
    """A judge's verdict on one response, as the ledger keeps it."""

    key: str
    response: str
    task: str
    judge: str
    """The judge and its version, for example `verifier/1` or `pointwise/1:gpt-4o-mini`."""
    num_asked: int = 0
    """How often it answered, with a score or without."""


class Reply(Answered):
    """What a judge's model answered to one of several questions that a verdict is made of, as the ledger keeps it."""

    key: str
    """Of what was asked: model, text, images and settings."""
    judge: str
    """Who asked, and is billed."""
    text: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.text is None) == (self.error is None):
            raise ValueError("a reply has either a text or an error")
        return self


class ImageGain(Answered):
    """How likely a checkpoint finds a response with its task's images, and with blank ones, as the ledger keeps it."""

    key: str
    """Of response and checkpoint."""
    response: str
    checkpoint: str
    """Weights digest."""
    logp_true: float | None = None
    """Log-probability, in nats, of the response's text given prompt and images."""
    logp_blank: float | None = None
    """The same with blank images in their place."""
    num_tokens: int = 0
    """Of the text."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.logp_true is None) == (self.logp_blank is None) == (self.error is not None):
            raise ValueError("an image gain has either two log-probabilities or an error")
        return self

    @property
    def value(self) -> float | None:
        """What the images add, in nats: the text is exp(value) times as likely with them; None of an error."""
        if self.logp_true is None or self.logp_blank is None:
            return None
        return self.logp_true - self.logp_blank


class Score(Record):
    """One response of an evaluation, scored against gold. A failed request has an error and no value."""

    key: str
    """The response's."""
    task: str
    index: int = 0
    """The response's, in its group."""
    seed: int = 0
    """Of the sampling."""
    subject: str | None
    """The column of the benchmark's table that it counts in, beside the average."""
    labels: tuple[tuple[str, str], ...] = ()
    """The benchmark's finer labels, each with its kind."""
    image: str | None
    """What the question's own images are known by, whichever were shown: the cluster of the statistics."""
    checkpoint: str
    """Weights digest."""
    prompt: PromptName
    temperature: float
    value: Outcome | None = None
    points: Annotated[float, Field(ge=0, le=1)] | None = None
    """What it earns by a rule that knows more than right and wrong; None where `value` says it all."""
    answer: str | None = None
    """The letter that was parsed, or the words."""
    is_cut: bool = False
    """The response reached its longest length, so that it has no final answer."""
    target: str
    """The gold letter, or the gold words."""
    prior: str | None = None
    """The letter that one would expect without looking, where the source knows one."""
    num_choices: int
    """How many options a guess picks from; 0 where it cannot be guessed."""
    error: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.value is None) == (self.error is None):
            raise ValueError("a score has either a value or an error")
        return self

    @property
    def earned(self) -> float:
        """Between 0 and 1: what an accuracy is the mean of."""
        return float(self.value == "correct") if self.points is None else self.points


class Interval(Record):
    """An estimate in [0, 1] (or a difference in [-1, 1]) with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    n: Annotated[int, Field(ge=0)]
    """Independent clusters behind it (images, or questions without one)."""


class StageCount(Record):
    """The accounting equation of one stage: requested = ok + cached + failed + refused; the last two are by reason."""

    stage: str
    requested: int
    ok: int = 0
    cached: int = 0
    failed: int = 0
    refused: int = 0
    """Without a result for good: a dropped tie, a judge's refusal, a row that would not fit."""
    reasons: dict[str, int] = {}
    """How many failed or were refused for what, in one word each, as `rate_limit`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.requested != self.ok + self.cached + self.failed + self.refused:
            raise ValueError(f"stage {self.stage} does not add up: {self.requested} requested, but {self!r}")
        if sum(self.reasons.values()) != self.failed + self.refused:
            raise ValueError(f"stage {self.stage}: the reasons of {self!r} do not add up to what failed or was refused")
        return self

    @property
    def by_reason(self) -> str:
        """The reasons in words, the commonest first: `10 refusal, 2 content filter`."""
        ordered = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{number} {reason.replace('_', ' ')}" for reason, number in ordered)
