"""The card of a published data set: what its rows are, where they come from, what is not among them, and what they cost.

The hub reads its header. What others wrote (models, servers, the names of files) is in it as text only, and nothing says on
which machine it was made.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from vcot.pipeline.contamination import Contamination
from vcot.pipeline.judges.cost import Cost
from vcot.pipeline.markdown import UNSEEN, plain
from vcot.pipeline.pairs import Couple
from vcot.pipeline.public import public_name
from vcot.pipeline.publish import SplitSize, name_judge
from vcot.pipeline.records import StageCount, Task
from vcot.pipeline.sections import TasksSection
from vcot.pipeline.sources.census import count_sources
from vcot.pipeline.sources.source import SOURCES, Source, list_parts

_SIZES = (1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")
"""The hub's size categories, below each number of rows."""
_TURNS = """
    list:
    - name: role
      dtype: string
    - name: content
      list:
      - name: type
        dtype: string
      - name: text
        dtype: string"""
_FEATURES = f"""
  - name: images
    list: image
  - name: prompt{_TURNS}
  - name: chosen{_TURNS}
  - name: rejected{_TURNS}
  - name: task
    dtype: string
  - name: chosen_score
    dtype: float64
  - name: rejected_score
    dtype: float64
  - name: judge
    dtype: string
  - name: policy
    dtype: string
  - name: chosen_response
    dtype: string
  - name: rejected_response
    dtype: string
  - name: chosen_judgment
    dtype: string
  - name: rejected_judgment
    dtype: string
""".strip("\n")
"""The columns in the card, as datasets 3 to 5 read them."""
_NUM_BINS = 8
_UNSEEN = re.compile(f"[{UNSEEN}\\x00-\\x08\\x0b-\\x1f]")


def render_card(
    train: Sequence[Couple],
    validation: Sequence[Couple],
    sizes: Mapping[str, SplitSize],
    *,
    questions: TasksSection,
    policy: str,
    recipe: str,
    model: str,
    judged: StageCount,
    paired: StageCount,
    digest: str,
    prompts: Mapping[str, str],
    tasks: Sequence[Task],
    contamination: Contamination | None,
    cost: Cost | None,
    judge_report: str = "",
) -> str:
    """The card, from the couples and sizes of both splits.

    `questions` is the recipe's section, `policy` names the pair policy, and `recipe` is the whole as TOML, without what is
    about the machine. `digest` is that of the rows, `tasks` are all that were sampled for, `prompts` has each by what it
    is for, `contamination` and `cost` are None where nothing was compared and nothing paid, and `judge_report` is the
    judge's report card as Markdown.
    """
    pairs = [*train, *validation]
    size = next((name for limit, name in _SIZES if len(pairs) < limit), "1M<n<10M")
    parts = [(part, SOURCES.resolve(part.source)) for part in list_parts(questions)]
    gap = sum(pair.chosen_score - pair.rejected_score for pair in pairs) / len(pairs)
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: train.parquet
  - split: validation
    path: validation.parquet
dataset_info:
  features:
{_FEATURES}
{_render_sizes(sizes)}
{_render_licence([source for _, source in parts])}
language:
- en
size_categories:
- {size}
task_categories:
- visual-question-answering
{_render_origin([source for _, source in parts])}tags:
- preference
- dpo
- trl
- vcot
---
# Preference pairs from AI feedback

{len(train)} training and {len(validation)} validation pairs; no image is in both. Each row holds two of several sampled
chains of thought on one question, as the pair policy {plain(policy)} picks them.

| | |
|---|---|
| questions | {" + ".join(part.source + _say_hint(source, part) for part, source in parts)} |
| licence of questions and images | {plain("; ".join(dict.fromkeys(_say_licence(source) for _, source in parts)))} |
| sampled from | {plain(public_name(model))} ({pairs[0].policy}) |
| judge | {plain(name_judge(pairs[0].judge))} |
| responses judged | {judged.ok:,} of {judged.requested:,}{plain(_why(judged))} |
| questions that gave a pair | {paired.ok:,} of {paired.requested:,}{plain(_why(paired))} |
| mean score gap | {gap:.3f} |
| held out | {plain(_say_contamination(contamination))} |
| judging took | {plain(cost.summary if cost else "nothing that is billed")} |
| SHA-256 of the rows | {digest} |

