"""Outputs that other tools logged (`vcot score`), or that runs hold, under published rules, side by side.

A benchmark's questions come from its source as an evaluation's do, and are kept in the user's cache folder, or are those of
the run that is named. Nothing is written into a run, and no server or GPU is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vcot.eval.benchmark import Benchmark
from vcot.eval.eval_section import EvalSection
from vcot.eval.evaluate import Questions, load_questions
from vcot.eval.logged.intake import Intake, Rows, describe_account
from vcot.eval.logged.layouts import Fields, Logged, read_log
from vcot.eval.logged.matching import Matcher
from vcot.eval.logged.readings import Reader, Readings, Said
from vcot.eval.logged.words import read_words
from vcot.eval.matrix import (
    LogAccount,
    Matrix,
    Pair,
    Read,
    RuleResult,
    build_chance,
    build_differences,
    build_gold,
    build_result,
    mark,
)
from vcot.eval.rules import OWN, RULES
from vcot.eval.scorer import read_final_part
from vcot.pipeline.errors import InputError, OwedError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.printable import printable
from vcot.pipeline.records import CheckpointRef, Response
from vcot.pipeline.report import Accounted, Began, Report, Warned, ignore, progress
from vcot.pipeline.sample import SampleRequest
from vcot.pipeline.sources.source import find_source
from vcot.pipeline.stage import batched
from vcot.services.run.directory import RECIPE, open_run
from vcot.services.run.session import Session


@dataclass(frozen=True)
class Scoring:
    """What is asked of `score`."""

    places: Sequence[Path]
    """Log files, and run directories."""
    section: EvalSection | None
    """The benchmark; None for that of the run among `places`."""
    rules: Sequence[str]
    """For questions with options; where some have none, the benchmark's own rule scores, whatever is named."""
    fields: Fields
    is_repeated: bool
    """Whether rows with one id are several responses to the question."""


@dataclass(frozen=True)
class Log:
    """Responses that have a row of the table for each rule."""

    name: str
    setting: str
    """Prompt and temperature of a run's; empty for a file."""
    rows: Rows


async def score(asked: Scoring, report: Report) -> tuple[Matrix, Benchmark]:
    """Every log under every rule, and each later log minus the first of its setting.

    Raises InputError for what cannot be scored at all; rows that cannot are counted and named.
    """
    _check_places(asked)
    for rule in asked.rules:
        RULES.resolve(rule)
    async with AsyncExitStack() as stack:
        runs = [stack.enter_context(open_run(place, access="read")) for place in asked.places if _is_run(place)]
        sessions = [await stack.enter_async_context(Session(run, report)) for run in runs]
        questions = _find_questions(asked, sessions)
        logs = [log for place in asked.places for log in _list_logs(place, asked.fields, sessions, questions)]
        found = _score_all(logs, asked, questions, report)
        return found.model_copy(update={"notes": tuple(_note(questions, sessions))}), questions.benchmark


def score_run(session: Session, checkpoints: Sequence[CheckpointRef]) -> Matrix | None:
    """A run's answers to its benchmark, by checkpoint and setting, the base's first, under every built-in rule.

    None where some question has no options, which no rule reads, and where there is no answer yet.
    """
    questions = session.questions(session.run.recipe.eval.split)
    if questions.are_in_words:
        return None
    logs = list(_list_settings(session, questions, checkpoints))
    asked = Scoring((), None, tuple(RULES.built_ins), Fields(), is_repeated=True)
    return _score_all(logs, asked, questions, ignore) if logs else None


def _check_places(asked: Scoring) -> None:
    if len(set(asked.places)) < len(asked.places):
        raise InputError(f"{', '.join(map(str, asked.places))}: name each file once")
    if asked.section is None and not any(map(_is_run, asked.places)):
        raise InputError(f"{asked.places[0]} does not say what was asked; name it, as with --benchmark scienceqa")
    if asked.section is not None and any(map(_is_run, asked.places)):
        raise InputError(
            "a run has questions of its own, and files beside it are taken to answer them; leave --benchmark out"
        )


def _is_run(place: Path) -> bool:
    return (place / RECIPE).is_file()


def _find_questions(asked: Scoring, sessions: Sequence[Session]) -> Questions:
    """The questions that all logs answer. Raises InputError where runs ask others."""
    found = [session.questions(session.run.recipe.eval.split) for session in sessions]
    found += [_load_cached(asked.section)] if asked.section else []
    questions = found[0]
    if any([task.id for task in other.tasks] != [task.id for task in questions.tasks] for other in found):
        raise InputError(f"{', '.join(map(str, asked.places))} ask different questions; score each run by itself")
    return questions


def _note(questions: Questions, sessions: Sequence[Session]) -> Iterator[str]:
    """How answers were scored, where that is not by the rules that were named, or not as the run's evaluation does."""
    if questions.are_in_words:
        yield (
            f"{questions.benchmark.name} has questions that are answered in words, which no rule for options reads: all "
            "were scored by the benchmark's own rule, as `vcot eval` does without a judge."
        )
    for run in (session.run for session in sessions if session.run.recipe.eval.judge):
        yield (
            f"{run.directory} has a judge score its evaluation (eval.judge), which may know the right answer in other "
            "words; here no judge is asked, and `vcot report` has its figures."
        )


