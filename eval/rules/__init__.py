"""Rules that read a response to a multiple-choice question: other harnesses' as they are published, and ours.

The same outputs under several rules show how much of a figure is the rule. A rule is one function of a response's text and
the question's options. `vcot score --rules` names built-ins, one of one's own as package.module:object, or an entry point
of the group `vcot.rules`; docs/scoring.md has the table of the built-ins with their sources.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vcot.pipeline.open_lists import RULE_NAMES
from vcot.pipeline.plugins import Plugins

UNREAD = "none"
"""The reason where a rule does not say why."""
OFF_LIST = "off_list"
"""The reason where what was read is the letter of no option."""


@dataclass(frozen=True)
class Rule:
    """How one harness reads a response; it is right where it reads the gold option's letter."""

    read: Callable[[str, Sequence[str]], str | None]
    """The letter of the option that a text names, A for the first; where it names none, None, or why in a word of several
    letters. The letter of no option counts as none."""
    guesses: bool = False
    """Whether the original draws a random option where it reads none. Here that counts as 1 / number of options, its
    expectation: nothing is drawn."""
    minds_cut: bool = False
    """Whether a response that is known to be cut off has no answer, whatever stands in it."""

    def pick(self, text: str, choices: Sequence[str]) -> int | str:
        """The index of the option that a text names, or in a word why there is none."""
        said = self.read(text, choices) or UNREAD
        if len(said) > 1:
            return said
        index = ord(said) - ord("A")
        return index if 0 <= index < len(choices) else OFF_LIST


RULES: Plugins[Rule] = RULE_NAMES.of_kind(lambda found: isinstance(found, Rule), "a vcot.Rule")
OWN = "vcot"
"""Our rule, which is the default."""
