"""Builds a checkpoint from base and adapter, loads what was written again, and measures what is left of the policy.

Everything is asked in float32, so that only the rounding of weights counts; the weights are where there is room, on disk if
need be (training/model/loading.py). Rounding the base itself is no loss: a merged checkpoint is compared with the base
rounded alike. What counts is how a server will hold the weights: as they are stored, or in the recipe's serve.dtype where
that is narrower.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vcot.pipeline.identity import compute_digest
from vcot.pipeline.manifest import CheckpointManifest
from vcot.pipeline.records import CheckpointRef
from vcot.training.dpo.probe import ask, load_questions
from vcot.training.merge.export import (
    attach_adapter,
    is_served_exactly,
    read_adapter,
    write_adapter,
    write_merged,
    write_rounded,
)
from vcot.training.model.canary import build_canary
from vcot.training.model.loading import (
    DTYPES,
    Model,
    compute_in_float32,
    free_memory,
    load_model,
    load_processor,
    quiet_libraries,
)
from vcot.training.model.template import closing_tokens
from vcot.training.model.weights import Cast, narrowest, stored_dtypes
from vcot.training.protocol.agreement import Answers, Probe, check_merge, compare_margins, loses, write_probe
from vcot.training.protocol.job import MergeReport, Retention, TrainJob, fresh_directory
from vcot.training.protocol.train_sections import Dtype

_ROUNDED = "rounded"
"""A folder in the checkpoint's, for as long as rounded weights are asked."""


def build_checkpoint(job: TrainJob, adapter: Path, out: Path) -> tuple[CheckpointManifest, MergeReport]:
    """Write the job's checkpoint to `out`, with its probe; the manifest is the caller's to write.

    Raises CheckpointError where what was written does not pass the gate.
    """
    build = Build(job, adapter, out)
    built = build.adapter_alone() if job.merge.serve_as == "adapter" else build.merged()
    check_merge(built.report, _remedy(built.report))
    return build.describe(built), built.report


@dataclass(frozen=True)
class Built:
    """A checkpoint that was written, and loaded again."""

    model: Model
    report: MergeReport
    stored: Answers
    """Of its weights as stored."""


