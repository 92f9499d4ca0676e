"""The operator's side of a gateway: the records of its /admin routes, and the calls to them.

A gateway's error carries the name of its exception, so that the caller sees the same exception as one who did it in process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import Field, ValidationError, model_validator

from vcot.pipeline import errors
from vcot.pipeline.addresses import UpstreamUrl
from vcot.pipeline.bearer import read_key
from vcot.pipeline.errors import ServerError, UnreachableError, VcotError
from vcot.pipeline.records import CheckpointRef, Record
from vcot.services.checkpoints.registry import CheckpointInfo

Wanted = Literal["auto", "sleep", "stop"]
"""How servers are to rest: `auto` is `sleep` where they can, else not at all."""
RestWay = Literal["keep", "sleep", "stop"]
"""How one does."""
ADMIN_KEY_ENV = "VCOT_ADMIN_KEY"
_SWAP_TIMEOUT_S = 1800.0
_QUICK_TIMEOUT_S = 10.0
_REMEDY = "give the one that `vcot serve` says (serve.url)"
PROXY_STATUSES = frozenset((502, 503, 504))
"""What a proxy answers for a server that is not there yet."""
R = TypeVar("R", bound=Record)


class SwapRequest(Record):
    """Body of POST /admin/swap."""

    alias: str
    checkpoint: str


class Swapped(Record):
    """Answer of POST /admin/swap and /admin/trial: what it did."""

    live: CheckpointRef
    """What the alias means now, or what is on trial."""
    way: Literal["none", "adapter", "reload", "replica"]
    """How it came to be served; `none` where it was already."""
    pause_s: float
    """How long requests had to wait for it; 0 where others answered meanwhile."""


class RegisterRequest(Record):
    """Body of POST /admin/checkpoints."""

    path: str


class TrialRequest(Record):
    """Body of POST /admin/trial: a checkpoint's directory, or the name of a registered one."""

    path: str | None = None
    name: str | None = None
    owner: str = ""
    """The command that asks; its last trial ends with this one."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.path is None) == (self.name is None):
            raise ValueError("give either a path or a name")
        return self


class RestRequest(Record):
    """Body of POST /admin/rest."""

    way: Wanted
    lease_s: Annotated[float, Field(gt=0, le=3600)]
    """Seconds after which the servers come back, unless it is asked again."""


class Rested(Record):
    """Answer of POST /admin/rest."""

    ways: dict[str, RestWay]
    """How each replica rests, by name."""

    @property
    def is_any(self) -> bool:
        """Whether there is something to wake again."""
        return any(way != "keep" for way in self.ways.values())


class AddRequest(Record):
    """Body of POST /admin/replicas."""

    url: UpstreamUrl | None = None
    """A vLLM server that runs already; without it, one more is started."""


class ReplicaState(Record):
    """One server behind the gateway."""

    name: str
    phase: str
    message: str
    """What is being waited for, or why nothing is served."""
    serves: tuple[CheckpointRef, ...]
    in_flight: int
    breaker: str
    num_restarts: int


class ReplicaList(Record):
    """Answer of /admin/replicas."""

    replicas: tuple[ReplicaState, ...]


class CheckpointList(Record):
    """Answer of GET /admin/checkpoints."""

    checkpoints: tuple[CheckpointInfo, ...]


class GatewayState(Record):
    """Answer of GET /admin/state."""

    run: str
    pid: int
    phase: str
    message: str
    """What is being waited for, or why nothing is served."""
    live: CheckpointRef | None
    """Whose weights the servers hold; adapters are served on top of them."""
    in_flight: int
    aliases: dict[str, str]
    warnings: tuple[str, ...]
    num_restarts: int
    replicas: tuple[ReplicaState, ...]


async def fetch_state(url: str) -> GatewayState:
    """What a gateway does now. Raises ServerError where it does not answer."""
    return await _ask(GatewayState, "GET", f"{url}/admin/state", None, _QUICK_TIMEOUT_S)


async def live_checkpoint(url: str) -> CheckpointRef:
    """The checkpoint that answers now. Raises ServerError where none is live."""
    state = await fetch_state(url)
    if state.live is None:
        raise ServerError(f"no checkpoint is live at {url} ({state.phase}: {state.message}); wait, or look at its log")
    return state.live


async def register(url: str, directory: Path) -> CheckpointRef:
    """Register a checkpoint directory with a running gateway. Raises CheckpointError, or ServerError."""
    body = RegisterRequest(path=str(directory.absolute()))
    return await _ask(CheckpointRef, "POST", f"{url}/admin/checkpoints", body, _SWAP_TIMEOUT_S)


async def swap_to(url: str, alias: str, name: str) -> Swapped:
    """Make checkpoint `name` live and point `alias` at it. Raises SwapError, CheckpointError or ServerError."""
    body = SwapRequest(alias=alias, checkpoint=name)
    return await _ask(Swapped, "POST", f"{url}/admin/swap", body, _SWAP_TIMEOUT_S)


async def try_out(url: str, checkpoint: Path | str, owner: str = "") -> Swapped:
    """Have the checkpoint in a directory, or the registered one of a name, served to requests that expect its digest.

    It ends with `end_trial`, with the next swap, or a minute after it was last asked. Raises OnTrialError while another
    command has another one on trial, and SwapError, CheckpointError or ServerError.
    """
    known = {"name": checkpoint} if isinstance(checkpoint, str) else {"path": str(checkpoint.absolute())}
    body = TrialRequest(**known, owner=owner)
    return await _ask(Swapped, "POST", f"{url}/admin/trial", body, _SWAP_TIMEOUT_S)


async def end_trial(url: str, owner: str) -> None:
    """Have what is live served as before. Raises ServerError."""
    await _ask(GatewayState, "DELETE", f"{url}/admin/trial?owner={quote(owner, safe='')}", None, _SWAP_TIMEOUT_S)


async def rest(url: str, way: Wanted, lease_s: float) -> Rested:
    """Have a gateway's servers rest for `lease_s`, or longer where they rest already. Raises SwapError, ServerError."""
    body = RestRequest(way=way, lease_s=lease_s)
    return await _ask(Rested, "POST", f"{url}/admin/rest", body, _SWAP_TIMEOUT_S)


