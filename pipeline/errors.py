"""The exceptions of vcot, one tree.

    VcotError                 anything vcot says to its user; `exit_code` is the process's
    ├── InputError            bad input, nothing was changed: value, place and remedy (exit code 2)
    │   ├── RecipeError       a recipe field that is unknown, of the wrong type or out of bounds
    │   ├── DataError         a data set, a task or an image that cannot be used
    │   ├── CheckpointError   a checkpoint that is missing, incomplete, altered or unknown
    │   ├── MachineError      this machine or its environment lacks something: a key, a port, a build
    │   ├── BusyError         another process holds what this one asks for; only this one may be taken for "not now"
    │   └── OwedError         an earlier step of the run is still owed
    ├── ServerError           a process of ours (vLLM, gateway, trainer) died or never became ready (exit code 1)
    │   └── UnreachableError  nothing answers at an address; only this one may pass by itself while a server starts
    ├── SwapError             a swap was refused or rolled back (exit code 1)
    │   └── OnTrialError      another command has another checkpoint on trial: wait for its end
    ├── StageError            a stage ended with work still owed (exit code 1)
    │   └── AccountError      an account or server refuses every request, until its owner mends something (exit code 1)
    └── RequestError          one request to a model failed; its scope says who may try again (pipeline/faults.py)
        ├── WrongCheckpoint   the answer is stamped with weights other than those asked for: never kept, never repeated
        └── BadAnswer         the upstream answered 200 with something that is not an answer

A message is one sentence that holds the value, the place and the remedy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from vcot.pipeline.records import Usage

Scope = Literal["attempt", "item", "account", "later"]
"""What a fault is about: this attempt (the same request may succeed), this item (never will), every request, or the moment
(it is answered later, and is not to be asked again now)."""


class VcotError(Exception):
    """Anything vcot says to its user in one sentence."""

    exit_code = 1


class InputError(VcotError):
    """Bad input; nothing was changed."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe field that is unknown, of the wrong type or out of bounds."""


class DataError(InputError):
    """A data set, a task or an image that cannot be used."""


class CheckpointError(InputError):
    """A checkpoint that is missing, incomplete, altered or unknown."""


class MachineError(InputError):
    """This machine or its environment lacks something that the command needs."""


class BusyError(InputError):
    """Another process holds what this one asks for; only this one may be taken for "not now"."""


class OwedError(InputError):
    """An earlier step of the run is still owed; only this one may be taken for "not yet"."""


class ServerError(VcotError):
    """A process of ours died or never became ready."""


class UnreachableError(ServerError):
    """Nothing answers at an address; what listens there in a moment, may."""


class SwapError(VcotError):
    """A swap was refused or rolled back; the checkpoint that was live still is."""


class OnTrialError(SwapError):
    """Another command has another checkpoint on trial; it ends when that command is done."""


class StageError(VcotError):
    """A stage ended with work still owed; the same command again does the rest."""


class AccountError(StageError):
    """An account or server refuses every request; the sentence says what its owner can do."""


class RequestError(VcotError):
    """One request to a model failed.

    `reason` is one word for the account, as `rate_limit`. `status` is the HTTP status, or None where no answer came.
    `retry_after_s` is the server's own wish. `param` is the request's field that the server refuses, and `usage` what was
    billed all the same.
    """

    def __init__(
        self,
        message: str,
        *,
        scope: Scope,
        reason: str,
        status: int | None = None,
        retry_after_s: float | None = None,
        param: str | None = None,
        usage: Usage | None = None,
    ) -> None:
        super().__init__(message)
        self.scope = scope
        self.reason = reason
        self.status = status
        self.retry_after_s = retry_after_s
        self.param = param
        self.usage = usage


class WrongCheckpoint(RequestError):
    """The answer is stamped with other weights than those asked for."""


class BadAnswer(RequestError):
    """The upstream answered 200 with something that is not an answer (no choices, fewer than n, no stamp)."""