def _load_cached(section: EvalSection) -> Questions:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vcot"
    folder.mkdir(parents=True, exist_ok=True)
    return load_questions(section, section.split, folder, ImageStore(folder))


def _list_logs(place: Path, fields: Fields, sessions: Sequence[Session], questions: Questions) -> list[Log]:
    session = next((session for session in sessions if session.run.directory == place), None)
    if session is None:
        return [Log(printable(str(place)), "", read_log(place, fields))]
    refs = sorted((checkpoint.ref for checkpoint in session.registry.list()), key=lambda ref: ref.kind != "base")
    logs = list(_list_settings(session, questions, refs))
    if not logs:
        raise OwedError(f"run {session.run.directory} holds no answer to its benchmark yet; `vcot eval` asks")
    return [replace(log, name=printable(f"{session.run.directory} {log.name}")) for log in logs]


def _list_settings(session: Session, questions: Questions, refs: Sequence[CheckpointRef]) -> Iterator[Log]:
    """A log for each checkpoint, prompt and temperature that a run has a response of."""
    for ref in refs:
        settings: dict[str, list[SampleRequest]] = {}
        for request in questions.requests(ref, ["true"]):
            settings.setdefault(f"{request.prompt} at {request.sampling.temperature:g}", []).append(request)
        for setting, requests in settings.items():
            if any(one.text is not None for one in _read_answers(session, requests)):
                yield Log(f"{ref.name}, {setting}", setting, _read_answers(session, requests))


def _read_answers(session: Session, requests: Sequence[SampleRequest]) -> Iterator[Logged]:
    """What the run holds of these, as a log."""
    for batch in batched(requests):
        keys = [key for request in batch for key in request.response_keys()]
        for response in session.run.ledger.get(Response, keys).values():
            text = None if response.error is not None else read_final_part(response)
            is_cut = response.finish_reason == "length"
            sample = f"{response.sampling.seed}/{response.index}"
            yield Logged(f"response {sample}", response.task, text, sample, is_cut)


def _score_all(logs: Sequence[Log], asked: Scoring, questions: Questions, report: Report) -> Matrix:
    tasks, section = questions.tasks, questions.benchmark.tasks(questions.section, questions.split)
    names = find_source(section).name_tasks(section)
    gold = build_gold(tasks, questions.benchmark)
    rules = (OWN,) if questions.are_in_words else asked.rules
    accounts: list[LogAccount] = []
    results: list[RuleResult] = []
    reads: dict[tuple[str, str], Read] = {}
    with closing(Reader(rules, [task.choices for task in tasks])) as reader:
        in_words = partial(read_words, tasks=tasks, benchmark=questions.benchmark)
        read = in_words if questions.are_in_words else reader.read
        for log in logs:
            report(Began("score", log.name))
            intake = Intake(log.name, tasks, Matcher(tasks, names), asked.is_repeated)
            readings = _read_log(read, intake, log.rows, report)
            accounts.append(_account(intake, readings, report))
            for rule in rules:
                marks = reads[log.name, rule] = mark(readings, rule, gold)
                results.append(build_result(log.name, rule, marks, readings.reasons[rule], gold))
    return Matrix(
        benchmark=questions.benchmark.name,
        split=questions.split,
        chance=build_chance(gold),
        accounts=tuple(accounts),
        results=tuple(results),
        differences=tuple(build_differences(_pair(logs, rules, reads), gold)),
    )


def _read_log(
    read: Callable[[Iterator[Said]], Iterator[Readings]], intake: Intake, rows: Rows, report: Report
) -> Readings:
    readings = Readings()
    with progress(report, "responses") as advance:
        for readings in read(intake.take(rows)):
            advance(readings.num_read, 0, f"{readings.num_read:,} responses")
    return readings


def _account(intake: Intake, readings: Readings, report: Report) -> LogAccount:
    """Says what became of the rows. Raises InputError where none is scored."""
    account = intake.account()
    sentences = describe_account(account)
    if not readings.num_read:
        raise InputError(
            f"{intake.log} holds no response that can be scored; {sentences[0].removeprefix(f'{intake.log}: ')}"
        )
    report(Accounted(account.count))
    for sentence in sentences:
        report(Warned(sentence))
    return account


def _pair(logs: Sequence[Log], rules: Sequence[str], reads: dict[tuple[str, str], Read]) -> list[Pair]:
    """Each log with the first of its setting; a file, or a run's beside a file that comes first, with the first of all."""
    pairs = []
    for log in logs:
        base = next(other for other in logs if other.setting == log.setting)
        if base is log and "" in (log.setting, logs[0].setting):
            base = logs[0]
        if base is not log:
            pairs += [Pair(log.name, base.name, rule, reads[log.name, rule], reads[base.name, rule]) for rule in rules]
    return pairs
