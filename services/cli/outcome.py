"""How a command ends: one sentence and an exit code for whatever goes wrong."""

from __future__ import annotations

import errno
import itertools
import sys

from cyclopts import CycloptsError

from vcot.pipeline.printable import printable
from vcot.services.cli.names import app
from vcot.services.cli.stop import SAID, Terminated, ignore_signals, stop_in_order


def main() -> None:
    """The command that the arguments name, to its end."""
    stop_in_order()
    if (option := _find_empty(sys.argv)) is not None:
        _say(f"what follows {option} is empty; is a variable in the command line not set?")
        sys.exit(2)
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=True)
    except CycloptsError:
        sys.exit(2)
    except KeyboardInterrupt as stop:
        ignore_signals()
        _say(SAID)
        sys.exit(143 if isinstance(stop, Terminated) else 130)
    except OSError as error:
        if (said := _explain(error)) is None:
            raise
        _say(f"{said}, and the same command goes on where it was")
        sys.exit(1)
    except Exception as error:
        from vcot.pipeline.errors import VcotError

        if not isinstance(error, VcotError):
            raise
        _say(str(error))
        sys.exit(error.exit_code)


def _find_empty(words: list[str]) -> str | None:
    """What stands before an empty argument, as of `--run "$RUN"` where RUN is not set: the current folder, as a path."""
    for before, word in itertools.pairwise(words):
        if not word:
            return before
        if word.startswith("--") and word.find("=") == len(word) - 1:
            return word
    return None


def _explain(error: OSError) -> str | None:
    """What its owner can do about a file or disk that cannot be used; None for what is no fault of a file."""
    where = f" at {error.filename}" if error.filename else ""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"the disk is full{where}; make room"
        case errno.EFBIG:
            return f"a file would be larger than is allowed here{where}; raise the limit (`ulimit -f`)"
        case errno.EMFILE | errno.ENFILE:
            return f"too many files are open{where}; raise the limit (`ulimit -n`)"
        case errno.EIO:
            return f"the disk cannot be read or written{where}; see to it"
    if not error.filename:
        return None
    return f"{error.filename} cannot be used ({error.strerror}); see that it is there and may be read and written"


def _say(text: str) -> None:
    sys.stderr.write(f"vcot: {printable(text)}\n")
