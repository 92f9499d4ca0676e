"""Image gain: how much likelier a response is with its task's images than with blank ones in their place. Pure, but for
reading the ledger.

With y the response's text, x the prompt and i the images, it is log p(y | x, i) - log p(y | x, blank), in nats, under the
weights that sampled y: the pointwise mutual information of text and images, with a blank image standing for none. It is a
sum over tokens: a long description of what is seen gains more than a letter does. Near 0, the model would have said the
same without looking.

The same tokens are compared: the prompt's, which a server tells, come first, blank images are as large as the true ones, and
what the template puts behind the text is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from vcot.pipeline.client import Scored
from vcot.pipeline.errors import BadAnswer
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.pair_policies import rank_image_driven
from vcot.pipeline.pairs import Judged, list_choosable
from vcot.pipeline.records import ImageGain, Response, Task, content_key
from vcot.pipeline.sections import PairsSection
from vcot.pipeline.stage import Tally, batched


@dataclass(frozen=True)
class Compared:
    """One text under both images."""

    logp_true: float
    logp_blank: float
    num_tokens: int


def key_gain(response: Response) -> str:
    """Key of a response's gain under the weights that sampled it."""
    return content_key(response=response.key, checkpoint=response.checkpoint.digest)


def compare_images(prompt: Sequence[int], true: Scored, blank: Scored) -> Compared:
    """The log-probabilities of what follows `prompt` in both conversations.

    Raises BadAnswer, of the item, where they are not the same tokens after that prompt, or none.
    """
    begin = len(prompt)
    if true.tokens != blank.tokens:
        fault = "a blank image of the same size makes other tokens than the true one"
    elif true.tokens[:begin] != tuple(prompt):
        fault = "the prompt's tokens are others once a response follows, as where a template rewrites earlier turns"
    elif len(true.tokens) == begin:
        fault = "the response has no tokens"
    else:
        logp_true, logp_blank = (math.fsum(scored.logprobs[begin - 1 :]) for scored in (true, blank))
        if math.isfinite(logp_true) and math.isfinite(logp_blank):
            return Compared(logp_true, logp_blank, len(true.tokens) - begin)
        fault = "a token has no finite log-probability"
    raise BadAnswer(f"no image gain: {fault}", scope="item", reason="not_comparable")


def list_candidates(task: Task, judged: Sequence[Judged], section: PairsSection) -> list[Judged]:
    """Those whose gain decides whether they are chosen: of responses that say the same, one."""
    if len(judged) < 2:
        return []
    ranked = rank_image_driven(task, list_choosable(judged, section), judged)
    return [] if isinstance(ranked, str) else list({chosen.response.key: chosen for chosen, _ in ranked}.values())


def list_owed(candidates: Iterable[Judged]) -> list[Judged]:
    """Those whose gain was not asked, or failed."""
    return [one for one in candidates if one.gain is None or not one.gain.is_final]


def count_gains(candidates: Iterable[Sequence[Judged]]) -> Tally:
    """The account of all of them, before anything is asked: what is owed has no outcome yet."""
    tally = Tally("gain", total=0)
    for one in chain.from_iterable(candidates):
        tally.total += 1
        if one.gain is not None and one.gain.is_final:
            tally.add_kept(one.gain)
    return tally


def read_gains(groups: Iterable[tuple[Task, Sequence[Judged]]], ledger: Ledger) -> Iterator[tuple[Task, list[Judged]]]:
    """The same groups, each response with the gain that the ledger holds of it."""
    for chunk in batched(groups):
        keys = {one.response.key: key_gain(one.response) for _, judged in chunk for one in judged}
        found = ledger.get(ImageGain, keys.values())
        for task, judged in chunk:
            yield task, [replace(one, gain=found.get(keys[one.response.key])) for one in judged]
