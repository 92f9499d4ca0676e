"""Runs a file's tests on each of its mutants: `python -m bench.mutation_run ORDER FATES ARGUMENTS`, for bench/mutation.py.

pytest collects the tests once. Every mutant is then a fork of the process that holds them, in which no test has run and
nothing is cached. It runs those that reach the changed function up to the first that fails: first those that failed for
other mutants of it, then the quick ones. So a mutant costs what its tests cost, without a start of pytest, and without
importing what tests import when they run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.state import state

KILLED, TIMEOUT, SURVIVED = "killed", "timeout", "survived"
_PATIENCE = 6.0
"""A test of a mutant may take so many times as long as it took on the code as it is,"""
_PATIENCE_S = 5.0
"""and so much longer, in seconds."""
_HAS_FAILED = 2
"""How a fork ends in which a test failed."""
_FAILED = Path("failed").absolute()
"""Where a fork says which test failed, by its place."""


@dataclass
class Reached:
    """What one test took on the code as it is, and which functions it called."""

    seconds: float
    functions: list[str]


@dataclass
class Runner:
    """A pytest plugin that runs mutants in place of tests."""

    mutants: Sequence[str]
    fates: dict[str, str] = field(default_factory=dict)
    _has_failed: bool = False
    _failed: Counter[tuple[str, int]] = field(default_factory=Counter)
    """How often a test failed for a mutant of a function."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """In place of pytest's own loop."""
        if session.testsfailed:
            pytest.exit("tests could not be imported", returncode=1)
        reached = self._map(session.items)
        for mutant in self.mutants:
            function = mutant.partition("__mutmut_")[0]
            chosen = self._choose(function, reached)
            limits_s = [_PATIENCE_S + _PATIENCE * reached[place].seconds for place in chosen]
            self.fates[mutant] = self._try(mutant, session.items, dict(zip(chosen, limits_s, strict=True)))
            if _FAILED.exists():
                self._failed[function, int(_FAILED.read_text("utf-8"))] += 1
                _FAILED.unlink()
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One test that fails is enough."""
        self._has_failed |= report.failed

    def _choose(self, function: str, reached: Sequence[Reached]) -> list[int]:
        places = [place for place, each in enumerate(reached) if function in each.functions]
        return sorted(places, key=lambda place: (-self._failed[function, place], reached[place].seconds))

    def _map(self, items: Sequence[pytest.Item]) -> list[Reached]:
        """Run all on the code as it is. Ends the command where one fails."""
        path = Path("reached.json").absolute()

        def run() -> None:
            set_mutant_under_test("stats")
            found = []
            for item, following in zip(items, [*items[1:], None], strict=True):
                began = time.monotonic()
                self._run(item, following)
                if self._has_failed:
                    path.write_text(json.dumps({"failed": item.nodeid}), "utf-8")
                    return
                found.append({"seconds": time.monotonic() - began, "functions": sorted(state()._stats)})
                state()._stats.clear()
            path.write_text(json.dumps({"found": found, "modules": sorted(sys.modules)}), "utf-8")

        self._fork(run, is_heard=True)
        told = json.loads(path.read_text("utf-8"))
        if "failed" in told:
            pytest.exit(f"{told['failed']} fails without any change", returncode=1)
        for module in told["modules"]:
            with contextlib.suppress(Exception):  # one that a test made
                importlib.import_module(module)
        return [Reached(**each) for each in told["found"]]

    def _try(self, mutant: str, items: Sequence[pytest.Item], limits_s: Mapping[int, float]) -> str:
        """Run the tests at those places, each within its limit."""

        def run() -> None:
            set_mutant_under_test(mutant)
            chosen = [items[place] for place in limits_s]
            for (place, limit_s), following in zip(limits_s.items(), [*chosen, None][1:], strict=True):
                faulthandler.dump_traceback_later(limit_s, exit=True, file=2)  # with 1, whatever hangs
                self._run(items[place], following)
                if self._has_failed:
                    _FAILED.write_text(str(place), "utf-8")
                    os._exit(_HAS_FAILED)

        code = self._fork(run)
        return SURVIVED if code == 0 else TIMEOUT if code == 1 else KILLED

    @staticmethod
    def _run(item: pytest.Item, following: pytest.Item | None) -> None:
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    @staticmethod
    def _fork(run: Callable[[], None], *, is_heard: bool = False) -> int:
        """The exit status of a fork that runs it."""
        child = os.fork()
        if child == 0:
            os.setsid()
            code = _HAS_FAILED
            try:
                if not is_heard:
                    silence = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(silence, 1)
                    os.dup2(silence, 2)
                run()
                code = 0
            except BaseException:  # noqa: BLE001  a fork goes no further
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(status)


def main() -> None:
    order, fates, *arguments = sys.argv[1:]
    runner = Runner(json.loads(Path(order).read_text("utf-8")))
    code = pytest.main(["-s", "-q", "-p", "no:cacheprovider", *arguments], plugins=[runner])
    if code or not runner.fates:
        raise SystemExit(f"pytest ended with {code}")
    Path(fates).write_text(json.dumps(runner.fates), "utf-8")


if __name__ == "__main__":
    main()
