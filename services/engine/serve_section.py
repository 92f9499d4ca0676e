"""What a recipe says of serving: `[serve]`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from vcot.pipeline.addresses import UpstreamUrl
from vcot.pipeline.fields import Count, Fraction, Section
from vcot.services.engine.engine_args import check_engine_args
from vcot.training.protocol.train_sections import Dtype


class ServeSection(Section):
    """The vLLM server and the gateway in front of it."""

    url: str | None = None
    """A gateway that serves already, elsewhere; without it the run's own is used, and started when it is needed."""
    dtype: Dtype = "bfloat16"
    """The type that vLLM computes in; never `auto`, which turns float32 weights into bfloat16 silently."""
    max_model_len: Count = 2048
    """Longest prompt plus response, in tokens, image tokens included."""
    host: str = "127.0.0.1"
    """Where the gateway listens."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8100
    """The gateway's port; 0 takes a free one."""
    gpu_memory_utilization: Fraction = 0.9
    """Share of the GPU's memory that vLLM takes (GPU builds)."""
    kv_cache_gib: Annotated[float, Field(gt=0)] = 1.0
    """Memory for keys and values, in GiB (CPU builds)."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    """How long the server may take to load before it counts as stuck."""
    gateway_workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes of the gateway that carry requests; one is enough until it needs a core of its own (docs/serving.md)."""
    max_in_flight: Count = 256
    """Requests that the engine works on at once; more wait at the gateway."""
    max_queued: Annotated[int, Field(ge=0)] = 1024
    """Requests that may wait; beyond, the answer is 429 with `Retry-After`."""
    max_body_mb: Annotated[float, Field(gt=0)] = 32.0
    """Largest request, in MB, images included."""
    max_held_mb: Annotated[float, Field(gt=0)] = 2048.0
    """Bodies of all requests that are answered or wait, in MB; beyond, the answer is 429."""
    replicas: Count = 1
    """vLLM servers to start; requests are spread over them, and outlive the loss of all but one."""
    upstreams: tuple[UpstreamUrl, ...] = ()
    """vLLM servers that someone else runs, as `http://host:port`; each is a replica, and none is started here."""
    ray_address: Annotated[str, Field(pattern=r"^(auto|[^\s/:]+:\d{1,5})$")] | None = None
    """A Ray cluster whose nodes run the servers, as `auto` or `HOST:PORT`; without it this machine does."""
    gpus_per_replica: Annotated[int, Field(ge=0)] = 1
    """GPUs that Ray gives each server: several are its tensor parallel size; 0 on nodes without any."""
    devices: tuple[Annotated[str, Field(pattern=r"^[^\s,]+(,[^\s,]+)*$")], ...] = ()
    """CUDA_VISIBLE_DEVICES of each server in turn, such as "0" or "0,1" (tensor parallel); without it, as it is."""
    swap: Literal["auto", "adapter", "reload", "replica"] = "auto"
    """How another checkpoint is put behind the gateway; `auto` takes the fastest way that the checkpoint allows."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """How long a server may make no token with requests in flight before it is started anew."""
    allowed_image_hosts: tuple[str, ...] = ()
    """Hosts (`name` or `name:port`) that vLLM may fetch images from; images come as data URLs from anywhere else."""
    max_image_pixels: Count = 50_000_000
    """Width times height of an image in a request; a larger one is refused by its header, before it is decoded."""
    while_training: Literal["auto", "keep", "sleep", "stop"] = "auto"
    """What vLLM does in a training: `sleep` (frees GPU memory), `stop`, `keep`; `auto`: sleep on GPUs, keep with `url`."""
    max_images: Count = 1
    """The most images of one request; `max_model_len` must have room for their tokens."""
    extra_args: tuple[str, ...] = ()
    """More options for vLLM's command line, such as ["--max-num-seqs", "64"]; none that vcot sets or depends on."""

    @model_validator(mode="after")
    def _check_places(self) -> Self:
        """Servers are in one place."""
        if self.ray_address is not None and self.devices:
            raise ValueError(
                "devices are those of this machine; with ray_address Ray gives them, as gpus_per_replica says"
            )
        if self.ray_address is not None and self.upstreams:
            raise ValueError("upstreams run already, and ray_address is for servers to start; give one of the two")
        return self

    def devices_of(self, number: int) -> str | None:
        """CUDA_VISIBLE_DEVICES of the `number`-th server, from 0; None where it takes what it finds."""
        return self.devices[number % len(self.devices)] if self.devices else None

    @field_validator("extra_args")
    @classmethod
    def _check_extra_args(cls, arguments: tuple[str, ...]) -> tuple[str, ...]:
        check_engine_args(arguments)
        return arguments