async def wake(url: str) -> GatewayState:
    """Have them serve again, and wait for that. Raises ServerError where none comes back."""
    return await _ask(GatewayState, "POST", f"{url}/admin/wake", None, _SWAP_TIMEOUT_S)


async def retire(url: str, name: str) -> CheckpointRef:
    """Have a running gateway forget a checkpoint. Raises CheckpointError, or ServerError."""
    return await _ask(
        CheckpointRef, "DELETE", f"{url}/admin/checkpoints/{quote(name, safe='')}", None, _QUICK_TIMEOUT_S
    )


async def list_checkpoints(url: str) -> tuple[CheckpointInfo, ...]:
    """What a running gateway has registered. Raises ServerError."""
    return (await _ask(CheckpointList, "GET", f"{url}/admin/checkpoints", None, _QUICK_TIMEOUT_S)).checkpoints


async def show_checkpoint(url: str, name: str) -> CheckpointInfo:
    """One of them, by name or alias. Raises CheckpointError, or ServerError."""
    return await _ask(CheckpointInfo, "GET", f"{url}/admin/checkpoints/{quote(name, safe='')}", None, _QUICK_TIMEOUT_S)


async def add_replica(url: str, upstream: str | None) -> ReplicaState:
    """Have a gateway start another server, or use the one at `upstream`. Raises ServerError, SwapError."""
    return await _ask(ReplicaState, "POST", f"{url}/admin/replicas", AddRequest(url=upstream), _QUICK_TIMEOUT_S)


async def remove_replica(url: str, name: str) -> None:
    """Have a gateway drain and drop a replica. Raises SwapError where it is the only one, ServerError."""
    await _ask(ReplicaList, "DELETE", f"{url}/admin/replicas/{quote(name, safe='')}", None, _SWAP_TIMEOUT_S)


async def _ask(kind: type[R], method: str, url: str, body: Record | None, timeout_s: float) -> R:
    """What a gateway answers. Raises its own error, UnreachableError, ServerError where something else answers, and
    MachineError for a key that cannot be sent.
    """
    response = await _call(method, url, body, timeout_s)
    if not response.is_success:
        raise _as_error(response)
    try:
        return kind.model_validate_json(response.content)
    except ValidationError:
        raise _is_no_gateway(response) from None


async def _call(method: str, url: str, body: Record | None, timeout_s: float) -> httpx.Response:
    key = read_key(ADMIN_KEY_ENV)
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    data = body.model_dump_json().encode() if body else None
    try:
        # Without TLS its certificates, whose loading takes 20 ms, are not needed.
        async with httpx.AsyncClient(timeout=timeout_s, trust_env=False, verify=url.startswith("https:")) as client:
            return await client.request(method, url, content=data, headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        why = str(error) or type(error).__name__
        if is_absent(error):
            raise UnreachableError(f"the gateway at {url} does not answer ({why}); is it running?") from None
        raise ServerError(f"{url} is not the address of a gateway ({why}); {_REMEDY}") from None


def is_absent(error: Exception) -> bool:
    """Whether a call failed since nothing answers, which may pass by itself; no for an answer that is no HTTP."""
    is_closed = isinstance(error, httpx.RemoteProtocolError) and "disconnected" in str(error)
    return is_closed or isinstance(error, httpx.NetworkError | httpx.TimeoutException)


class _Fault(Record):
    message: str
    type: str
    param: None
    code: str


class _FaultBody(Record):
    error: _Fault


def _as_error(response: httpx.Response) -> VcotError:
    try:
        fault = _FaultBody.model_validate_json(response.content).error
    except ValidationError:
        return _is_no_gateway(response)
    return named_error(fault.code, fault.message)


def _is_no_gateway(response: httpx.Response) -> ServerError:
    said = told(response)
    if response.status_code in PROXY_STATUSES:
        return UnreachableError(f"no gateway answers behind {said}; is it running?")
    return ServerError(f"no gateway of this version answers: {said}; {_REMEDY}")


def told(response: httpx.Response) -> str:
    """An answer in a few words: whose it is, its status, and how it begins."""
    begin = response.content[:100].decode("utf-8", "replace")
    return f"{response.request.url} answered {response.status_code} {begin!r}"


def named_error(kind: str, message: str) -> VcotError:
    """The exception of that name in vcot.pipeline.errors; a ServerError for any other name."""
    known = getattr(errors, kind, None)
    return known(message) if isinstance(known, type) and issubclass(known, VcotError) else ServerError(message)
