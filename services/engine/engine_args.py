"""Which of vLLM's options a recipe may add: all but those that vcot sets, or that its promises rest on. Pure.

A quantization may be added: what it does to the answers is measured, by the canary at every start and swap and by the gate
before an evaluation, and refused there where it is too much.

Limits: the options are those of vLLM 0.32; that an option exists, and its value, is for vLLM to check.
"""

from __future__ import annotations

from collections.abc import Sequence

_SET_BY_RECIPE = "the recipe has a field for it ({})"
_CARDS = "serve.devices, on a Ray cluster serve.gpus_per_replica"
_REACHED = "the gateway must reach the server as it expects to"
_ONE_FRONT = "a swap must reach every process that answers; serve.replicas starts more servers"
_AS_TRAINED = "what is served must be the checkpoint, read as it was trained"
_OPENS = "it lets requests reach further than the prompt"
_FILE = "its file could hold any of the options that are refused here"

_REFUSED: dict[str, str] = {
    "--dtype": _SET_BY_RECIPE.format("serve.dtype"),
    "--max-model-len": _SET_BY_RECIPE.format("serve.max_model_len"),
    "--gpu-memory-utilization": _SET_BY_RECIPE.format("serve.gpu_memory_utilization"),
    "--device-memory-utilization": _SET_BY_RECIPE.format("serve.gpu_memory_utilization"),
    "--kv-cache-memory-bytes": _SET_BY_RECIPE.format("serve.kv_cache_gib"),
    **dict.fromkeys(("--tensor-parallel-size", "--device-ids"), _SET_BY_RECIPE.format(_CARDS)),
    "--enable-sleep-mode": _SET_BY_RECIPE.format("serve.while_training"),
    "--allowed-media-domains": _SET_BY_RECIPE.format("serve.allowed_image_hosts"),
    "--max-lora-rank": _SET_BY_RECIPE.format("train.lora_r"),
    **dict.fromkeys(("--enable-lora", "--max-loras", "--lora-target-modules", "--lora-modules"), _AS_TRAINED),
    **dict.fromkeys(("--default-mm-loras", "--enable-tower-connector-lora", "--lora-dtype"), _AS_TRAINED),
    **dict.fromkeys(("--model", "--model-impl", "--model-class-overrides", "--model-loader-extra-config"), _AS_TRAINED),
    **dict.fromkeys(("--revision", "--code-revision", "--load-format", "--config-format"), _AS_TRAINED),
    **dict.fromkeys(("--tokenizer", "--tokenizer-mode", "--tokenizer-revision", "--skip-tokenizer-init"), _AS_TRAINED),
    **dict.fromkeys(("--hf-overrides", "--hf-config-path"), _AS_TRAINED),
    **dict.fromkeys(("--chat-template", "--chat-template-content-format", "--interleave-mm-strings"), _AS_TRAINED),
    **dict.fromkeys(("--default-chat-template-kwargs", "--mm-processor-kwargs", "--media-io-kwargs"), _AS_TRAINED),
    **dict.fromkeys(("--generation-config", "--override-generation-config", "--logits-processors"), _AS_TRAINED),
    **dict.fromkeys(("--limit-mm-per-prompt", "--language-model-only", "--mm-encoder-only"), _AS_TRAINED),
    **dict.fromkeys(("--logprobs-mode", "--return-tokens-as-token-ids", "--runner", "--convert"), _AS_TRAINED),
    **dict.fromkeys(("--host", "--port", "--uds", "--root-path", "--api-key", "--served-model-name"), _REACHED),
    **dict.fromkeys(("--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--ssl-cert-reqs", "--middleware"), _REACHED),
    **dict.fromkeys(("--grpc", "--headless", "--tokens-only"), _REACHED),
    **dict.fromkeys(("--api-server-count", "--data-parallel-size", "--data-parallel-size-local"), _ONE_FRONT),
    **dict.fromkeys(("--data-parallel-rank", "--data-parallel-start-rank", "--nnodes", "--node-rank"), _ONE_FRONT),
    **dict.fromkeys(("--allowed-local-media-path", "--enable-prompt-embeds", "--enable-mm-embeds"), _OPENS),
    **dict.fromkeys(("--trust-request-chat-template", "--trust-request-mm-kwargs"), _OPENS),
    "--config": _FILE,
}


def check_engine_args(arguments: Sequence[str]) -> None:
    """Raise ValueError, with the reason, for the first option that may not be added.

    vLLM takes any beginning of an option for the option, so that is refused, too.
    """
    if arguments and not arguments[0].startswith("-"):
        raise ValueError(f"{arguments[0]!r} is no option of vLLM; begin with one, such as --max-num-seqs")
    for argument in arguments:
        if argument.startswith("-") and not argument.startswith("--") and argument[1:2].isalpha():
            raise ValueError(f"{argument} is an abbreviation; write vLLM's option out")
        if argument.startswith("--") and (refused := _find_refused(argument)) is not None:
            raise ValueError(f"{argument} cannot be added ({refused}): {_REFUSED[refused]}")


def _find_refused(argument: str) -> str | None:
    """Which refused option this may be: itself, its `--no-` form, one of its dotted parts, or a beginning of it."""
    name = argument.partition("=")[0].partition(".")[0].replace("_", "-")
    names = (name, "--" + name.removeprefix("--no-")) if name.startswith("--no-") else (name,)
    exact = next((one for one in names if one in _REFUSED), None)
    return exact or next((option for option in _REFUSED if any(option.startswith(one) for one in names)), None)
