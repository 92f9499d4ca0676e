"""Builds a checkpoint from base and adapter, loads what was written again, and measures what is left of the policy.

Everything is asked in float32, so that only the rounding of weights counts. Rounding the base itself is no loss: a merged
checkpoint is compared with the base rounded alike. What counts is how a server will hold the weights: in the checkpoint's
type or in the recipe's serve.dtype, whichever is narrower.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.checkpoints import compute_digest
from pipeline.recipe import Dtype
from pipeline.records import CheckpointManifest, CheckpointRef
from training.canary import build_canary
from training.export import (
    attach_adapter,
    count_changed_tensors,
    count_learned_tensors,
    is_served_exactly,
    stored_dtypes,
    write_adapter,
    write_merged,
)
from training.job import MergeReport, Retention, TrainJob, fresh_directory
from training.models import DTYPES, Model, free_memory, load_model, load_processor, quiet_libraries
from training.parity import Answers, Probe, check_merge, compare_margins, loses, write_probe
from training.probe import ask, load_questions
from training.template import closing_tokens

_BY_WIDTH: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")


def build_checkpoint(job: TrainJob, adapter: Path, out: Path) -> tuple[CheckpointManifest, MergeReport]:
    """Write the job's checkpoint to `out`, with its probe; the manifest is the caller's to write.

    Raises CheckpointError where what was written does not pass the gate.
    """
    build = Build(job, adapter, out)
    built = build.adapter_alone() if job.merge.serve_as == "adapter" else build.merged()
    check_merge(built.report, _remedy(job, built.report))
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
        free_memory()
        self.job, self.adapter, self.out = job, adapter, out
        self.base_path = Path(job.base_path)
        self.processor, _ = load_processor(self.base_path)
        self.questions = load_questions(Path(job.pairs_path), self.processor, job.train)
        self.base = self._ask(load_model(self.base_path, torch.float32))
        self.policy = self._ask(self._load_policy())

    def _ask(self, model: Model) -> Answers:
        return ask(model, self.questions)

    def _load_policy(self) -> Model:
        free_memory()
        return attach_adapter(load_model(self.base_path, torch.float32), self.adapter)

    def _load_held(self, directory: Path, dtype: Dtype, held: Dtype) -> Model:
        """The weights in `directory`, written in `dtype` and held in `held`, to be asked in float32."""
        free_memory()
        return load_model(directory, DTYPES[dtype]).to(DTYPES[held]).float()

    def merged(self) -> Built:
        """The merged checkpoint, in the first of the recipe's types that keeps what was trained, or the last."""
        dropped: list[tuple[Dtype, Retention]] = []
        *narrower, last = self._types()
        for dtype in narrower:
            built = self._merge(dtype)
            if not loses(built.report.retention):
                return built
            dropped.append((dtype, built.report.retention))
            del built
        built = self._merge(last)
        return replace(built, report=built.report.model_copy(update={"dropped": tuple(dropped)}))

    def _merge(self, dtype: Dtype) -> Built:
        processor, _ = load_processor(self.base_path)  # afresh: one that was used would write its padding, too
        write_merged(self._load_policy(), processor, DTYPES[dtype], fresh_directory(self.out))
        held = min(dtype, self.job.serve_dtype or dtype, key=_BY_WIDTH.index)
        base = self._rounded_base(dtype, held)
        as_held = None if held == dtype else self._ask(self._load_held(self.out, dtype, held))
        model = self._load_held(self.out, dtype, dtype)
        stored = self._ask(model)
        report = self._report(dtype, held, as_held or stored, base)
        num_changed = count_changed_tensors(self.base_path, self.out)
        return Built(model, report.model_copy(update={"num_changed_tensors": num_changed}), stored)

    def adapter_alone(self) -> Built:
        """The adapter's checkpoint; the base's weights are no part of it."""
        model = self._load_policy()
        write_adapter(model, self.base_path, self.adapter, fresh_directory(self.out))
        is_exact = is_served_exactly(model)
        del model
        free_memory()
        written = self.out if is_exact else self.adapter  # PEFT reads the language model's names in both forms only
        model = attach_adapter(load_model(self.base_path, torch.float32), written)
        stored = self._ask(model)
        report = self._report("float32", "float32", stored, self.base)
        changes = {"num_changed_tensors": count_learned_tensors(self.out), "is_served_exactly": is_exact}
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
        )

    def _types(self) -> list[Dtype]:
        if self.job.merge.dtype != "auto":
            return [self.job.merge.dtype]
        own = max(stored_dtypes(self.base_path), key=_BY_WIDTH.index)
        return list(dict.fromkeys((own, "float32")))

    def _rounded_base(self, dtype: Dtype, held: Dtype) -> Answers:
        """The base's answers once it is rounded like the checkpoint; its own where that changes nothing."""
        if {dtype, held} <= stored_dtypes(self.base_path) | {"float32"}:
            return self.base
        return self._ask(self._load_held(self.base_path, dtype, held))


def _remedy(job: TrainJob, report: MergeReport) -> str:
    if report.held != report.dtype:
        return "set a wider serve.dtype, or train more"
    return "train more" if report.dtype == "float32" else "set merge.dtype = auto, or train more"
