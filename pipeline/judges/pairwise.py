"""The pairwise judge: a model compares the responses to a task two at a time, and the wins become ratings.

Each comparison is made in both orders, since judges favour a place, most where the quality is close (Shi et al. 2024,
"Judging the judges"); it is a tie unless both agree. Where they do not, a meta-judge (Wu et al. 2024, Meta-Rewarding) may
say which of the two judgments is more accurate, in both orders again. The ratings are Bradley and Terry's
(pipeline/ranking.py): they order the responses to one task, and say nothing across tasks. The words of the prompts are
ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, ClassVar

from vcot.pipeline.judges import GroupJudge
from vcot.pipeline.judges.model import ModelJudge, Shown, await_all
from vcot.pipeline.judges.trial import TEST_RESPONSE, TEST_TASK
from vcot.pipeline.judges.verdict import Unreadable, build_format, read_object, read_rationale
from vcot.pipeline.ranking import Game, Rating, count_swiss_rounds, list_all, pair_swiss, rate
from vcot.pipeline.records import Reply, Response, Task, Verdict
from vcot.pipeline.sections import JudgeSection

_META = resources.files(__package__).joinpath("meta.txt").read_text("utf-8").strip()
_WORDS = {"a": 1.0, "tie": 0.5, "b": 0.0}
_TIE = 0.5
_COUNTS = re.compile(r"of (\d+) comparisons(?:; (\d+) hung on the order)?")


class PairwiseJudge(ModelJudge, GroupJudge):
    """A model that says which of two responses is better."""

    version = "pairwise/1"
    keeps_replies = True
    template = resources.files(__package__).joinpath("pairwise.txt").read_text("utf-8").strip()
    takes = ModelJudge.takes - {"num_samples"} | {"schedule", "max_meta"}
    response_format: ClassVar[dict[str, Any] | None] = build_format(
        "comparison", {"rationale": {"type": "string"}, "better": {"type": "string", "enum": ["A", "B", "tie"]}}
    )

    @classmethod
    def count_requests(cls, section: JudgeSection, num_responses: int) -> int:
        """Two for each comparison, and two for each that may go to the meta-judge."""
        is_swiss = section.schedule == "swiss"
        by_round = num_responses // 2 * count_swiss_rounds(num_responses)
        num_games = by_round if is_swiss else len(list_all(num_responses))
        return 2 * (num_games + min(section.max_meta, num_games))

    def list_templates(self) -> list[str]:
        """How two are compared, and how the meta-judge is asked."""
        return [self.template, _META]

    def _list_prompts(self) -> Any:
        return [*self.list_templates(), self.section.schedule, self.section.max_meta]

    def render_test(self) -> str:
        """One comparison."""
        worse = TEST_RESPONSE.replace("red", "blue").replace("(A)", "(B)")
        return self.render(self.template, TEST_TASK, response_a=TEST_RESPONSE, response_b=worse)

    def read(self, text: str) -> Verdict:
        """1 where the first is better, 0 where the second is, 0.5 for a tie. Raises Unreadable."""
        fields = read_object(text, "rationale", "better")
        better = fields.get("better")
        said = _WORDS.get(better.strip().lower()) if isinstance(better, str) else None
        if said is None:
            raise Unreadable(f"{better!r} is neither A nor B nor tie")
        return Verdict(score=said, rationale=read_rationale(fields))

    async def judge(self, task: Task, responses: Sequence[Response], *, num_asked: int = 0) -> list[Verdict]:
        """A rating of each among the responses to the task; those that say the same share one."""
        if (lack := self.find_lack(task)) is not None:
            return [lack] * len(responses)
        words = [self.read_words(response) for response in responses]
        distinct = list(dict.fromkeys(words))
        said = [self._say(responses[words.index(each)]) for each in distinct]
        found = await self._play(_Round(task, await self.show(task), said, num_asked))
        return [found[distinct.index(each)] for each in words]

    async def _play(self, table: _Round) -> list[Verdict]:
        """A verdict for each text, from all comparisons; a schedule goes on only when what it builds on was answered."""
        num, played = len(table.said), list[_Played]()
        is_swiss = self.section.schedule == "swiss"
        for _ in range(count_swiss_rounds(num) if is_swiss else 1):
            pairs = pair_swiss(num, [each.game for each in played]) if is_swiss else list_all(num)
            played += await self._compare_all(table, pairs, sum(each.is_meta for each in played))
            if (failed := _find_failed(played)) is not None:
                return [Verdict(error=failed.error, reason=failed.reason)] * num
        return conclude(num, played)

    async def _compare_all(self, table: _Round, pairs: Sequence[tuple[int, int]], num_meta: int) -> list[_Played]:
        compared = await await_all(self._compare(table, *pair) for pair in pairs)
        if _find_failed(compared) is not None:
            return compared
        unstable = [place for place, each in enumerate(compared) if each.hangs_on_order]
        unstable = unstable[: self.section.max_meta - num_meta]
        settled = await await_all(self._settle(table, compared[place]) for place in unstable)
        return [settled[unstable.index(place)] if place in unstable else each for place, each in enumerate(compared)]

    async def _compare(self, table: _Round, first: int, second: int) -> _Played:
        """Both orders; a tie unless they agree."""
        replies = await await_all(
            self._ask(table, self.template, response_a=table.said[a], response_b=table.said[b])
            for a, b in ((first, second), (second, first))
        )
        if (fault := _find_fault(replies)) is not None:
            return _Played(Game(first, second, _TIE), fault=fault)
        there, back = (self.read(reply.text or "") for reply in replies)
        judgments = (_tell(there, 1, 2), _tell(back, 2, 1))
        wins = (there.score or 0.0, 1 - (back.score or 0.0))
        game = Game(first, second, wins[0] if wins[0] == wins[1] else _TIE)
        return _Played(game, hangs_on_order=wins[0] != wins[1], wins=wins, judgments=judgments)

    async def _settle(self, table: _Round, played: _Played) -> _Played:
        """What the more accurate of two judgments says, if the meta-judge finds the same one in both orders."""
        one, other = played.judgments
        said = {"response_a": table.said[played.game.first], "response_b": table.said[played.game.second]}
        replies = await await_all(
            self._ask(table, _META, judgment_a=a, judgment_b=b, **said) for a, b in ((one, other), (other, one))
        )
        if (fault := _find_fault(replies)) is not None:
            return played if fault.refused else replace(played, fault=fault)
        there, back = (self.read(reply.text or "").score or 0.0 for reply in replies)
        won = _TIE if there == _TIE or there != 1 - back else played.wins[0 if there == 1 else 1]
        return replace(played, game=replace(played.game, won=won), is_meta=True)

    async def _ask(self, table: _Round, template: str, **said: str) -> Reply:
        text = self.render(template, table.task, **said)
        return await self.ask_kept(
            text, table.shown, self.read, num_asked=table.num_asked, response_format=self.response_format
        )


@dataclass(frozen=True)
class _Round:
    """What is compared: the texts of a task's responses."""

    task: Task
    shown: Shown
    said: Sequence[str]
    num_asked: int


