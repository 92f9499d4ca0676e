"""Things that are not in the image: whether a model says so, or tells a colour or a number all the same.

Each question about one of the drawings of pipeline/sources/unusual.py is asked twice, with the same options, one of which is
that there is no such thing: about the drawing of the thing as one expects it, and about the drawing of another thing. The
expected state is the prior of both. A model that sees is right on both; one that does not look says the same twice.

Limits: 21 things and drawings, as there. Things that also are a part of another drawing (grass, a face) are left out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from vcot.pipeline.records import Task
from vcot.pipeline.sources.nano.questions import PngStore
from vcot.pipeline.sources.pen import render
from vcot.pipeline.sources.source import Source
from vcot.pipeline.sources.unusual import THINGS, UNUSUAL_VERSION, Thing, load_whole

_VERSION = f"absent/1 of {UNUSUAL_VERSION}"
"""Raise it with any change of a question or of what is shown with it."""
THERE, ABSENT = "there", "absent"
"""The two families: the drawing holds the thing, or another one."""
_LEFT_OUT = frozenset(("grass", "clock numbers", "face"))
_SHIFT = 7
"""How far in the list the other drawing stands: none of these holds the thing, or a part that passes for it."""


def generate_absent(store: PngStore) -> Iterator[Task]:
    """Both questions about each thing, the one about its own drawing first."""
    things = [thing for thing in THINGS if thing.name not in _LEFT_OUT]
    for place, thing in enumerate(things):
        nothing = f"there is no {thing.name} in the image"
        choices = [*thing.choices, nothing]
        random.Random(f"{_VERSION}/{thing.name}").shuffle(choices)
        for family, shown, answer in (
            (THERE, thing, thing.usual),
            (ABSENT, things[(place + _SHIFT) % len(things)], nothing),
        ):
            yield _build(thing, family, tuple(choices), answer, shown, store)


def _build(thing: Thing, family: str, choices: tuple[str, ...], answer: str, shown: Thing, store: PngStore) -> Task:
    return Task(
        id=f"{family}-{thing.name.replace(' ', '-')}",
        question=thing.question,
        choices=choices,
        answer=choices.index(answer),
        prior=choices.index(thing.usual),
        images=(store.put_png(render(shown.draw, shown.usual)),),
        family=family,
        source="absent",
        split="test",
    )


ABSENT_THINGS = Source(
    load=load_whole("absent", generate_absent),
    digest=lambda _: _VERSION,
    is_drawn=True,
    licence="license: apache-2.0",
    num_questions={"test": 2 * (len(THINGS) - len(_LEFT_OUT))},
)