Columns: `images, prompt, chosen, rejected` as TRL's vision preference format takes them; `task, chosen_score,
rejected_score, judge, policy` say where a row comes from, and `chosen_response, rejected_response, chosen_judgment,
rejected_judgment` are the keys of the records that it was made of. The images and questions keep the licence of their
source.

## Questions

{_render_sources(tasks, pairs)}

## Scores and lengths

{_render_histogram("score", [pair.chosen_score for pair in pairs], [pair.rejected_score for pair in pairs])}

{_render_histogram("words", *_list_words(sizes))}
{_render_report(judge_report)}
## Prompts

{_render_prompts(prompts)}

## Recipe

```toml
{recipe.strip()}
```
"""


def _render_sources(tasks: Sequence[Task], pairs: Sequence[Couple]) -> str:
    """What was sampled from, and how many pairs it gave, data set by data set."""
    source_of = {task.id: task.source for task in tasks}
    given = Counter(source_of[pair.task] for pair in pairs)
    rows = [
        "| data set | questions | images | with options | with gold answer | words | pairs |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in count_sources(tasks):
        counts = (each.num_tasks, each.num_images, each.num_with_options, each.num_with_gold)
        figures = " | ".join(f"{number:,}" for number in counts)
        rows.append(f"| {plain(each.source)} | {figures} | {each.mean_words:.1f} | {given[each.source]:,} |")
    return "\n".join(rows)


def _say_licence(source: Source) -> str:
    """The header's lines as one."""
    fields = dict(line.split(": ", 1) for line in source.licence.splitlines() if ": " in line)
    known = (fields.get(name) for name in ("license_name", "license_link"))
    return ", ".join(filter(None, [fields.get("license", "other"), *known]))


def _say_contamination(found: Contamination | None) -> str:
    return "it was not compared with an evaluation set" if found is None else found.summary


def _list_words(sizes: Mapping[str, SplitSize]) -> tuple[list[int], list[int]]:
    """Of all chosen and all rejected responses."""
    chosen = [num for size in sizes.values() for num in size.chosen_words]
    return chosen, [num for size in sizes.values() for num in size.rejected_words]


def _render_histogram(what: str, chosen: Sequence[float], rejected: Sequence[float]) -> str:
    """How many chosen and rejected responses lie in each of at most eight equal steps, as a table in plain text."""
    values = [*chosen, *rejected]
    low, high = min(values, default=0), max(values, default=0)
    step = (high - low) / _NUM_BINS or 1.0

    def count(some: Sequence[float], place: int) -> int:
        return sum(min(_NUM_BINS - 1, math.floor((value - low) / step)) == place for value in some)

    lines = [f"{what:>21}{'chosen':>10}{'rejected':>10}"]
    for place in range(_NUM_BINS if high > low else 1):
        start = low + place * step
        end = start + step if high > low else high
        lines.append(f"{f'{start:.4g} to {end:.4g}':>21}{count(chosen, place):>10,}{count(rejected, place):>10,}")
    return _fence("\n".join(lines))


def _render_report(report: str) -> str:
    return f"\n## The judge's report card\n\n{report.strip()}\n" if report else ""


def _render_prompts(prompts: Mapping[str, str]) -> str:
    return "\n\n".join(f"{plain(name)}:\n\n{_fence(text)}" for name, text in prompts.items())


def _fence(text: str) -> str:
    """A block of text as it is, but for what nobody can see; its fence is longer than any within."""
    shown = _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", shown)), 3)
    return f"{fence}text\n{shown}\n{fence}"


def _say_hint(source: Source, section: TasksSection) -> str:
    if not source.has_hints:
        return ""
    return ", each after its hint" if section.hint else ", without their hints"


def _why(count: StageCount) -> str:
    return f"; the others: {count.by_reason}" if count.reasons else ""


def _render_sizes(sizes: Mapping[str, SplitSize]) -> str:
    """The splits as `dataset_info` of the hub's cards has them."""
    lines = ["  splits:"]
    for name, size in sizes.items():
        lines += [f"  - name: {name}", f"    num_bytes: {size.num_bytes}", f"    num_examples: {size.num_examples}"]
    lines.append(f"  download_size: {sum(size.num_bytes_on_disk for size in sizes.values())}")
    lines.append(f"  dataset_size: {sum(size.num_bytes for size in sizes.values())}")
    return "\n".join(lines)


def _render_origin(sources: Sequence[Source]) -> str:
    names = dict.fromkeys(source.hub_name for source in sources if source.hub_name)
    return "source_datasets:\n" + "".join(f"- {name}\n" for name in names) if names else ""


def _render_licence(sources: Sequence[Source]) -> str:
    """The header's lines: of several licences the hub has no name, and the table names each."""
    licences = {source.licence for source in sources}
    return licences.pop() if len(licences) == 1 else "license: other"
