"""Adapter -> servable checkpoint, and the gate that it passes before it exists.

    python -m vcot.training.merge JOB_DIR OUT_DIR

Base and adapter are added in float32, tensor by tensor, and written in the recipe's dtype into files like the base's own
(vLLM loads their names and silently drops others); processor, tokenizer and chat template are the base's, the generation
config sets no sampling, and a model card says how it was made. With merge.serve_as = adapter it is the adapter alone, under
names of the same kind. What was written is then loaded again and asked: it must answer as base + adapter does, within the
dtype's tolerance, and not as the base, and must keep the reward margins that were trained. Only then is the directory, with
its manifest and its probe (training/protocol/agreement.py), renamed into place.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from vcot.pipeline.errors import CheckpointError, VcotError
from vcot.pipeline.files import write_record
from vcot.pipeline.identity import MANIFEST, compute_digest, read_manifest, verify_checkpoint, write_manifest
from vcot.pipeline.manifest import CheckpointManifest
from vcot.training.protocol.job import (
    ADAPTER,
    JOB,
    MERGE_REPORT,
    TrainJob,
    exclusive,
    fresh_directory,
    publish_directory,
    read_record,
)

_log = logging.getLogger(__name__)


def find_merged(job: TrainJob, out: Path) -> CheckpointManifest | None:
    """The manifest of this job's checkpoint at `out`, its weights verified; None where nothing is there.

    Raises CheckpointError where `out` holds something else, or an altered checkpoint.
    """
    if not out.exists():
        return None
    if not (out / MANIFEST).is_file():
        raise CheckpointError(f"{out} exists and is no checkpoint of vcot; give a directory that does not exist yet")
    if (found := read_manifest(out)).job != job.key or found.checkpoint.name != job.checkpoint_name:
        raise CheckpointError(
            f"{out} holds checkpoint {found.checkpoint.name}, not {job.checkpoint_name}; give another"
        )
    return verify_checkpoint(out)


def merge_job(job: TrainJob, job_directory: Path, out: Path) -> CheckpointManifest:
    """Merge the job's adapter into `out`, or return what is there from before.

    Raises CheckpointError, leaving `out` as it was, where the merged weights do not pass the gate.
    """
    if (manifest := find_merged(job, out)) is not None:
        return manifest
    adapter = job_directory / ADAPTER
    if not (adapter / "adapter_config.json").is_file():
        raise CheckpointError(
            f"job {job_directory} has no trained adapter; run `python -m vcot.training.worker` on it first"
        )
    if adapter.resolve() in (out.resolve(), *out.resolve().parents):
        raise CheckpointError(
            f"{out} lies in the adapter's folder, where loading would apply the adapter twice; give another"
        )
    if compute_digest(Path(job.base_path)) != job.base.digest:
        raise CheckpointError(f"base {job.base_path} is not the one that the adapter was trained on; restore it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = fresh_directory(out.with_name(f".{out.name}.partial"))
    from vcot.training.merge.build import build_checkpoint  # torch, only where there is work to do
    from vcot.training.model.model_card import write_checkpoint_card

    manifest, report = build_checkpoint(job, adapter, partial)
    write_checkpoint_card(job, report, partial)
    write_manifest(partial, manifest)
    write_record(partial / MERGE_REPORT, report)
    publish_directory(partial, out)
    _log.info("merged %s: %s", manifest.checkpoint.name, report.model_dump_json(exclude={"checkpoint"}))
    return manifest


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="vcot.training.merge", description="Merge a trained job into a checkpoint.")
    parser.add_argument("job", type=Path, help="the job's directory")
    parser.add_argument("out", type=Path, help="the checkpoint directory to make")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stdout)
    try:
        job = read_record(options.job / JOB, TrainJob)
        with exclusive(options.job):
            merge_job(job, options.job, options.out)
    except (VcotError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code if isinstance(error, VcotError) else VcotError.exit_code
    return 0