@dataclass(frozen=True)
class _Played:
    """A comparison, or the reply that says why there is none."""

    game: Game
    fault: Reply | None = None
    hangs_on_order: bool = False
    is_meta: bool = False
    wins: tuple[float, float] = (_TIE, _TIE)
    """By the first, in the one order and in the other."""
    judgments: tuple[str, str] = ("", "")
    """In words, the responses named by their order in the game."""


def conclude(num: int, played: Sequence[_Played]) -> list[Verdict]:
    """Ratings of `num` texts as verdicts; refused where the comparisons that were answered do not connect them."""
    games = [each.game for each in played if each.fault is None]
    try:
        ratings = rate(num, games)
    except ValueError as error:
        reason = next((each.fault.reason for each in played if each.fault), "not_comparable")
        return [Verdict(error=f"no ratings: {error}", reason=reason, refused=True)] * num
    return [_explain(place, rating, played) for place, rating in enumerate(ratings)]


def _explain(place: int, rating: Rating, played: Sequence[_Played]) -> Verdict:
    own = [each for each in played if each.fault is None and place in (each.game.first, each.game.second)]
    won = Counter(each.game.won if each.game.first == place else 1 - each.game.won for each in own)
    told = f"won {won[1]}, tied {won[_TIE]}, lost {won[0]} of {len(own)} comparisons"
    hanging = sum(each.hangs_on_order for each in own)
    told += f"; {hanging} hung on the order" if hanging else ""
    return Verdict(score=rating.value, low=rating.low, high=rating.high, rationale=told)


def count_hanging(rationale: str) -> tuple[int, int]:
    """How many of a response's comparisons hung on the order, and how many there were, as its rationale tells."""
    found = _COUNTS.search(rationale)
    return (int(found[2] or 0), int(found[1])) if found else (0, 0)


def _tell(verdict: Verdict, first: int, second: int) -> str:
    """A judgment in words, for the meta-judge."""
    places = {1.0: f"response {first} is better", 0.0: f"response {second} is better"}
    concluded = places.get(verdict.score or 0.0, "they are equally good")
    return f"(It calls response {first} A and response {second} B.) {verdict.rationale} So {concluded}."


def _find_failed(played: Sequence[_Played]) -> Reply | None:
    """The reply to a comparison that is to be asked again."""
    return next((each.fault for each in played if each.fault and not each.fault.refused), None)


def _find_fault(replies: Sequence[Reply]) -> Reply | None:
    return next((reply for reply in replies if reply.error is not None), None)
