"""Things in an unusual state, which show whether a model says what it sees or what it expects (the paper, Figure 4).

The paper's model asserts an object's usual state although the image contradicts it. Here are 24 things, each drawn twice: as
one expects it, and in a state that contradicts that (a green stop sign, a clock without hands, a chair with three legs).
The same question with the same options is asked about both. On the second drawing the expected answer is wrong, and a model
that gives it follows its prior; the first shows whether the model recognises the thing and its state at all.

Limits: drawings are no photographs, and 24 things bound an interval to about 20 points on each side: this shows a habit, and
no small change of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vcot.pipeline.errors import DataError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.records import Task
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources import unusual_drawings as drawings
from vcot.pipeline.sources.nano.questions import PngStore
from vcot.pipeline.sources.pen import Drawing, render
from vcot.pipeline.sources.source import Load, Source

UNUSUAL_VERSION = "unusual/1"
"""Raise it with any change of a drawing or a question."""
USUAL, UNUSUAL = "usual", "unusual"
"""The two families: the thing as expected, and the thing that contradicts it."""


@dataclass(frozen=True)
class Thing:
    """What is drawn, and what is asked about it."""

    name: str
    draw: Drawing
    question: str
    usual: str
    unusual: str
    others: tuple[str, ...] = ()
    """Further options, wrong on both drawings."""

    @property
    def choices(self) -> tuple[str, ...]:
        """The options, in an order that depends on the thing's name only."""
        choices = [self.usual, self.unusual, *self.others]
        random.Random(f"{UNUSUAL_VERSION}/{self.name}").shuffle(choices)
        return tuple(choices)


def _coloured(name: str, draw: Drawing, usual: str, unusual: str, *others: str, what: str = "") -> Thing:
    return Thing(name, draw, f"What colour is the {what or name}?", usual, unusual, others)


def _counted(name: str, draw: Drawing, parts: str, usual: str, unusual: str, *others: str) -> Thing:
    return Thing(name, draw, f"How many {parts} does the {name} have?", usual, unusual, others)


THINGS = (
    _coloured("stop sign", drawings.draw_stop_sign, "red", "green", "blue", "yellow"),
    _coloured("banana", drawings.draw_banana, "yellow", "blue", "red", "purple"),
    _coloured(
        "traffic light",
        drawings.draw_traffic_light,
        "red",
        "blue",
        "green",
        "yellow",
        what="lit lamp of the traffic light",
    ),
    _coloured("tree", drawings.draw_tree, "green", "purple", "red", "blue", what="crown of the tree"),
    _coloured("sun", drawings.draw_sun, "yellow", "green", "blue", "red"),
    _coloured("snowman", drawings.draw_snowman, "white", "pink", "blue", "yellow"),
    _coloured("carrot", drawings.draw_carrot, "orange", "blue", "red", "yellow"),
    _coloured("strawberry", drawings.draw_strawberry, "red", "blue", "green", "yellow"),
    _coloured("school bus", drawings.draw_bus, "yellow", "pink", "green", "blue"),
    _coloured("grass", drawings.draw_meadow, "green", "red", "yellow", "blue"),
    _counted("clock", drawings.draw_clock, "hands", "two", "none", "one", "four"),
    _counted("chair", drawings.draw_chair, "legs", "four", "three", "two", "five"),
    _counted("hand", drawings.draw_hand, "fingers, with the thumb,", "five", "six", "four", "three"),
    _counted("bicycle", drawings.draw_bicycle, "wheels", "two", "three", "one", "four"),
    _counted("star", drawings.draw_star, "points", "five", "six", "four", "eight"),
    _counted("spider", drawings.draw_spider, "legs", "eight", "six", "four", "five"),
    _counted("face", drawings.draw_face, "eyes", "two", "three", "one", "four"),
    _counted("dog", drawings.draw_dog, "legs", "four", "five", "three", "two"),
    Thing(
        "clock numbers", drawings.draw_clock_numbers, "Which number is at the top of the clock?", "12", "6", ("3", "9")
    ),
    Thing("door", drawings.draw_door, "Is the door open or closed?", "closed", "open"),
    Thing("candle", drawings.draw_cake, "Is the candle on the cake burning?", "yes", "no"),
    Thing("cup", drawings.draw_cup, "Where is the cup?", "on the table", "under the table"),
    Thing("fish", drawings.draw_fish, "Where is the fish?", "in the water", "in the air"),
    Thing("house", drawings.draw_house, "Which way up is the house?", "upright", "upside down"),
)


def generate_unusual(store: PngStore) -> Iterator[Task]:
    """Both questions about each thing, the usual one first, with `prior` the option that one expects."""
    for thing in THINGS:
        for family, state in ((USUAL, thing.usual), (UNUSUAL, thing.unusual)):
            yield Task(
                id=f"{family}-{thing.name.replace(' ', '-')}",
                question=thing.question,
                choices=thing.choices,
                answer=thing.choices.index(state),
                prior=thing.choices.index(thing.usual),
                images=(store.put_png(render(thing.draw, state)),),
                family=family,
                source="unusual",
                split="test",
            )


def load_whole(name: str, generate: Callable[[PngStore], Iterator[Task]]) -> Load:
    """Loads a small test that is drawn here, all of it. Raises DataError where a part, or another split, is asked for."""

    def load(section: TasksSection, store: ImageStore) -> Iterator[Task]:
        if section.split != "test" or section.num_tasks is not None or section.path is not None:
            raise DataError(
                f"the {name} things are a small test, asked whole: set split to test, no num_tasks and no path"
            )
        return generate(store)

    return load


UNUSUAL_THINGS = Source(
    load=load_whole("unusual", generate_unusual),
    digest=lambda _: UNUSUAL_VERSION,
    is_drawn=True,
    licence="license: apache-2.0",
)
