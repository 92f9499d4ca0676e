"""Trackers besides the run's own files: Weights & Biases and trackio, through transformers' callbacks.

Both get every logged step and evaluation, the gap between the two losses among them, the settings of trainer and adapter, and
the checkpoint's name as the run's. A job is one run there, whichever process does it: one that resumes goes on in it, and
one that follows in the same process begins its own. Weights & Biases writes into the job's directory (WANDB_MODE=offline
keeps it there), trackio into its own local database (TRACKIO_DIR), unless the environment says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.job import TrainJob

PROJECT = "vcot"


@contextmanager
def tracking(job: TrainJob, job_directory: Path) -> Iterator[None]:
    """The job's training, under its own name with its trackers."""
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.setdefault("WANDB_DIR", str(job_directory))
    os.environ |= {"WANDB_RUN_ID": job.key[:16], "WANDB_RESUME": "allow"}
    try:
        yield
    finally:
        if "wandb" in job.train.report_to:
            import wandb

            wandb.finish()  # else the process's next job would be logged into this one
