"""What a worker and the gateway's deciding process say to each other: one JSON object a line, over a pair of sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Literal, Self, cast

from pydantic import Field, TypeAdapter

from vcot.pipeline.records import CheckpointRef, Record
from vcot.services.engine.serve_section import ServeSection
from vcot.services.engine.vllm import Endpoint
from vcot.services.gateway.fleet.ends import EngineFault
from vcot.services.gateway.http.answers import Refusal
from vcot.services.gateway.http.exchange import Ended
from vcot.services.gateway.http.ticket import Assignment

# From a worker; `id` tells its requests apart


class Asked(Record):
    """A request wants an engine. The answer is Assigned or Refused."""

    do: Literal["asked"] = "asked"
    id: int
    model: str
    expect: str | None
    image: int | None
    key: str | None
    """Of its body, in hex; None where nobody has to know it."""


class Failed(Record):
    """The engine failed the request. The answer is Assigned or Refused."""

    do: Literal["failed"] = "failed"
    id: int
    key: str
    reason: str
    message: str
    is_broken: bool | None
    has_begun: bool
    was_sent: bool
    retry_after: str | None

    @classmethod
    def of(cls, number: int, key: str, fault: EngineFault) -> Self:
        """The fault of a request."""
        return cls(
            id=number,
            key=key,
            reason=fault.reason,
            message=str(fault),
            is_broken=fault.is_broken,
            has_begun=fault.has_begun,
            was_sent=fault.was_sent,
            retry_after=fault.retry_after,
        )

    @property
    def fault(self) -> EngineFault:
        """As it was raised."""
        return EngineFault(
            self.reason,
            self.message,
            is_broken=self.is_broken,
            has_begun=self.has_begun,
            was_sent=self.was_sent,
            retry_after=self.retry_after,
        )


class Over(Record):
    """The request is over, and is with no engine any more. There is no answer."""

    do: Literal["over"] = "over"
    id: int
    was_answered: bool
    key: str | None


class Counted(Record):
    """What is counted of a request that ended, whoever answered it. There is no answer."""

    do: Literal["counted"] = "counted"
    ended: Ended


class Called(Record):
    """A request for anything but inference. The answer is Replied."""

    do: Literal["called"] = "called"
    id: int
    method: str
    path: str
    query: str
    headers: tuple[tuple[str, str], ...]
    body: str
    """Bytes, as Latin-1."""
    client: tuple[str, int] | None


# To a worker


class Begin(Record):
    """The first message to a worker."""

    do: Literal["begin"] = "begin"
    settings: ServeSection


class Target(Record):
    """An Assignment, as it is sent."""

    replica: str
    life: str
    base_url: str
    socket: str | None
    ref: CheckpointRef

    @classmethod
    def of(cls, to: Assignment) -> Self:
        """Of an assignment."""
        socket = None if to.endpoint.socket is None else str(to.endpoint.socket)
        return cls(replica=to.replica, life=to.life, base_url=to.endpoint.base_url, socket=socket, ref=to.ref)

    @property
    def assignment(self) -> Assignment:
        """The assignment again."""
        endpoint = Endpoint(self.base_url, None if self.socket is None else Path(self.socket))
        return Assignment(self.replica, self.life, endpoint, self.ref)


class Assigned(Record):
    """Where the request goes; None where its answer has begun, so that no other engine may answer it."""

    do: Literal["assigned"] = "assigned"
    id: int
    to: Target | None


class Refused(Record):
    """Why the request goes to no engine."""

    do: Literal["refused"] = "refused"
    id: int
    status: int
    code: str
    message: str
    headers: dict[str, str]

    @classmethod
    def of(cls, number: int, refusal: Refusal) -> Self:
        """The refusal of a request."""
        return cls(
            id=number, status=refusal.status, code=refusal.code, message=str(refusal), headers=dict(refusal.headers)
        )

    @property
    def refusal(self) -> Refusal:
        """As it was raised."""
        return Refusal(self.status, self.code, self.message, headers=self.headers)


class Replied(Record):
    """The answer to Called."""

    do: Literal["replied"] = "replied"
    id: int
    status: int
    headers: tuple[tuple[str, str], ...]
    body: str
    """Bytes, as Latin-1."""
    refused: str | None
    """Why the gateway said no, for the log."""


class Suspicious(Record):
    """Whether requests' keys are to be sent from now on."""

    do: Literal["suspicious"] = "suspicious"
    are_there: bool


class Gone(Record):
    """A life of an engine has ended: what it was asked is not answered any more."""

    do: Literal["gone"] = "gone"
    life: str


FromWorker = Annotated[Asked | Failed | Over | Counted | Called, Field(discriminator="do")]
ToWorker = Annotated[Begin | Assigned | Refused | Replied | Suspicious | Gone, Field(discriminator="do")]
FROM_WORKER: TypeAdapter[FromWorker] = TypeAdapter(FromWorker)
TO_WORKER: TypeAdapter[ToWorker] = TypeAdapter(ToWorker)


class Line(asyncio.Protocol):
    """One end: `receive` takes whole lines. Subclasses say what they do with them."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        """Set when the other end is gone."""
        self._transport: asyncio.WriteTransport | None = None
        self._rest = b""

    def send(self, message: Record) -> None:
        """Say it, as far as somebody is there."""
        if self._transport is not None and not self.ended.is_set():
            self._transport.write(message.model_dump_json().encode() + b"\n")

    def receive(self, line: bytes) -> None:
        """One message."""
        raise NotImplementedError

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        """Parts of messages."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self.receive(line)

    def connection_lost(self, error: Exception | None) -> None:
        """The other end is gone."""
        self.ended.set()


def latin_headers(headers: list[tuple[bytes, bytes]]) -> tuple[tuple[str, str], ...]:
    """ASGI's headers as text."""
    return tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in headers)
