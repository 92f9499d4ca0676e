"""One training over several machines: how they find each other, and how one that is lost ends it for all.

Model: the machine whose worker has the job calls (`call.json` in the job's directory, which all see), and each idle
`vcot worker` (services/jobs/submitted.py) may take one of the other places, by a lock that it holds for as long as it
helps. Once every place is taken the call says where the first machine listens, and each starts its share
(training/protocol/launch.py). A machine that is lost loses its lock, at once or when the file server gives it up; the
others then end, too.

Limits: the machines have the run's directory under one path, on a file system with locks.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vcot.pipeline.errors import InputError, MachineError
from vcot.pipeline.files import write_record
from vcot.pipeline.locks import is_locked
from vcot.pipeline.records import Record
from vcot.training.protocol.job import exclusive, read_record
from vcot.training.protocol.train_sections import TrainSection

CALL = "call.json"
_POLL_S = 0.5
_ANYWHERE = ("192.0.2.1", 9)
"""An address that is nobody's (RFC 5737): asked for the way to it, to which nothing is sent."""


class Call(Record):
    """`call.json`: a job that trains on several machines."""

    num_machines: int
    versions: dict[str, str]
    """Of the packages that decide what is trained, on the first machine."""
    address: str | None = None
    """The first machine's, once all are there."""
    port: int | None = None


def place_lock(number: int) -> str:
    """The file in the job's directory that a machine holds while it takes part; the first is 0."""
    return f"machine-{number}.lock"


@contextmanager
def calling(recipe: TrainSection, job_directory: Path, say: Callable[[str], None]) -> Iterator[Call]:
    """Call the other machines, wait for as long as it takes, and yield the call that says where to meet.

    Raises MachineError where this machine has no address for the others, or not the one that the recipe names.
    """
    address = _own_address(recipe.address)
    call = Call(num_machines=recipe.num_machines, versions=installed_versions())
    with exclusive(job_directory, place_lock(0)):
        try:
            write_record(job_directory / CALL, call)
            while missing := [number for number in range(1, call.num_machines) if not is_held(job_directory, number)]:
                say(
                    f"waiting for {len(missing)} of {call.num_machines} machines; start `vcot worker "
                    f"{job_directory.parents[2]}` on each"
                )
                time.sleep(_POLL_S)
            call = call.model_copy(update={"address": address, "port": _free_port()})
            write_record(job_directory / CALL, call)
            yield call
        finally:
            (job_directory / CALL).unlink(missing_ok=True)


def open_call(job_directory: Path) -> Call | None:
    """A call that still waits for machines, from one that is there."""
    call = _read_call(job_directory)
    return call if call is not None and call.port is None and is_held(job_directory, 0) else None


def await_start(job_directory: Path) -> Call | None:
    """The call of which this machine has a place, once all are there; None where it was withdrawn."""
    while is_held(job_directory, 0):
        call = _read_call(job_directory)
        if call is not None and call.port is not None:
            return call
        time.sleep(_POLL_S)
    return None


def _read_call(job_directory: Path) -> Call | None:
    try:
        return read_record(job_directory / CALL, Call)
    except InputError:
        return None


def is_held(job_directory: Path, number: int) -> bool:
    """Whether a machine has this place."""
    return is_locked(job_directory / place_lock(number))


@cache
def installed_versions() -> dict[str, str]:
    """Of the packages that decide what is trained."""
    found = {}
    for name in ("vcot", "torch", "transformers", "accelerate", "peft", "trl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def find_difference(call: Call) -> str | None:
    """The first package that is not the caller's here, in words; machines with different ones would train another model."""
    for name, here in installed_versions().items():
        if (there := call.versions.get(name)) != here:
            return f"{name} is {here} here and {there} on the machine that calls"
    return None


def find_interface(address: str) -> str:
    """The network interface of this machine by which it and the one at `address` reach each other. Raises MachineError."""
    import psutil  # accelerate brings it

    own = _address_towards((address, _ANYWHERE[1]))
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == own for each in addresses):
            return str(name)
    raise MachineError(f"no network interface has the address {own}, by which this machine reaches {address}")


def _own_address(named: str | None) -> str:
    if named is None:
        return _address_towards(_ANYWHERE)
    try:
        address = socket.gethostbyname(named)
    except OSError as error:
        raise MachineError(f"train.address = {named!r} is no address ({error.strerror}); correct it") from None
    if _address_towards((address, _ANYWHERE[1])) != address:
        raise MachineError(
            f"train.address = {named!r} is not an address of this machine, from which the training is started; give one "
            "of its own, or start it there"
        )
    return address


def _address_towards(there: tuple[str, int]) -> str:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            asked.connect(there)
            return str(asked.getsockname()[0])
    except OSError as error:
        raise MachineError(
            f"this machine has no way to {there[0]} ({error.strerror}); set train.address to the first machine's "
            "address in the network of the others"
        ) from None


def _free_port() -> int:
    with socket.create_server(("", 0)) as free:
        return int(free.getsockname()[1])
