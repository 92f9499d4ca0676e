"""One task as a page shows it: every chain with what the judge said of it, and what differs between two of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import combinations, groupby
from typing import Literal

from vcot.pipeline.ledger import Ledger
from vcot.pipeline.printable import printable
from vcot.pipeline.records import Judgment, Response, Task
from vcot.services.view.index import IndexedAnswer, IndexedRequest, Item, Sheet

_TOKEN = re.compile(r"\s*\w+|\s*[^\w\s]|\s+")
_MAX_DIFF = 4000
"""Characters of a text that is compared word by word; a longer one only to there."""
_MAX_ALIKE = 50_000
"""Pairs of one word in both texts, up to which the time that all of them take is short: an English text has some 10,000."""


@dataclass(frozen=True)
class ViewedChain:
    """A response, with its texts."""

    number: int
    """From 1, on its page."""
    asked: IndexedRequest
    """What it answers."""
    key: str
    answered: IndexedAnswer
    text: str
    """What was said, or why nothing was; what a reader's eye cannot see is written out."""
    is_error: bool
    is_cut: bool
    rationale: str
    """The judge's, or why it gave no score."""
    num_words: int


@dataclass(frozen=True)
class Block:
    """What was answered under one prompt and temperature, about one image."""

    title: str
    chains: Sequence[ViewedChain]


@dataclass(frozen=True)
class Stretch:
    """Words of two texts that are the same in both, or in one of them only."""

    kind: Literal["same", "first", "second"]
    text: str


@dataclass(frozen=True)
class ViewedTask:
    """All of it."""

    item: Item
    task: Task
    blocks: Sequence[Block]

    @property
    def chains(self) -> list[ViewedChain]:
        """Of all blocks."""
        return [chain for block in self.blocks for chain in block.chains]

    def choose_two(self, keys: Sequence[str] = ()) -> tuple[ViewedChain, ViewedChain] | None:
        """Which two are compared: those named, else chosen and rejected, else the first answers of base and policy."""
        by_key = {chain.key: chain for chain in self.chains if not chain.is_error}
        named = [by_key[key] for key in keys if key in by_key]
        if len(named) == 2 and named[0] is not named[1]:
            return named[0], named[1]
        by_place = {chain.answered.place: chain for chain in by_key.values()}
        if "chosen" in by_place and "rejected" in by_place:
            return by_place["chosen"], by_place["rejected"]
        return self._find_flip(by_key)

    def _find_flip(self, by_key: Mapping[str, ViewedChain]) -> tuple[ViewedChain, ViewedChain] | None:
        """Two answers in one block, of two checkpoints, of which one is right and the other is not."""
        for block in self.blocks:
            for first, second in combinations((chain for chain in block.chains if chain.key in by_key), 2):
                differ = (first.answered.outcome == "correct") != (second.answered.outcome == "correct")
                if differ and first.asked.checkpoint != second.asked.checkpoint:
                    return first, second
        return None


def build_example(item: Item, task: Task, sheet: Sheet, ledger: Ledger) -> ViewedTask:
    """Read the texts of an item."""
    answered = [one for asked in sheet.asked for one in asked.responses]
    responses = ledger.get(Response, (one.key for one in answered))
    judgments = ledger.get(Judgment, (one.judgment for one in answered if one.judgment))
    numbers = iter(range(1, len(answered) + 1))
    by_title: dict[str, list[IndexedRequest]] = {}
    for asked in sheet.asked:
        by_title.setdefault(_name_block(asked), []).append(asked)
    blocks = [
        Block(title, [chain for asked in own for chain in _list_chains(asked, responses, judgments, numbers)])
        for title, own in by_title.items()
    ]
    return ViewedTask(item, task, blocks)


def _name_block(asked: IndexedRequest) -> str:
    """Prompt, temperature, and the image that was shown where it is not the question's own."""
    return asked.setting if asked.shown == "true" else f"{asked.setting}, shown: {asked.shown} image"


def _list_chains(
    asked: IndexedRequest, responses: Mapping[str, Response], judgments: Mapping[str, Judgment], numbers: Iterator[int]
) -> Iterator[ViewedChain]:
    for one in asked.responses:
        if (response := responses.get(one.key)) is None:  # of a ledger that was there before; the index follows
            continue
        judgment = judgments.get(one.judgment or "")
        said = (
            "" if judgment is None else judgment.rationale or (f"no score: {judgment.error}" if judgment.error else "")
        )
        yield ViewedChain(
            number=next(numbers),
            asked=asked,
            key=one.key,
            answered=one,
            text=printable(response.text if response.text is not None else response.error or "").strip(),
            is_error=response.text is None,
            is_cut=response.finish_reason == "length",
            rationale=printable(said),
            num_words=len(response.words.split()),
        )


def compare_texts(first: str, second: str) -> list[Stretch]:
    """What differs between two texts, word by word; where a few words make up both, these are no reason to align them."""
    left, right = _TOKEN.findall(first[:_MAX_DIFF]), _TOKEN.findall(second[:_MAX_DIFF])
    times = Counter(right)
    is_repetitive = sum(number * times[word] for word, number in Counter(left).items()) > _MAX_ALIKE
    matcher = SequenceMatcher(None, left, right, autojunk=is_repetitive)
    found: list[Stretch] = []
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal":
            found.append(Stretch("same", "".join(left[a:b])))
            continue
        found += [Stretch("first", "".join(left[a:b]))] if a < b else []
        found += [Stretch("second", "".join(right[c:d]))] if c < d else []
    return list(_join(found))


def _join(found: Iterable[Stretch]) -> Iterator[Stretch]:
    """Neighbours of one kind as one."""
    for kind, own in groupby(found, key=lambda stretch: stretch.kind):
        yield Stretch(kind, "".join(stretch.text for stretch in own))