class Build:
    """A job's models, asked one after the other: at most one is in memory at a time (at 7B each takes 28 GB).

    `merged` and `adapter_alone` write to `out`, and pass no gate.
    """

    def __init__(self, job: TrainJob, adapter: Path, out: Path) -> None:
        quiet_libraries()
        self.job, self.adapter, self.out = job, adapter, out
        self.base_path = Path(job.base_path)
        self.processor, mended = load_processor(self.base_path)
        self.template = self.processor.chat_template if mended else None
        self.named = read_adapter(self.base_path, adapter)
        self.questions = load_questions(Path(job.pairs_path), self.processor, job.train)
        self.base = self._ask(self._load(self.base_path))
        self.policy = self._ask(attach_adapter(self._load(self.base_path), adapter))
        self.unquantized = None if job.train.base_weights == "full" else self._leave_quantized()

    def _ask(self, model: Model) -> Answers:
        return ask(model, self.questions)

    def _load(self, directory: Path) -> Model:
        free_memory()
        return load_model(directory, torch.float32, "spread")

    def _leave_quantized(self) -> Retention:
        """What is left of the margins that were trained on the quantized base, once the adapter is on the base itself."""
        base, policy = (
            self._ask(self._load_quantized()),
            self._ask(attach_adapter(self._load_quantized(), self.adapter)),
        )
        beta = self.job.train.beta
        return compare_margins(policy.margins(base, beta), self.policy.margins(self.base, beta))

    def _load_quantized(self) -> Model:
        free_memory()
        recipe = self.job.train
        return compute_in_float32(load_model(self.base_path, DTYPES[recipe.dtype], weights=recipe.base_weights))

    def _ask_rounded(self, directory: Path, cast: Cast) -> Answers:
        """The answers of the checkpoint in `directory` with its weights rounded."""
        rounded = fresh_directory(self.out / _ROUNDED)
        write_rounded(directory, cast, rounded)
        answers = self._ask(self._load(rounded))
        shutil.rmtree(rounded)
        return answers

    def merged(self) -> Built:
        """The merged checkpoint, in the first of the recipe's types that keeps what was trained, or the last."""
        dropped: list[tuple[Dtype, Retention]] = []
        *narrower, last = self._casts()
        for cast in narrower:
            built = self._merge(cast)
            if not loses(built.report.retention):
                return built
            dropped.append((built.report.dtype, built.report.retention))
            del built
        built = self._merge(last)
        return replace(built, report=built.report.model_copy(update={"dropped": tuple(dropped)}))

    def _merge(self, cast: Cast) -> Built:
        out = fresh_directory(self.out)
        num_changed = write_merged(self.base_path, self.named, cast, self.template, out)
        written, serve = stored_dtypes(out), self.job.serve_dtype
        served = Cast((serve,) if serve else ())
        rounding = Cast(cast.to + served.to)
        is_base_rounded = rounding.rounds(stored_dtypes(self.base_path))
        base = self._ask_rounded(self.base_path, rounding) if is_base_rounded else self.base
        held = self._ask_rounded(out, served) if served.rounds(written) else None
        model = self._load(out)
        stored = self._ask(model)
        dtype = narrowest(*written)
        report = self._report(dtype, narrowest(dtype, *served.to), held or stored, base)
        return Built(model, report.model_copy(update={"num_changed_tensors": num_changed}), stored)

    def adapter_alone(self) -> Built:
        """The adapter's checkpoint; the base's weights are no part of it."""
        write_adapter(self.adapter, self.named, fresh_directory(self.out))
        model = attach_adapter(self._load(self.base_path), self.adapter)
        is_exact = is_served_exactly(model)
        if is_exact:  # PEFT reads the files' names only of the language model's modules
            del model
            model = attach_adapter(self._load(self.base_path), self.out)
        stored = self._ask(model)
        report = self._report("float32", "float32", stored, self.base)
        changes = {"num_changed_tensors": self.named.num_learned, "is_served_exactly": is_exact}
        return Built(model, report.model_copy(update=changes), stored)

    def describe(self, built: Built) -> CheckpointManifest:
        """The checkpoint's manifest, with its canary; its probe is written beside the weights."""
        report = built.report
        probe = Probe(
            checkpoint=report.checkpoint,
            beta=self.job.train.beta,
            pairs=self.questions.pairs,
            closing=closing_tokens(self.processor),
            base=self.base.record(),
            policy=self.policy.record(),
            stored=built.stored.record(),
        )
        write_probe(self.out, probe)
        canary = build_canary(built.model, self.processor)
        return CheckpointManifest(checkpoint=report.checkpoint, job=self.job.key, canary=canary)

    def _report(self, dtype: Dtype, held: Dtype, answers: Answers, base: Answers) -> MergeReport:
        beta = self.job.train.beta
        ref = CheckpointRef(
            name=self.job.checkpoint_name,
            digest=compute_digest(self.out),
            kind=self.job.merge.serve_as,
            parent=self.job.base.digest,
        )
        return MergeReport(
            checkpoint=ref,
            dtype=dtype,
            held=held,
            num_changed_tensors=0,
            max_abs_logprob=answers.difference(self.policy),
            differs_from_base=answers.difference(base),
            retention=compare_margins(self.policy.margins(self.base, beta), answers.margins(base, beta)),
            unquantized=self.unquantized,
        )

    def _casts(self) -> list[Cast]:
        """How the weights are to be written, in the order in which it is tried."""
        if self.job.merge.dtype != "auto":
            return [Cast((self.job.merge.dtype,))]
        wider = [] if stored_dtypes(self.base_path) == {"float32"} else [Cast(("float32",))]
        return [Cast(), *wider]


def _remedy(report: MergeReport) -> str:
    if report.held != report.dtype:
        return "set a wider serve.dtype, or train more"
    return "train more" if report.dtype == "float32" else "set merge.dtype = auto, or train more"
